"""The report says what the run's files say, escaped, whatever is in them."""

from __future__ import annotations

import itertools
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.runs import figures, outcome, report
from fmjax.runs.evaluation import Evaluation

CONFIG = {
    "model": {"name": "bert", "width": 8},
    "task": {"name": "mlm", "column": "<b>"},
    "fmjax": {"given": {}},
    "init": {"from": None},
}
VERSIONS = {"python": "3", "versions": {"jax": "1"}, "commit": "", "devices": "1 x cpu"}
PROVENANCE = {"starts": [{"time": "now", "command": ["train.py", "a&b"]} | VERSIONS], "data": {"train": {"sha256": "ab"}}}


class Elements(HTMLParser):
    """Checks that every element is closed, and notes texts and the points of curves."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.curves: list[list[tuple[float, float]]] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        assert tag not in ("script", "link", "img", "b")
        if tag == "polyline":
            self.curves.append([tuple(map(float, point.split(","))) for point in dict(attrs)["points"].split()])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page(records, provenance, evaluation=None):
    return Elements(report.render(CONFIG, provenance, records, "run<1>", evaluation))


def evaluation(classes: int = 2) -> Evaluation:
    """An evaluation of so many classes; of the first one, three are right and one is taken for the second."""
    names = [f"<class {number}>" for number in range(classes)]
    table = [{"label": name, "count": 4, "precision": 0.5, "recall": 0.75, "f1": 0.6} for name in names]
    confusion = [[0] * classes for _ in names]
    confusion[0][:2] = [3, 1]
    worst = [{"example": 7, "text": "a <b> text", "label": names[0], "predicted": names[1], "loss": 9.5}]
    details = {"classes": table, "confusion": confusion, "worst": worst}
    return Evaluation(1200, {"loss": 0.5, "accuracy": 0.875, "mcc": 0.1}, ("accuracy",), "accuracy", details)


def test_what_stands_on_the_page():
    records = [{"step": step, "loss": 5.0 - step, "nonfinite_steps": 1} for step in (1, 2, 3)]
    found = page([*records, {"step": 3, "eval/validation/loss": 2.5, "eval/validation/accuracy": 0.25}], PROVENANCE)
    for text in ("bert, mlm: run<1>", "3 steps, 1 of them skipped because loss or gradient was not finite", "<b>", "train.py a&b",
                 "0.25", "train.sha256", "ab", "unset", "commit unknown", "loss", "accuracy", "training",
                 "validation"):  # fmt: skip
        assert any(text in said for said in found.texts), text
    # Training and validation loss share a figure, and accuracy has its own; all within the picture.
    assert [len(curve) for curve in found.curves] == [3, 1, 1]
    assert all(0 <= x <= figures.WIDTH and 0 <= y <= figures.HEIGHT for curve in found.curves for x, y in curve)
    falling = found.curves[0]
    assert falling == sorted(falling)  # later is further right; a lower loss is further down


def test_a_run_without_metrics_has_a_page():
    assert any("0 steps" in text for text in page([], {}).texts)


def test_long_curves_are_averaged():
    points = [(step, float(step % 2)) for step in range(1, 3001)]
    drawn = figures.thinned(points)
    assert len(drawn) == figures.POINTS and {value for _, value in drawn} == {0.5} and drawn[-1][0] == 3000


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_the_range(low, span):
    found = figures.ticks(low, low + span)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert 2 <= len(found) <= 8 and gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3) and gaps[0] > 0
    assert found[0] <= low + 1e-6 * gaps[0] and found[-1] >= low + span - 1e-6 * gaps[0]


def test_the_headline():
    provenance = {"starts": [VERSION | {"seconds": 90.0} for VERSION in PROVENANCE["starts"] * 2], "examples": {"train": 3000}}
    found = page([], provenance, evaluation())
    at = {name: found.texts.index(name) for name in ("best step", "validation accuracy", "validation loss", "training time",
                                                      "train examples")}  # fmt: skip
    shown = {name: found.texts[place + 1] for name, place in at.items()}
    assert shown == {
        "best step": "1,200",
        "validation accuracy": "0.8750",
        "validation loss": "0.5000",
        "training time": "3 min",
        "train examples": "3,000",
    }
    assert "validation mcc" not in found.texts  # the rest is in the table of evaluations


def test_classes_confusions_and_the_worst_examples():
    found = page([], {}, evaluation())
    for text in ("Classes at step 1,200, validation", "<class 0>", "0.750", "Confusion matrix", "Worst validation examples",
                 "a <b> text", "9.500"):  # fmt: skip
        assert text in found.texts, text


def test_answers_and_translations_are_shown_with_what_was_expected():
    worst = [{"example": 1200, "question": "who <b>?", "expected": "a", "predicted": "b", "f1": 0.0, "loss": 1.5}]
    samples = [{"example": 1, "source": "a house", "reference": "ein Haus", "output": "Haus"}]
    found = page([], {}, evaluation()._replace(details={"worst": worst, "samples": samples})).texts
    for text in ("question", "1,200", "who <b>?", "expected", "1.500", "Validation samples", "ein Haus", "output", "Haus"):
        assert text in found, text
    assert found.index("Worst validation examples") < found.index("Validation samples")


def test_of_many_classes_the_weakest_and_the_most_frequent_confusions_are_listed():
    found = page([], {}, evaluation(outcome.MOST_CLASSES + 1))
    assert "Confusion matrix" not in found.texts and "Most frequent confusions" in found.texts
    at = found.texts.index("Most frequent confusions")
    assert [text for text in found.texts[at + 1 :] if text.strip()][3:6] == ["<class 0>", "<class 1>", "1"]
    assert f"The {outcome.MOST_CLASSES} of {outcome.MOST_CLASSES + 1} classes with the lowest F1:" in found.texts


def test_the_page_fits_a_phone_and_loads_nothing():
    text = report.render(CONFIG, PROVENANCE, [], "run", evaluation())
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert text.count("<table") == text.count('<div class="wide"><table')  # wide tables scroll on their own


def test_the_facts_of_the_start_and_their_warnings():
    facts = {
        "labels": {"text": "2: ham, spam", "counts": [5, 1]},
        "unknown": {"text": "78 % of the tokens", "warning": "another tokenizer <fits>"},
    }
    found = page([], {"facts": facts, "fill": {"input_ids": 0.5}})
    for text in ("labels", "2: ham, spam", "78 % of the tokens", "another tokenizer <fits>"):
        assert text in found.texts
    assert not any("no padding" in text for text in found.texts)  # a fact says so
