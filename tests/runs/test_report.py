"""The report says what the run's files say, escaped, whatever is in them."""

from __future__ import annotations

import itertools
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmjax.runs import report

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


def page(records, provenance):
    return Elements(report.render(CONFIG, provenance, records, "run<1>"))


def test_what_stands_on_the_page():
    records = [{"step": step, "loss": 5.0 - step, "nonfinite_steps": 1} for step in (1, 2, 3)]
    found = page([*records, {"step": 3, "eval/validation/loss": 2.5, "eval/validation/accuracy": 0.25}], PROVENANCE)
    for text in ("bert, mlm: run<1>", "3 steps, 1 of them left out: loss or gradient not finite", "<b>", "train.py a&b", "0.25",
                 "train.sha256", "ab", "unset", "commit unknown", "loss", "accuracy", "training", "validation"):  # fmt: skip
        assert any(text in said for said in found.texts), text
    # Training and validation loss share a figure, and accuracy has its own; all within the picture.
    assert [len(curve) for curve in found.curves] == [3, 1, 1]
    assert all(0 <= x <= report.WIDTH and 0 <= y <= report.HEIGHT for curve in found.curves for x, y in curve)
    falling = found.curves[0]
    assert falling == sorted(falling)  # later is further right; a lower loss is further down


def test_a_run_without_metrics_has_a_page():
    assert any("0 steps" in text for text in page([], {}).texts)


def test_long_curves_are_averaged():
    points = [(step, float(step % 2)) for step in range(1, 3001)]
    drawn = report.thinned(points)
    assert len(drawn) == report.POINTS and {value for _, value in drawn} == {0.5} and drawn[-1][0] == 3000


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_enclose_the_range(low, span):
    found = report.ticks(low, low + span)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert 2 <= len(found) <= 8 and gaps == pytest.approx([gaps[0]] * len(gaps), rel=1e-3) and gaps[0] > 0
    assert found[0] <= low + 1e-6 * gaps[0] and found[-1] >= low + span - 1e-6 * gaps[0]
