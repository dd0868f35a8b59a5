"""Denoisers: how many tokens are taken out, in how many spans, and where."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.tasks.denoisers import Denoiser, corrupt, denoiser, segments


@settings(max_examples=150, deadline=None)
@given(length=st.integers(2, 300), mean=st.floats(1, 70), density=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_spans_are_as_many_and_as_long_as_asked_for(length, mean, density, seed):
    each = Denoiser("R", mean, density)
    noise = each.draw(length, np.random.default_rng(seed))
    count, spans = each.counts(length)
    starts = noise & ~np.concatenate([[False], noise[:-1]])
    assert noise.size == length and noise.sum() == count and starts.sum() == spans
    assert not noise[0] and noise[-1]
    assert 1 <= count < length and abs(count - length * density) <= 1
    kept, taken = corrupt(np.arange(length), noise, -1 - np.arange(length))
    assert (kept.size, taken.size) == (length - count + spans, count + spans) == each.longest(length)
    assert (
        kept[kept >= 0].tolist() == np.flatnonzero(~noise).tolist()
        and taken[taken >= 0].tolist() == np.flatnonzero(noise).tolist()
    )


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 60), density=st.floats(0.05, 0.95), seed=st.integers(0, 99))
def test_a_sequential_denoiser_takes_out_the_end(length, density, seed):
    noise = Denoiser("S", 0.0, density).draw(length, np.random.default_rng(seed))
    assert not noise[0] and noise[-1] and np.all(np.diff(noise.astype(int)) >= 0)
    kept, taken = corrupt(np.arange(length), noise, np.array([-1]))
    longest = Denoiser("S", 0.0, density).longest(length)
    assert kept.size <= longest[0] and taken.size <= longest[1]


def test_a_sequential_denoiser_takes_out_its_share_on_average():
    each, rng = denoiser("S:0.25"), np.random.default_rng(0)
    assert np.mean([each.draw(80, rng).mean() for _ in range(2000)]) == pytest.approx(0.25, abs=0.01)


def test_segments_are_drawn_evenly():
    rng = np.random.default_rng(0)
    drawn = [tuple(segments(5, 3, rng)) for _ in range(3000)]
    assert {sum(parts) for parts in drawn} == {5} and min(map(min, drawn)) == 1
    counts = [drawn.count(parts) for parts in set(drawn)]
    assert len(counts) == 6 and max(counts) < 1.2 * min(counts)  # 4 over 2 ways
