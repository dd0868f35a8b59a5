"""The input pipeline of BERT pretraining, from text to masked batches, compared with that of
transformers' own example.

The peer (`peer_inputs.py`) does what run_mlm.py does: a fast tokenizer on batches of texts,
concatenation and cutting into rows of 512, DataCollatorForLanguageModeling. Rows are kept in
`datasets` if it is installed, otherwise in lists; the result says which. Both sides read the same
file with the same tokenizer; preparing (tokenizing, cutting) and feeding (batches) are timed
separately. Then BERT is trained on the file, and the time that the run waits for data is shown."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fmjax.bench import timing
from fmjax.bench.measure import Options, machine
from fmjax.bench.table import markdown
from fmjax.bench.workloads import Facts, Result
from fmjax.config.shipped import shipped_configs
from fmjax.contracts import Processors
from fmjax.data.kinds import text
from fmjax.data.sources.open import open_source
from fmjax.data.stream.batches import TrainBatches
from fmjax.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from fmjax.runs.folder import read_provenance
from fmjax.runs.logs import read_metrics

ROWS, LENGTH, BATCHES, BAR = 8, 512, 200, 1.5
STEPS, WAITING = (
    12,
    0.02,
)  # training steps, and the largest fraction of their time that may be spent waiting for data
VOCABULARY = 8000


def feed(folder: Path, rows: int, length: int, count: int) -> dict[str, float]:
    """Returns fmjax's seconds and tokens for preparing the texts in a folder and for feeding
    `count` batches of them.
    """
    from fmjax import tasks

    task, tokenizer = tasks.make({"name": "mlm"}), load_tokenizer(folder / "tokenizer")
    source = open_source("jsonl", str(folder / "texts.jsonl"), "train")
    begun = time.perf_counter()
    examples: Any = task.examples(source, Processors(text.Processor(tokenizer)), length, train=True)
    prepared = time.perf_counter()
    batches = TrainBatches(examples, batch_size=rows, seed=0)
    tokens = sum(int((next(batches)["segment_ids"] > 0).sum()) for _ in range(count))
    done = time.perf_counter()
    return {
        "prepare_seconds": prepared - begun,
        "prepare_tokens": examples.corpus.size,
        "feed_seconds": done - prepared,
        "feed_tokens": tokens,
    }


def measure(options: Options) -> Result:
    """Returns both sides' tokens per second, from alternating runs, and their ratio."""
    folder = options.workdir / "jobs" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    source = open_source("python_docs", None, "train")
    texts = [source[index]["text"] for index in range(200 if options.tiny else len(source))]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines, encoding="utf-8")
    train_tokenizer(texts, "wordpiece", 500 if options.tiny else VOCABULARY).save(
        folder / "tokenizer"
    )
    job = {
        "folder": str(folder),
        "rows": ROWS,
        "length": 64 if options.tiny else LENGTH,
        "count": 4 if options.tiny else BATCHES,
    }
    runs: dict[str, list[Result]] = {"fmjax": []}
    with timing.ours(folder, options.threads) as own:
        if not options.peer:
            runs["fmjax"] = [own.ask("inputs", **job) for _ in range(options.rounds)]
        else:
            with timing.peer(folder, options.threads, "eager", options.python, "cpu") as other:
                for side in (own, other):
                    side.ask("inputs", **job)  # the first call includes imports
                for _ in range(options.rounds):
                    for side in (own, other, other, own):
                        answer = side.ask("inputs", **job)
                        runs.setdefault(answer.pop("name", side.name), []).append(answer)
    result = {
        "sides": {name: rates(own) for name, own in runs.items()},
        "runs": runs,
        "length": job["length"],
        "bar": BAR,
    }
    return result | {"training": train(folder, options), "machine": machine(options)}


def train(folder: Path, options: Options) -> dict[str, float]:
    """Trains BERT (4 layers, width 256) on the texts in a folder with scripts/train.py. Returns the
    record of the last step: the seconds per step, and the fraction of them spent waiting for data.
    """
    workdir, length = folder / "run", 64 if options.tiny else LENGTH
    shutil.rmtree(workdir, ignore_errors=True)
    settings = {
        "data.files.train": folder / "texts.jsonl",
        "data.tokenizer": folder / "tokenizer",
        "data.batch_size": ROWS,
        "data.max_length": length,
        "train.steps": STEPS,
        "train.log_every": STEPS,
        "train.eval_every": 0,
        "model.size": "tiny" if options.tiny else "mini",
        "train.dropout_rng": "hash",
    }
    script = timing.ROOT / "scripts" / "train.py"  # of a checkout, which need not be installed
    called = [str(script)] if script.is_file() else ["-m", "fmjax.scripts.train"]
    command = [
        sys.executable,
        *called,
        "--config",
        str(shipped_configs()["bert_mlm"]),
        "--workdir",
        str(workdir),
    ]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise timing.SideError(
            f"training from {folder} ended with {done.returncode}: {done.stderr.strip()[-300:]}"
        )
    lines = read_metrics(workdir)
    last = [line for line in lines if "data_wait" in line][-1]
    filled = read_provenance(workdir)["fill"]["input_ids"]
    return {
        "step_seconds": filled * ROWS * length / last["tokens_per_second"],
        "data_wait": last["data_wait"],
    }


def rates(runs: list[Result]) -> dict[str, float]:
    """Returns median tokens per second for preparing, for feeding, and for one epoch of both."""
    each = [
        {part: run[f"{part}_tokens"] / run[f"{part}_seconds"] for part in ("prepare", "feed")}
        for run in runs
    ]
    middle = {part: statistics.median(rate[part] for rate in each) for part in ("prepare", "feed")}
    return middle | {"epoch": 1 / (1 / middle["prepare"] + 1 / middle["feed"])}


def table(result: Facts) -> str:
    """Returns the table, and one line about the peer."""
    sides = result["sides"]
    others = [name for name in sides if name != "fmjax"]
    head = ("tokens per second", *sides, *(["times faster"] if others else []))
    rows = []
    for part, label in (
        ("prepare", "tokenize and cut"),
        ("feed", "mask and batch"),
        ("epoch", "both, first epoch"),
    ):
        cells = [f"{sides[name][part]:,.0f}" for name in sides]
        rows.append(
            (label, *cells, *(f"{sides['fmjax'][part] / sides[name][part]:.2f}" for name in others))
        )
    each = [f"{sides[name]['feed'] / result['length']:,.0f}" for name in sides]
    rows.append(("rows per second", *each, *("" for _ in others)))
    said = (
        f"bar: >= {result['bar']} of `datasets` + fast tokenizer + DataCollatorForLanguageModeling"
    )
    if not any("datasets" in name and "without" not in name for name in others):
        said += (
            "; `datasets` is not installed here, so fmjax is not compared with it (pip install "
            "datasets)"
        )
    run = result["training"]
    said += (
        f"\ntraining a 4-layer BERT of width 256, a step of {1e3 * run['step_seconds']:.0f} ms: "
        f"{run['data_wait']:.2%} of the time was spent waiting for data (target for steps over 100 "
        f"ms: < {WAITING:.0%})"
    )
    return markdown(head, rows) + f"\n{said}"
