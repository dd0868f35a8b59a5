"""The quickstart: pretraining on the English that ships with Python, then a task with few labels, with and without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table

from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.config.shipped import shipped_folder
from fmjax.contracts import Config
from fmjax.data.sources.prepositions import preposition_splits
from fmjax.distributed.hosts import say
from fmjax.examples import baselines
from fmjax.inference.evaluate import evaluate_run
from fmjax.train.loop import train

CONFIG = shipped_folder() / "quickstart.py"
COLUMNS = {"accuracy": "accuracy", "macro-F1": "f1_macro", "recall": "recall_macro", "AUC": "roc_auc"}
Metrics = dict[str, float]


def quickstart(workdir: Path, seeds: int = 3, tiny: bool = False) -> None:
    """Pretrains, fine-tunes from the pretrained and from random weights, evaluates on held-out files, prints the table.

    Runs that are already in `workdir` are continued or, where they have ended, not repeated.
    """
    begin = time.perf_counter()
    suffix = ",tiny" if tiny else ""
    say("Text: the manual and docstrings of this Python. A fifth of the files is kept for the test.")
    train(config(f"pretrain{suffix}"), workdir / "pretrain", "pretrain")
    rows: dict[str, list[Metrics]] = {"BERT from scratch": [], "BERT pretrained": []}
    for seed in range(seeds):
        for name, origin in (("scratch", None), ("pretrained", workdir / "pretrain")):
            run = workdir / f"{name}-{seed}"
            train(config(f"finetune{suffix}", seed, origin, workdir / "pretrain" / "tokenizer"), run, f"{name} {seed}")
            rows[f"BERT {'from scratch' if origin is None else name}"].append(evaluate_run(run, "test"))
    splits = preposition_splits().examples
    simple = baseline_rows(splits)
    show(simple | rows, splits, seeds)
    say(ending(workdir, time.perf_counter() - begin))


def config(arguments: str, seed: int = 0, origin: Path | None = None, tokenizer: Path | None = None) -> Config:
    """Returns a quickstart config; fine-tuning names what it starts from, the control the same tokenizer."""
    loaded = load_config(f"{CONFIG}:{arguments}")
    overrides = [("train.seed", str(seed))]
    if origin is not None:
        overrides.append(("init.weights", str(origin)))
    elif tokenizer is not None:
        overrides.append(("data.tokenizer", str(tokenizer)))
    apply_overrides(loaded, overrides)
    return to_dict(loaded)


def baseline_rows(splits: dict[str, list[dict[str, str]]]) -> dict[str, list[Metrics]]:
    """Returns the metrics of the baselines on the same examples."""
    known, test = splits["train"], splits["test"]
    makers: dict[str, Callable[[], Metrics]] = {
        "majority label": lambda: baselines.majority(known, test),
        "TF-IDF + logistic regression": lambda: baselines.logistic_regression(baselines.tfidf(), known, test),
        "words beside the blank + logistic regression": lambda: baselines.logistic_regression(baselines.positions(), known, test),
    }
    return {name: [make()] for name, make in makers.items()}


def show(rows: dict[str, list[Metrics]], splits: dict[str, list[dict[str, str]]], seeds: int) -> None:
    """Prints the table of results on stdout."""
    sizes = f"{len(splits['train']):,} labels, {len(splits['test']):,} test examples"
    title = f"Which of ten prepositions fills the blank? {sizes}"
    table = Table(title=title)
    table.add_column("model")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, results in rows.items():
        table.add_row(name, *(cell([result[key] for result in results]) for key in COLUMNS.values()))
    console = Console(width=110)
    console.print(table)
    gain = 100 * (mean(r["accuracy"] for r in rows["BERT pretrained"]) - mean(r["accuracy"] for r in rows["BERT from scratch"]))
    console.print(f"Pretraining changes accuracy by {gain:+.1f} points (means of {seeds} fine-tuning seeds).", highlight=False)


def cell(values: list[float]) -> str:
    """Returns 'mean ± deviation' of several values, or the one."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def ending(workdir: Path, seconds: float) -> str:
    """Returns what to know of the table, where everything is, and what to do next."""
    return f"""
Caveats: the labels come from the text itself, so the low-label setting is artificial. Some windows of
words resemble each other across files. All pretrained rows share a single pretraining run. Python's
documentation is not English in general.

{seconds / 60:.1f} minutes. The runs are in {workdir}/: pretrain/ (its checkpoints in
pretrain/checkpoints/), scratch-*/ and pretrained-*/.
TensorBoard: pip install tensorboard && tensorboard --logdir {workdir}

Next, on your own text:
  python scripts/train.py --config configs/bert_mlm.py --workdir runs/mine --config.data.files.train='MY_TEXTS/*.txt'
and on your own labels (a csv with the columns text and label):
  python scripts/train.py --config configs/bert_classify.py:files --workdir runs/labels \\
      --config.init.weights=runs/mine --config.data.files.train=MY_TRAIN.csv --config.data.files.validation=MY_DEV.csv"""
