"""Text becomes a number by the grammar of JSON, not by Python's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fmjax.config.numbers import is_count, number_of, real, whole

PYTHONS = ("1_000", "١٢", "①", "²", "", " 1", "1 ", "0x10", "inf", "nan", "Infinity", "1e999", "--1", "1,5", "½", "１")


@pytest.mark.parametrize("text", PYTHONS)
def test_what_python_would_read_is_refused(text):
    for read in (whole, real):
        with pytest.raises(ValueError, match="number"):
            read(text)
    assert not is_count(text)


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("-3", -3), ("+3", 3), ("007", 7), ("9" * 30, int("9" * 30))])
def test_whole_numbers(text, number):
    assert whole(text) == number and real(text) == float(number)


@pytest.mark.parametrize("text", ["0.1", "1e-4", ".5", "5.", "-1.5E+3", "1"])
def test_numbers(text):
    assert real(text) == float(text) == number_of(f" {text}\t")


def test_values_that_are_numbers():
    assert (number_of(3), number_of(1.5), number_of(np.float32(0.5)), number_of(np.int64(7))) == (3, 1.5, 0.5, 7)
    for value in (True, None, b"1", math.nan, math.inf, [1], 10**400, "1_0"):
        with pytest.raises(ValueError, match="number"):
            number_of(value)
