"""The quickstart: pretraining on the English that ships with Python, then a task with few labels,
with and without pretraining.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.config.shipped import shipped_folder
from fmjax.contracts import Config
from fmjax.data.sources.prepositions import preposition_splits
from fmjax.distributed.hosts import say
from fmjax.examples import baselines
from fmjax.examples.compiled import compiled_programs
from fmjax.inference.evaluate import evaluate_run
from fmjax.runs.report import REPORT
from fmjax.train.loop import train

CONFIG = shipped_folder() / "quickstart.py"
COLUMNS = {
    "accuracy": "accuracy",
    "macro-F1": "f1_macro",
    "recall": "recall_macro",
    "AUC": "roc_auc",
}
FULL_SEEDS = 3
SCRATCH, PRETRAINED = "BERT from random weights", "BERT, pretrained"
Metrics = dict[str, float]


def quickstart(workdir: Path, full: bool = False, seeds: int = 0, tiny: bool = False) -> None:
    """Pretrains, fine-tunes from the pretrained and from random weights, evaluates on held-out
    files, prints the table.

    Args:
      workdir: the folder of the runs. Existing runs are continued, and finished ones are not
        repeated.
      full: pretrain for longer, and fine-tune with three seeds.
      seeds: number of fine-tuning runs per initialization; 0: one, or three if `full`.
      tiny: a few steps of a tiny model.
    """
    begin = time.perf_counter()
    modes = [name for name, chosen in (("full", full), ("tiny", tiny)) if chosen]
    say(
        "Text: the manual and docstrings of this Python. A fifth of the files is held out for "
        "validation and test."
    )
    splits = preposition_splits().examples
    sizes = f"{len(splits['train']):,} labels, {len(splits['test']):,} test examples"
    table = Table(f"Which of ten prepositions fills the blank? {sizes}")
    for name, measure in simple_models(splits):
        table.add(name, [measure()])
    base = workdir / "pretrain"
    with compiled_programs():
        train(config("pretrain", *modes), base, "pretrain")
        finetune(workdir, base, table, modes, seeds or (FULL_SEEDS if full else 1))
    table.show_all()
    gain = 100 * (table.accuracy(PRETRAINED) - table.accuracy(SCRATCH))
    print(f"Pretraining changes accuracy by {gain:+.1f} points.")
    print(ending(workdir, time.perf_counter() - begin, full))
    print(workdir / "pretrained-0" / REPORT)


def finetune(workdir: Path, base: Path, table: Table, modes: Sequence[str], seeds: int) -> None:
    """Fine-tunes from random and from pretrained weights, with each seed, and adds both to the
    table."""
    for name, label, origin in (("scratch", SCRATCH, None), ("pretrained", PRETRAINED, base)):
        results: list[Metrics] = []
        for seed in range(seeds):
            run = workdir / f"{name}-{seed}"
            train(
                config("finetune", *modes, seed=seed, origin=origin, tokenizer=base / "tokenizer"),
                run,
                f"{name} {seed}",
            )
            results.append(evaluate_run(run, "test"))
        table.add(label, results)


def config(
    stage: str,
    *modes: str,
    seed: int = 0,
    origin: Path | None = None,
    tokenizer: Path | None = None,
) -> Config:
    """Returns a quickstart config. Fine-tuning names the run that it starts from; the control run
    uses the same tokenizer.
    """
    loaded = load_config(f"{CONFIG}:{','.join((stage, *modes))}")
    overrides = [("train.seed", str(seed))]
    if origin is not None:
        overrides.append(("init.weights", str(origin)))
    elif tokenizer is not None:
        overrides.append(("data.tokenizer", str(tokenizer)))
    apply_overrides(loaded, overrides)
    return to_dict(loaded)


def simple_models(
    splits: dict[str, list[dict[str, str]]],
) -> Sequence[tuple[str, Callable[[], Metrics]]]:
    """Returns the names of the baselines, and functions that compute their metrics on the same
    examples."""
    known, test = splits["train"], splits["test"]
    regression = baselines.logistic_regression
    return (
        ("majority label", lambda: baselines.majority(known, test)),
        ("TF-IDF + logistic regression", lambda: regression(baselines.tfidf(), known, test)),
        (
            "words beside the blank + logistic regression",
            lambda: regression(baselines.positions(), known, test),
        ),
    )


class Table:
    """The table of results on stdout: prints each row as soon as it is known, and all rows at the
    end."""

    def __init__(self, title: str):
        self.title = title
        self.rows: dict[str, list[Metrics]] = {}
        self.print_head()

    def print_head(self) -> None:
        print(f"\n{self.title}")
        print(line("model", list(COLUMNS)), flush=True)

    def add(self, name: str, results: list[Metrics]) -> None:
        """Prints the row of a model; for several results, their mean and standard deviation."""
        self.rows[name] = results
        self.print_row(name)

    def print_row(self, name: str) -> None:
        results = self.rows[name]
        print(
            line(name, [cell([result[key] for result in results]) for key in COLUMNS.values()]),
            flush=True,
        )

    def show_all(self) -> None:
        self.print_head()
        for name in self.rows:
            self.print_row(name)

    def accuracy(self, name: str) -> float:
        return mean(result["accuracy"] for result in self.rows[name])


def line(name: str, cells: Sequence[str]) -> str:
    """Returns a row of the table."""
    return f"{name:<45}" + "".join(f"{cell:>15}" for cell in cells)


def cell(values: list[float]) -> str:
    """Returns 'mean ± deviation' of several values, or a single value."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def ending(workdir: Path, seconds: float, full: bool) -> str:
    """Returns caveats about the table, the location of the runs, and the next commands."""
    more = (
        ""
        if full
        else " One seed, short pretraining; --full pretrains longer and averages three seeds."
    )
    train_command = (
        "fmjax-train" if Path(sys.argv[0]).name == "fmjax-quickstart" else "python scripts/train.py"
    )
    return f"""{seconds / 60:.1f} minutes.{more}

Caveats: the labels come from the text itself, so the low-label setting is artificial. Some windows
of words resemble each other across files. All pretrained rows share a single pretraining run.
Python's documentation is not English in general.

The runs are in {workdir}/: pretrain/, scratch-*/ and pretrained-*/, each with checkpoints and a
report.
Next, on your own text:
  {train_command} --config bert_mlm --workdir runs/mine --config.data.files.train='MY_TEXTS/*.txt'
and on your own labels (a csv with the columns text and label):
  {train_command} --config bert_classify:files --workdir runs/labels \\
      --config.init.weights=runs/mine --config.data.files.train=MY_TRAIN.csv \\
      --config.data.files.validation=MY_DEV.csv

The report of the pretrained model, fine-tuned:"""
