"""Training from Python: what `scripts/train.py` does from the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.contracts import Value
from fmjax.memory import keep_freed
from fmjax.train.loop import train


def fit(
    config: str | Path, workdir: str | Path, overrides: Mapping[str, Value] | None = None
) -> dict[str, float]:
    """Trains what a config file describes into a run directory, or continues it.

    Args:
      config: "path/to/file.py", "path/to/file.py:argument", or the name of a config that comes with
        fmjax, "bert_mlm:tiny".
      workdir: the run directory.
      overrides: values by key, such as {"optim.learning_rate": 1e-4}; None unsets a key.

    Returns the last evaluation's metrics. Memory that this process frees from now on stays with it
    (`memory.py`).

    Raises UserError and Interrupted as `train.loop.train` does.
    """
    keep_freed()
    described = load_config(str(config))
    texts = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in (overrides or {}).items()
    }
    apply_overrides(
        described, [(key, "none" if text == "null" else text) for key, text in texts.items()]
    )
    return train(to_dict(described), Path(workdir))
