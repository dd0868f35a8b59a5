"""The input pipelines of BERT, from text to batches, compared with those of transformers' own
examples.

The peer (`peer_inputs.py`) does what they do. Pretraining (run_mlm.py): a fast tokenizer on batches
of texts, concatenation and cutting into rows of 512, DataCollatorForLanguageModeling. Fine-tuning
on short texts with labels (run_glue.py): a fast tokenizer on batches of texts,
DataCollatorWithPadding. Rows are kept in `datasets` if it is installed, otherwise in lists; the
result says which. Both sides read the same file with the same tokenizer and an empty cache;
preparing (tokenizing, cutting) and feeding (batches) are timed separately. Then BERT is trained on
the file, and the time that the run waits for data is shown."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.bench import timing
from fmjax.bench.measure import Options, machine
from fmjax.bench.table import markdown
from fmjax.bench.workloads import Facts, Result
from fmjax.config.shipped import shipped_configs
from fmjax.contracts import Processors
from fmjax.data.kinds import text
from fmjax.data.sources.open import open_source
from fmjax.data.stream.batches import TrainBatches
from fmjax.data.stream.buckets import bucketed
from fmjax.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from fmjax.runs.folder import read_provenance
from fmjax.runs.logs import read_metrics

BAR = 1.5
ROWS, LENGTH = 8, 512
# Of each task: rows of a batch, their longest length, and batches.
SIZES = {"mlm": (ROWS, LENGTH, 200), "classify": (32, 64, 1000)}
TINY = {"mlm": (8, 64, 4), "classify": (8, 32, 4)}
WORDS, LABELED = 12, 60_000  # words of a text with a label, and the number of such texts
STEPS, WAITING = (
    12,
    0.02,
)  # training steps, and the largest fraction of their time that may be spent waiting for data
VOCABULARY = 8000


def feed(folder: Path, name: str, rows: int, length: int, count: int) -> dict[str, float]:
    """Returns fmjax's seconds and tokens for preparing the texts in a folder for a task, and for
    feeding `count` batches of them.
    """
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FMJAX_CACHE"] = cache
        return prepare_and_feed(folder, name, rows, length, count)


def prepare_and_feed(
    folder: Path, name: str, rows: int, length: int, count: int
) -> dict[str, float]:
    from fmjax import tasks

    tokenizer = load_tokenizer(folder / "tokenizer")
    begun = time.perf_counter()
    source = open_source("jsonl", str(folder / f"{name}.jsonl"), "train")
    settings = {"name": name} | ({"overlong": "truncate"} if name == "classify" else {})
    task = tasks.make(settings | tasks.make(settings).resolve(source))
    examples: Any = task.examples(source, Processors(text.Processor(tokenizer)), length, train=True)
    read = int(examples.corpus.size if name == "mlm" else examples.lengths.sum())
    prepared = time.perf_counter()
    batches = TrainBatches(bucketed(examples, ("auto",), length, rows), batch_size=rows, seed=0)
    real = "segment_ids" if name == "mlm" else "attention_mask"
    tokens = sum(int((next(batches)[real] > 0).sum()) for _ in range(count))
    done = time.perf_counter()
    batches.close()
    return {
        "prepare_seconds": prepared - begun,
        "prepare_tokens": read,
        "feed_seconds": done - prepared,
        "feed_tokens": tokens,
    }


def write_texts(folder: Path, tiny: bool) -> list[str]:
    """Writes the texts of each task, those of the manual that ships with Python. Returns them."""
    source = open_source("python_docs", None, "train")
    whole = [source[index]["text"] for index in range(200 if tiny else len(source))]
    words = " ".join(whole).split()
    # Texts of 1 to 12 words, with one of four labels.
    ends = np.cumsum(1 + np.arange(len(words)) * 7 % WORDS)
    ends = ends[ends < len(words)][: 100 if tiny else LABELED].tolist()
    short = [" ".join(words[begin:end]) for begin, end in pairwise([0, *ends])]
    records = {
        "mlm": [{"text": text} for text in whole],
        "classify": [{"text": text, "label": "abcd"[len(text) % 4]} for text in short],
    }
    for name, own in records.items():
        lines = "".join(json.dumps(record) + "\n" for record in own)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return whole


def measure(options: Options) -> Result:
    """Returns both sides' tokens per second in each task, from alternating runs."""
    folder = options.workdir / "jobs" / "data"
    folder.mkdir(parents=True, exist_ok=True)
    texts = write_texts(folder, options.tiny)
    train_tokenizer(texts, "wordpiece", 500 if options.tiny else VOCABULARY).save(
        folder / "tokenizer"
    )
    jobs = {
        name: {"folder": str(folder), "name": name, "rows": rows, "length": length, "count": count}
        for name, (rows, length, count) in (TINY if options.tiny else SIZES).items()
    }
    runs: dict[str, dict[str, list[Result]]] = {name: {"fmjax": []} for name in jobs}
    with timing.ours(folder, options.threads) as own:
        if not options.peer:
            for name, job in jobs.items():
                runs[name]["fmjax"] = [own.ask("inputs", **job) for _ in range(options.rounds)]
        else:
            with timing.peer(folder, options.threads, "eager", options.python, "cpu") as other:
                for name, job in jobs.items():
                    in_turns(own, other, job, options.rounds, runs[name])
    result = {
        "tasks": {
            name: {"sides": {side: rates(each) for side, each in own_runs.items()}, **jobs[name]}
            for name, own_runs in runs.items()
        },
        "runs": runs,
        "bar": BAR,
    }
    return result | {"training": train(folder, options), "machine": machine(options)}


