"""What a user sees of a run: the lines on the screen, the report, and a dry run."""

from __future__ import annotations

import json
import re

from scripts import train


def test_a_dry_run_shows_a_batch_and_writes_nothing(data, tmp_path, capsys):
    words = ["--config", f"{data / 'config.py'}:classify", "--workdir", str(tmp_path / "run")]
    assert train.main([*words, "--config.train.seed=3", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert "train.seed = 3" in out and "task.labels = ('animal', 'person')" in out
    assert "input_ids: int32 [16, 16]" in out
    rows = re.findall(r"row \d: input_ids: \[CLS\] (.*) \[SEP\] \+ \d+ of padding\n +row \d: labels: (animal|person)", out)
    stored = (data / "train.csv").read_text().splitlines()
    assert len(rows) == 2 and all(",".join(row) in stored for row in rows)


def test_a_dry_run_of_pretraining_shows_what_is_to_be_predicted(data, tmp_path, capsys):
    words = ["--config", str(data / "config.py"), "--workdir", str(tmp_path / "run")]
    assert train.main([*words, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "row 1: input_ids: [CLS] " in out and "row 1: masked_labels: " in out


def test_the_screen_and_the_report_of_a_run(run, tmp_path, capsys):
    overrides = ("train.steps=6", "train.eval_every=3", "checkpoint.best=accuracy")
    assert run(tmp_path, *overrides, arg="classify") == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines.count("compiling the training step ...") == 1
    assert len([line for line in lines if re.match(r"step \d+ of 6: loss \d", line)]) <= 2  # seconds, not steps
    shown = [line for line in lines if " validation: " in line]
    number = r"\d+\.\d+"
    assert len(shown) == 2
    assert re.fullmatch(rf"step 3 validation: loss {number}, accuracy {number}, f1 {number}", shown[0])
    assert re.match(r"done: best step [36], validation loss .* report: .*report.html; next: ", lines[-1])
    assert f"--workdir {tmp_path}" in lines[-1] or f'load("{tmp_path}")' in lines[-1]

    stored = json.loads((tmp_path / "validation.json").read_text())
    assert stored["chosen_by"] == "accuracy" and stored["step"] in (3, 6)
    rows, matrix = stored["details"]["classes"], stored["details"]["confusion"]
    assert [row["label"] for row in rows] == ["animal", "person"]
    assert [sum(row) for row in matrix] == [row["count"] for row in rows] and sum(map(sum, matrix)) == 20
    right = sum(matrix[at][at] for at in range(2))
    assert right / 20 == stored["metrics"]["accuracy"]
    texts = (tmp_path / "report.html").read_text()
    for text in ("best step", "Confusion matrix", "Worst validation examples", stored["details"]["worst"][0]["text"]):
        assert text in texts


def test_a_dry_run_of_a_run_changes_nothing_in_it(data, classifier, capsys):
    before = {path: path.stat().st_mtime_ns for path in classifier.rglob("*") if path.name != ".lock"}
    overrides = ("train.steps=45", "train.eval_every=15", "checkpoint.best=accuracy")
    words = ["--config", f"{data / 'config.py'}:classify", "--workdir", str(classifier), "--dry-run"]
    assert train.main([*words, *(f"--config.{override}" for override in overrides)]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in classifier.rglob("*") if path.name != ".lock"}
