"""scripts/train.py as its user sees it: runs that are stopped, continued, extended, and started from other weights."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.run_results import RATES, equal, items, records

from fmjax.config import load_config, to_dict
from fmjax.runs.checkpoint import CheckpointReader
from fmjax.train.experiment import prepare
from scripts import convert, train

FULL = ("optim.ema=0.9", "train.accumulate=2", "train.eval_every=4", "optim.clip_norm=1.0")

# Sends itself a signal when the batch of a step has been read; a kill waits for the checkpoint before it.
DRIVER = """
import os, pathlib, sys, time
from fmjax.data.stream.batches import TrainBatches
from scripts import train

number, step, sealed = {number}, {step}, {sealed!r}
take, taken = TrainBatches.__next__, 0

def next_batch(self):
    global taken
    taken += 1
    if taken == step:
        while sealed and not pathlib.Path(sealed).exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
    return take(self)

TrainBatches.__next__ = next_batch
sys.exit(train.main(sys.argv[1:]))
"""
KILL, TERM, INT, STOP = 9, 15, 2, 19


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps without a break, with dropout, accumulation and a moving average."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    words = ["--config", f"{data / 'config.py'}:dropout", "--workdir", str(workdir)]
    assert train.main([*words, *(f"--config.{override}" for override in FULL)]) == 0
    return workdir


def test_a_run(whole):
    steps = [record["step"] for record in records(whole) if "loss" in record]
    assert steps == list(range(1, 11))
    assert [record["step"] for record in records(whole) if "eval/validation/loss" in record] == [4, 8, 10]
    first, second, *_ = (set(json.loads(line)) for line in (whole / "metrics.jsonl").read_text().splitlines())
    assert {"loss", "grad_norm", "learning_rate"} <= first and not first & set(RATES)  # the first step is compiled
    assert second == first | set(RATES)
    assert any(name.startswith("ema") for name in items(whole))
    assert CheckpointReader(whole / "checkpoints").steps() == [5, 10]
    report = (whole / "report.html").read_text()
    assert "10 steps" in report and "loss over steps" in report and "<code>optim.learning_rate</code>" in report


@pytest.mark.parametrize(
    ("number", "step", "code", "resumes"),
    [(KILL, 8, -9, 5), (TERM, 8, 75, 8), pytest.param(INT, 3, 75, 3, marks=pytest.mark.full)],
)
def test_a_stopped_run_continues_to_the_same_bits(number, step, code, resumes, start, run, whole, tmp_path):
    workdir = tmp_path / "run"
    sealed = str(workdir / "checkpoints" / "5" / "manifest.json") if number == KILL else ""
    process = start(DRIVER.format(number=number, step=step, sealed=sealed), workdir, *FULL, arg="dropout")
    _, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    assert CheckpointReader(workdir / "checkpoints").latest() == resumes
    if code == 75:
        name = "SIGTERM" if number == TERM else "SIGINT"
        assert err.splitlines()[-1].startswith(f"interrupted: {name}: saved step {step}; run the same command again to continue")
    assert run(workdir, *FULL, arg="dropout") == 0
    equal(workdir, whole)
    assert len(json.loads((workdir / "provenance.json").read_text())["starts"]) == 2


def test_a_trace_of_a_few_steps(data, whole, tmp_path, capsys):
    """The run is the same with it; one that ends before says so."""
    words = ["--config", f"{data / 'config.py'}:dropout", *(f"--config.{override}" for override in FULL)]
    words += ["--profile", str(tmp_path / "traces")]
    assert train.main([*words, "--workdir", str(tmp_path / "run")]) == 0
    assert f"profile: steps 6 to 10 are in {tmp_path / 'traces'}" in capsys.readouterr().err
    assert list((tmp_path / "traces").rglob("*.xplane.pb")) and list((tmp_path / "traces").rglob("perfetto_trace.json.gz"))
    equal(tmp_path / "run", whole)
    assert train.main([*words, "--workdir", str(tmp_path / "short"), "--config.train.steps=2"]) == 0
    assert "profile: nothing was traced, as training ended at step 5 or earlier" in capsys.readouterr().err
    words[-1] = str(data / "config.py")
    assert train.main([*words, "--workdir", str(tmp_path / "mistaken")]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("config.py: is a file; name a folder for the trace")


def test_a_run_killed_before_its_config_was_written_begins_again(run, refused, tmp_path):
    workdir = tmp_path / "run"
    assert run(workdir, "train.steps=1") == 0
    (workdir / "config.json").unlink()
    assert "does not contain a run" in refused(workdir)  # with checkpoints it is more than a beginning
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(workdir / name)
    for name in ("metrics.jsonl", "validation.json", "report.html"):
        (workdir / name).unlink()
    assert run(workdir, "train.steps=1") == 0


def test_a_finished_run_stays_as_it_is(whole, run, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    assert run(workdir, *FULL, arg="dropout") == 0
    equal(workdir, whole)


def test_a_damaged_checkpoint_is_passed_over(whole, run, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    victim = max((workdir / "checkpoints" / "10" / "params").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    assert run(workdir, *FULL, arg="dropout") == 0
    assert "damaged" in capsys.readouterr().err
    equal(workdir, whole)


def test_more_steps_continue_the_run(run, refused, whole, tmp_path):
    assert run(tmp_path / "a", *FULL, "train.steps=6", arg="dropout") == 0
    assert run(tmp_path / "a", *FULL, "train.steps=10", arg="dropout") == 0
    ours, theirs = items(tmp_path / "a"), items(whole)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["train"]["steps"] == 10
    assert "train.steps: 10 -> 6" in refused(tmp_path / "a", *FULL, "train.steps=6", arg="dropout")


def test_what_may_not_change(whole, refused, data, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    message = refused(workdir, *FULL, "optim.learning_rate=0.5", arg="dropout")
    assert "optim.learning_rate: 0.01 -> 0.5" in message and "--workdir" in message
    assert "other: no such folder or file" in refused(workdir, *FULL, f"data.tokenizer={data}/other", arg="dropout")
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before


def test_data_may_not_change(run, refused, data, tmp_path):
    file, workdir = tmp_path / "mine.txt", tmp_path / "run"
    shutil.copy(data / "train.txt", file)
    setting = (f"data.files.train={file}", "train.steps=1")
    assert run(workdir, *setting) == 0
    content = file.read_text()
    file.write_text(content.replace("cat", "dog", 1))
    assert "sha256" in refused(workdir, *setting)
    file.write_text(content)
    stored = workdir / "tokenizer" / "tokenizer.json"
    stored.write_text(stored.read_text().replace('"cat"', '"cab"'))
    assert "tokenizer: " in refused(workdir, *setting)


def test_one_process_a_folder(start, refused, tmp_path):
    workdir = tmp_path / "run"
    process = start(DRIVER.format(number=STOP, step=2, sealed=""), workdir, "train.steps=2")
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), process.communicate()
    assert "another process is training in it" in refused(workdir, "train.steps=2")
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def test_epochs_early_stopping_and_the_best_step(run, tmp_path, capsys):
    workdir = tmp_path / "run"
    patience = ("train.early_stopping.metric=accuracy", "train.early_stopping.mode=max", "train.early_stopping.patience=2")
    settings = ("train.steps=none", "train.epochs=6", "train.eval_every=3", "checkpoint.best=accuracy", "checkpoint.keep=1")
    frozen = ("optim.learning_rate=0.0", "train.log_every=10")
    assert run(workdir, *settings, *patience, *frozen, arg="classify") == 0
    assert "early stopping at step 9" in capsys.readouterr().err  # evaluations at 3, 6 and 9 are all alike
    reader = CheckpointReader(workdir / "checkpoints")
    assert reader.steps() == [3, 9]  # the best, first of equals, and the newest
    assert "accuracy" in reader.metrics(3)
    before = records(workdir)
    assert run(workdir, *settings, *patience, *frozen, arg="classify") == 0
    assert records(workdir) == before

    assert run(tmp_path / "epochs", "train.steps=none", "train.epochs=0.5", arg="classify") == 0
    assert records(tmp_path / "epochs")[-1]["step"] == 4  # half of 120 rows in batches of 16, rounded up


def test_a_loss_that_is_not_finite_ends_the_run(refused, tmp_path):
    message = refused(tmp_path / "run", "optim.learning_rate=1e30", "train.max_nonfinite=3", "train.steps=40")
    assert "3 consecutive steps, from step " in message and "optim.learning_rate" in message


def test_freezing(run, tmp_path):
    workdir = tmp_path / "run"
    frozen = 'optim.freeze=["^embed/", "^encoder/layers/"]'
    assert run(workdir, frozen, "train.steps=2", "checkpoint.every=1", arg="classify") == 0
    first, last = items(workdir, 1), items(workdir, 2)
    moved = {name for name in first if name.startswith("params/") and first[name].tobytes() != last[name].tobytes()}
    assert moved and all(name.startswith(("params/head", "params/encoder/pooler")) for name in moved)


@pytest.mark.parametrize("exported", [False, True])
def test_starting_from_other_weights(exported, whole, run, refused, tmp_path, capsys):
    origin = whole
    if exported:
        origin = tmp_path / "exported"
        assert convert.main(["--from", str(whole), "--to", str(origin)]) == 0
    capsys.readouterr()
    settings = (f"init.weights={origin}", "train.steps=1", "optim.learning_rate=0.0", "model.dropout=0.0")
    workdir = tmp_path / "run"
    assert run(workdir, *settings, arg="classify") == 0
    said = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("init.weights="))
    fresh, _, unused = said.partition("; not used ")
    assert "head/classify/kernel" in fresh and "embed/" not in fresh and "encoder/layers" not in fresh
    assert "head/mlm" in unused
    ours, theirs = items(workdir), items(whole)
    name = "params/embed/word/embedding"
    # A run that keeps a moving average hands that on.
    assert ours[name].tobytes() == theirs[name.replace("params", "ema")].tobytes()

    # Stopped before its first checkpoint, it starts from the same weights and not from random ones; also where an
    # older fmjax has stored the key by its old name.
    shutil.rmtree(workdir / "checkpoints")
    stored = json.loads((workdir / "config.json").read_text())
    for config in (stored, stored["fmjax"]["given"]):
        config["init"] = {"from": config["init"]["weights"]}
    (workdir / "config.json").write_text(json.dumps(stored))
    assert run(workdir, *(setting.replace("init.weights", "init.from") for setting in settings), arg="classify") == 0
    assert json.loads((workdir / "config.json").read_text())["init"] == {"weights": str(origin)}
    assert items(workdir)[name].tobytes() == ours[name].tobytes()

    # With a checkpoint it needs the weights no more, by the name that they had.
    if exported:
        moved = origin.rename(tmp_path / "moved")
        others = [setting.replace(str(origin), str(moved)) for setting in settings]
        said = refused(workdir, *others, arg="classify")
        assert f"use init.weights={origin} again, which need not exist any more, since the run continues from its" in said
        assert run(workdir, *settings, arg="classify") == 0


KINDS: dict[str, tuple[Callable[[str, str], dict[str, Any]], tuple[str, ...], str]] = {
    "pairs": (
        lambda text, label: {"a": text, "b": "the cat", "label": label},
        ("task.text=a", "task.text_pair=b", "data.max_length=32"),
        "accuracy",
    ),
    "numbers": (lambda text, label: {"text": text, "label": int(label == "person")}, (), "accuracy"),
    "regression": (lambda text, label: {"text": text, "label": 0.5 + len(text)}, ("task.kind=regression",), "pearson"),
    "multi": (
        lambda text, label: {"text": text, "label": [label] + ["old"] * ("old" in text)},
        ("task.kind=multi",),
        "f1_micro",
    ),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.full if kind == "numbers" else []) for kind in KINDS]
)
def test_kinds_of_classification(kind, run, data, tmp_path):
    make, settings, metric = KINDS[kind]
    rows = [line.split(",") for line in (data / "train.csv").read_text().splitlines()[1:]]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(make(*row)) + "\n" for row in rows))
    files = (f"data.files.train={file}", f"data.files.validation={file}", "train.steps=2")
    assert run(tmp_path / "run", *files, *settings, arg="classify") == 0
    final = records(tmp_path / "run")[-1]
    assert final["step"] == 2 and f"eval/validation/{metric}" in final, final


def test_a_classifier_is_continued_by_the_names_of_its_labels(classifier, data, tmp_path, capsys):
    folder = tmp_path / "exported"
    assert convert.main(["--from", str(classifier), "--to", str(folder)]) == 0
    settings = json.loads((folder / "config.json").read_text())
    assert settings["id2label"] == {"0": "animal", "1": "person"}
    names = {"id2label": {"0": "PERSON", "1": "ANIMAL"}}  # now the other way round, and in capitals
    (folder / "config.json").write_text(json.dumps(settings | names))
    config = load_config(f"{data / 'config.py'}:classify")
    config.init.weights = str(folder)
    config.model.width = 64  # of the file, which yields
    capsys.readouterr()
    experiment = prepare(to_dict(config), tmp_path / "run")
    stored = load_file(folder / "model.safetensors")
    head = experiment.weights["head"]["classify"]
    np.testing.assert_array_equal(head["bias"], stored["classifier.bias"][::-1])
    np.testing.assert_array_equal(head["kernel"], stored["classifier.weight"][::-1].T)
    said = capsys.readouterr().err
    assert "the run has animal, person, the weights PERSON, ANIMAL" in said
    assert experiment.config["model"]["width"] == 16 and "width=16 (not 64)" in said
