"""Training from Python, like `scripts/train.py` from the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping

from fmjax.config import apply_overrides, load_config, overridden_keys, override_texts, to_dict
from fmjax.contracts import Value
from fmjax.data.stream.watch import starts_as_worker
from fmjax.filesystems.paths import run_path
from fmjax.memory import keep_freed
from fmjax.train.loop import train


def fit(
    config: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    overrides: Mapping[str, Value] | None = None,
) -> dict[str, float]:
    """Trains what a config file describes into a run directory, or continues it.

    Args:
      config: "path/to/file.py", "path/to/file.py:argument", or the name of a config that comes with
        fmjax, "bert_mlm:tiny".
      workdir: the run directory, a local folder or gs://BUCKET/RUN.
      overrides: values by key, such as {"optim.learning_rate": 1e-4}; None unsets a key. A value
        may be text, a path, a number, a list, a group of keys, or a NumPy scalar or array.

    Returns the metrics of the last evaluation on the validation data, by name; those of a finished
    run are read from its log. Empty if there is no validation data. Outside the main thread, the
    program handles signals itself. From now on, this process keeps the memory that it frees
    (`memory.py`).

    With `data.workers`, a script must call this under `if __name__ == "__main__":`, since the
    worker processes import the script.

    Raises UserError for a config, data or settings that do not fit, and Interrupted if SIGTERM or
    SIGINT ended the run after its state was saved.
    """
    if starts_as_worker():
        raise SystemExit(
            "error: a worker process of data.workers imports this script, which calls fmjax.fit "
            'again; put the call under if __name__ == "__main__":'
        )
    keep_freed()
    described = load_config(os.fspath(config))
    texts = override_texts(overrides or {})
    apply_overrides(described, texts)
    return train(to_dict(described), run_path(workdir), overridden=overridden_keys(texts))
