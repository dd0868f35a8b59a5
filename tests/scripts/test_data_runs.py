"""Runs on several sources, and on data that are not in order, as their user sees them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from support.run_results import equal, records

from scripts import evaluate

DRIVER = "import sys; from scripts import train; sys.exit(train.main(sys.argv[1:]))"


def mixture(data: Path, **changes) -> tuple[str, ...]:
    """Returns the overrides of a run on two sources, the second with a part of its own for validation."""
    held = {"train": str(data / "test.txt"), "validation": str(data / "dev.txt")}
    sources = {"news": {"files": str(data / "train.txt"), "weight": 3}, "tales": {"files": held, "weight": 1, "epochs": 9}}
    sources = {name: own | changes.get(name, {}) for name, own in sources.items()}
    return ("data.files={}", f"data.mixture={json.dumps(sources)}", 'data.curriculum={"3": {"news": 1}}', "data.hold_out=0.1")


@pytest.fixture(scope="module")
def mixed(data: Path, tmp_path_factory) -> Path:
    """Six steps on the mixture without a break; data are copied, so that they can be spoilt."""
    from scripts import train

    folder = tmp_path_factory.mktemp("mixed")
    for name in ("train.txt", "dev.txt", "test.txt"):
        shutil.copy(data / name, folder)
    words = ["--config", str(data / "config.py"), "--workdir", str(folder / "run")]
    changes = (*mixture(folder), "train.steps=6", "train.eval_every=3", "checkpoint.every=3")
    assert train.main([*words, *(f"--config.{change}" for change in changes)]) == 0
    return folder


def test_a_mixture_trains_and_is_judged_by_each_source(mixed, capsys):
    found = [record for record in records(mixed / "run") if "eval/validation/loss" in record]
    assert [record["step"] for record in found] == [3, 6]
    last = found[-1]
    for name in ("loss", "news/loss", "news/accuracy", "tales/loss"):
        assert f"eval/validation/{name}" in last
    low, high = sorted(last[f"eval/validation/{name}/loss"] for name in ("news", "tales"))
    assert low < last["eval/validation/loss"] < high
    data = json.loads((mixed / "run" / "provenance.json").read_text())["data"]
    assert data["train"]["news"]["files"][0]["name"] == "train.txt" and list(data["validation"]) == ["news", "tales"]
    assert evaluate.main(["--workdir", str(mixed / "run")]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("loss", "news/loss", "tales/accuracy"):
        assert evaluated[name] == pytest.approx(last[f"eval/validation/{name}"], abs=1e-5)
    assert "news/loss over steps" in (mixed / "run" / "report.html").read_text()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_a_mixture_goes_on_where_it_was(workers, mixed, run, capsys, tmp_path):
    settings = (*mixture(mixed), "train.eval_every=3", "checkpoint.every=3")
    assert run(tmp_path / "run", *settings, "train.steps=4") == 0
    error = capsys.readouterr().err
    assert "data.mixture: news 75.0% of " in error
    # How batches are read is free to change.
    how = ("data.prefetch=1", "data.on_error=skip:2", f"data.workers={workers}")
    assert run(tmp_path / "run", *settings, "train.steps=6", *how) == 0
    ours, theirs = records(tmp_path / "run"), records(mixed / "run")
    assert [record for record in ours if record["step"] not in (4,)] == [r for r in theirs if r["step"] not in (4,)]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"]["prefetch"], config["data"]["on_error"]) == (1, "skip:2")


def test_a_mixture_that_changed_is_refused(mixed, refused, tmp_path):
    settings = ("train.steps=6", "train.eval_every=3", "checkpoint.every=3")
    workdir = shutil.copytree(mixed / "run", tmp_path / "run")
    message = refused(workdir, *mixture(mixed, news={"weight": 2}), *settings)
    assert "data.mixture.news.weight: 3 -> 2" in message
    assert "data.batch_size: 16 -> 8; train.seed: 0 -> 1" in refused(
        workdir, *mixture(mixed), *settings, "train.seed=1", "data.batch_size=8"
    )
    file = mixed / "train.txt"
    content = file.read_text()
    try:
        file.write_text(content + "the old dog sees the cat\n")
        message = refused(workdir, *mixture(mixed), *settings)
    finally:
        file.write_text(content)
    size = len(content)
    assert f"train: news: train.txt: {size:,} bytes, sha256 " in message and f" -> {size + 25:,} bytes, sha256 " in message
    too_long = refused(tmp_path / "new", *mixture(mixed, news={"epochs": 1}), "train.steps=900")
    assert "the epochs of data.mixture end after " in too_long and "900 steps of 16 need 14,400" in too_long


def test_a_run_in_length_buckets(data, run, capsys, tmp_path):
    """Goes on to the same bits with a worker process, and is judged as without buckets."""
    rows = [line.split(",") for line in (data / "train.csv").read_text().splitlines()[1:]]
    file = tmp_path / "texts.jsonl"
    made = [{"text": " ".join([text] * (1 + number % 2)), "label": label} for number, (text, label) in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    files = (f"data.files.train={file}", f"data.files.validation={file}", "train.eval_every=3", "checkpoint.every=3")
    files = (*files, "data.vocab_size=200", "data.max_length=14")  # each word is a token
    buckets = (*files, "data.buckets=8,9")
    assert run(tmp_path / "whole", *buckets, "train.steps=6", arg="classify") == 0
    assert run(tmp_path / "parts", *buckets, "train.steps=3", arg="classify") == 0
    assert run(tmp_path / "parts", *buckets, "train.steps=6", "data.workers=1", arg="classify") == 0
    equal(tmp_path / "parts", tmp_path / "whole")
    # Texts are 8 and 14 tokens long, [CLS] and [SEP] included; the longer get a bucket beyond those named.
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["data"]["buckets"] == [8, 9, 14]
    assert 0.85 < json.loads((tmp_path / "whole" / "provenance.json").read_text())["fill"]["input_ids"] <= 1
    plain = shutil.copytree(tmp_path / "whole", tmp_path / "plain")
    stored = json.loads((plain / "config.json").read_text())
    stored["data"]["buckets"] = []
    (plain / "config.json").write_text(json.dumps(stored))
    capsys.readouterr()
    assert evaluate.main(["--workdir", str(plain)]) == 0
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in ("loss", "accuracy"):
        assert evaluated[name] == pytest.approx(records(tmp_path / "whole")[-1][f"eval/validation/{name}"], abs=1e-6)


def test_a_run_from_before_buckets_were_the_default_goes_on_without(data, run, refused, tmp_path):
    none = ("data.buckets=none", "train.eval_every=2")
    assert run(tmp_path / "whole", *none, "train.steps=4", arg="classify,buckets") == 0
    assert run(tmp_path / "older", *none, "train.steps=2", arg="classify,buckets") == 0
    stored = json.loads((tmp_path / "older" / "config.json").read_text())
    for data_section in (stored["data"], stored["fmjax"]["given"]["data"]):
        data_section["buckets"] = []  # as it was
    for task in (stored["task"], stored["fmjax"]["given"]["task"]):
        del task["separator"], task["label_columns"]  # which were not there
    (tmp_path / "older" / "config.json").write_text(json.dumps(stored))
    assert run(tmp_path / "older", none[1], "train.steps=4", arg="classify,buckets") == 0
    equal(tmp_path / "older", tmp_path / "whole")
    assert json.loads((tmp_path / "older" / "config.json").read_text())["data"]["buckets"] == []
    message = refused(tmp_path / "older", "train.steps=6", "data.buckets=8,16", arg="classify,buckets")
    assert "data.buckets: " in message and "started with another config" in message


def test_bad_records_end_a_run_or_are_left_out_and_counted(data, run, refused, capsys, tmp_path):
    lines = (data / "train.csv").read_text().splitlines()
    bad = tmp_path / "bad.csv"
    bad.write_text("\n".join([*lines[:40], "a blank label,", "  ,person", *lines[40:]]) + "\n")
    held = tmp_path / "held.csv"
    held.write_text("\n".join([*lines[:3], "the fish counts,animal"]) + "\n")
    files = f'data.files={{"train": "{bad}", "validation": "{held}"}}'
    assert 'bad.csv line 41: column "label" holds' in refused(tmp_path / "run", files, "train.steps=2", arg="classify")
    settings = (files, "train.steps=2", "data.on_error=skip:2")
    assert run(tmp_path / "skipped", *settings, arg="classify") == 0
    error = capsys.readouterr().err
    assert 'warning: left out bad.csv line 41: column "label" holds' in error and "warning: left out bad.csv line 42: " in error
    assert "warning: 2 of 3 validation records also occur in training, the first is held.csv line 2; metrics" in error
    provenance = json.loads((tmp_path / "skipped" / "provenance.json").read_text())
    assert len(provenance["left_out"]) == 2 and provenance["overlap"]["records"] == 2
    assert records(tmp_path / "skipped")[-2]["left_out"] == 2
    report = (tmp_path / "skipped" / "report.html").read_text()
    assert "2 bad records were left out: bad.csv line 4" in report
    assert "2 of 3 validation records also occur in training" in report
    message = refused(tmp_path / "one", *settings[:2], "data.on_error=skip:1", arg="classify")
    assert "1 bad records were already left out (data.on_error=skip:1)" in message
    message = refused(tmp_path / "x", files, "data.workers=-1", arg="classify")
    assert "data.workers=-1: must be a whole number from 0 to 1,024; 0 uses a thread" in message
    assert 'data.on_error="skip": write fail, or skip:N' in refused(tmp_path / "x", files, "data.on_error=skip", arg="classify")


@pytest.mark.full
def test_a_run_whose_worker_is_killed_says_so_and_ends(start, tmp_path):
    process = start(DRIVER, tmp_path / "run", "train.steps=100000", "data.workers=1", "checkpoint.every=0", "train.log_every=1")
    deadline = time.monotonic() + 240
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) > 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.2)
    children = " ".join(thread.read_text() for thread in Path(f"/proc/{process.pid}/task").glob("*/children")).split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    for pid in workers:
        os.kill(int(pid), signal.SIGKILL)
    try:
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2 and len(workers) == 1, error
    assert "data.workers=1: worker 0, reading training example " in error and "was ended by SIGKILL" in error
