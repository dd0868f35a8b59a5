"""Fine-tuning data of `classify`.

`python -m fmjax.bench.labeled FILE TOKENIZER` reads labelled texts (JSON lines with `text` and
`label`) and prints the seconds for the pass, or for mapping its table, and batches of 32 per
second."""

from __future__ import annotations

import resource
import sys
import time

ROWS, LENGTH, BATCHES = 32, 64, 2000


def ours(file: str, tokenizer: str) -> tuple[float, float]:
    """Returns the seconds for preparing the examples, and for feeding BATCHES batches."""
    from fmjax import tasks
    from fmjax.contracts import Processors
    from fmjax.data.kinds import text
    from fmjax.data.sources.open import open_source
    from fmjax.data.stream.batches import TrainBatches
    from fmjax.data.stream.buckets import bucketed
    from fmjax.data.tokenizers.tokenizer import load_tokenizer

    begun = time.perf_counter()
    source = open_source("jsonl", file, "train")
    task = tasks.make({"name": "classify", "overlong": "truncate"})
    task = tasks.make({"name": "classify", "overlong": "truncate"} | task.resolve(source))
    processors = Processors(text.Processor(load_tokenizer(tokenizer)))
    examples = task.examples(source, processors, LENGTH, train=True)
    batches = TrainBatches(bucketed(examples, ("auto",), LENGTH, ROWS), batch_size=ROWS, seed=0)
    next(batches)
    prepared = time.perf_counter()
    for _ in range(BATCHES):
        next(batches)
    done = time.perf_counter()
    batches.close()
    return prepared - begun, done - prepared


def main() -> None:
    prepare, feed = ours(*sys.argv[1:3])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"first batch after {prepare:.1f} s, {BATCHES / feed:,.0f} batches of {ROWS} per second, "
        f"peak RSS {most:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
