"""Denoisers: how much of a text is taken out, and in spans of which length.

UL2: Tay et al. 2022, arXiv:2205.05131, table 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fmjax.config.numbers import number_of
from fmjax.errors import UserError


class Denoiser(NamedTuple):
    """How much of a row is taken out, in spans of which mean length; of mode S, its end alone
    (prefix language modelling).
    """

    mode: str
    mean_span: float  # 0: one span, at the end
    density: float

    def counts(self, length: int) -> tuple[int, int]:
        """Returns the number of corrupted tokens among `length`, and of spans; on average for mode
        S.
        """
        noise = min(max(round(length * self.density), 1), length - 1)
        spans = max(round(noise / self.mean_span), 1) if self.mean_span else 1
        return noise, min(spans, noise, length - noise)

    def longest(self, length: int) -> tuple[int, int]:
        """Returns the largest lengths of input and target of `length` tokens, without special
        tokens.
        """
        noise, spans = self.counts(length)
        if self.mean_span:
            return length - noise + spans, noise + spans
        return length, min(2 * noise - 1, length - 1) + 1

    def draw(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Returns bool [length]: which tokens are taken out."""
        noise, spans = self.counts(length)
        if not self.mean_span:  # any number with that mean
            return np.arange(length) >= length - rng.integers(1, min(2 * noise, length))
        kept, taken = segments(length - noise, spans, rng), segments(noise, spans, rng)
        return np.repeat(np.tile([False, True], spans), np.stack([kept, taken], axis=1).reshape(-1))


def segments(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Returns [parts] positive numbers that add up to `total`, each such sequence as likely."""
    ends = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(ends, prepend=0, append=total)


def denoiser(written: str) -> Denoiser:
    """Returns the denoiser of "MODE:MEAN_SPAN:DENSITY", or of "S:DENSITY". Raises UserError if that
    is neither.
    """
    mode, *numbers = written.split(":")
    try:
        values = [number_of(number) for number in numbers]
    except ValueError:
        values = []
    found = (
        Denoiser(mode, values[0] if len(values) == 2 else 0.0, values[-1])
        if values
        else Denoiser("", 0.0, 0.0)
    )
    right = 0 < found.density < 1 and len(values) == (1 if mode == "S" else 2)
    if (
        mode not in ("R", "X", "S")
        or not right
        or not (mode == "S" or 1 <= found.mean_span < math.inf)
    ):
        raise UserError(
            f'task.denoisers: "{written}" is not a denoiser; write R or X with the mean length of '
            'spans and the share of tokens, such as R:3:0.15, or "S:0.25" for the end of a row'
        )
    return found


def corrupt(ids: np.ndarray, noise: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the remaining tokens with a sentinel for each span of noise, and the spans, each
    after its sentinel.
    """
    first = noise & ~np.concatenate([[False], noise[:-1]])
    marked = np.where(first, marks[np.maximum(np.cumsum(first) - 1, 0)], ids)
    kept = marked[~noise | first]
    return kept, np.insert(ids[noise], np.flatnonzero(first[noise]), marked[first])