def in_turns(
    own: timing.Side, other: timing.Side, job: Facts, rounds: int, runs: dict[str, list[Result]]
) -> None:
    """Adds the results of both sides' runs, which take turns."""
    for side in (own, other):
        side.ask("inputs", **job)  # the first call includes imports
    for _ in range(rounds):
        for side in (own, other, other, own):
            answer = side.ask("inputs", **job)
            runs.setdefault(answer.pop("side", side.name), []).append(answer)


def train(folder: Path, options: Options) -> dict[str, float]:
    """Trains BERT (4 layers, width 256) on the texts in a folder with scripts/train.py. Returns the
    record of the last step: the seconds per step, and the fraction of them spent waiting for data.
    """
    workdir, length = folder / "run", 64 if options.tiny else LENGTH
    shutil.rmtree(workdir, ignore_errors=True)
    settings = {
        "data.files.train": folder / "mlm.jsonl",
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


PARTS = {
    "mlm": ("tokenize and cut", "mask and batch"),
    "classify": ("tokenize", "pad and batch"),
}


def table(result: Facts) -> str:
    """Returns the tables of both tasks, and lines about the peer and the training."""
    tables = [task_table(name, task) for name, task in result["tasks"].items()]
    others = [name for name in result["tasks"]["mlm"]["sides"] if name != "fmjax"]
    said = f"bar: >= {result['bar']} of `datasets` + fast tokenizer + the example's data collator"
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
    return "\n\n".join(tables) + f"\n{said}"


def task_table(name: str, task: Facts) -> str:
    """Returns the table of a task."""
    sides = task["sides"]
    others = [side for side in sides if side != "fmjax"]
    head = (f"{name}: tokens per second", *sides, *(["times faster"] if others else []))
    labels = (*PARTS[name], "both, first epoch")
    rows = []
    for part, label in zip(("prepare", "feed", "epoch"), labels, strict=True):
        cells = [f"{sides[side][part]:,.0f}" for side in sides]
        ratios = [f"{sides['fmjax'][part] / sides[side][part]:.2f}" for side in others]
        rows.append((label, *cells, *ratios))
    return markdown(head, rows)
