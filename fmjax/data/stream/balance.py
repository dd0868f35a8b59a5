"""Resamples the classes of training data by choosing the examples of an epoch.

A class with n examples gets m (n / m)^(1 - power) examples, where m is the size of the largest
class (oversample) or of the smallest one (undersample). With power 1 all classes become equally
large; with power 0 nothing changes.
"""

from __future__ import annotations

import numpy as np

from fmjax.contracts import Example, Examples, Undrawn
from fmjax.data.records import smallest
from fmjax.errors import UserError, in_range, one_of

KINDS = ("none", "oversample", "undersample")


def targets(counts: np.ndarray, kind: str, power: float) -> np.ndarray:
    """Returns how many examples of each class [C] an epoch has: 0 only if the class has none."""
    there = counts[counts > 0]
    most = there.max() if kind == "oversample" else there.min()
    wanted = most * (counts / most) ** (1 - power)
    return np.where(counts > 0, np.maximum(np.rint(wanted), 1), 0).astype(np.int64)


def indices(classes: np.ndarray, kind: str, power: float, seed: int) -> np.ndarray:
    """Returns the examples of an epoch, in order. Those of a class occur equally often, except for
    a remainder that the seed determines."""
    counts = np.bincount(classes)
    rng = np.random.default_rng([seed, classes.size])
    chosen = []
    for number, wanted in enumerate(targets(counts, kind, power).tolist()):
        own = np.flatnonzero(classes == number)
        if wanted:
            whole, rest = divmod(wanted, own.size)
            chosen += [np.tile(own, whole), rng.permutation(own)[:rest]]
    return np.sort(np.concatenate(chosen))


class Resampled(Examples):
    """Examples, some of which occur several times or not at all."""

    def __init__(self, examples: Examples, chosen: np.ndarray):
        self.examples, self.chosen = examples, smallest(chosen)
        if examples.lengths is not None:  # for buckets
            self.lengths, self.sized = np.asarray(examples.lengths)[chosen], examples.sized

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Undrawn:
        return self.examples[int(self.chosen[index])]

    def draw(self, example: Undrawn, rng: np.random.Generator) -> Example:
        return self.examples.draw(example, rng)

    def drawn(self, indices: np.ndarray) -> Example | None:
        return self.examples.drawn(self.chosen[indices].astype(np.int64))

    def where(self, index: int) -> str:
        return self.examples.where(int(self.chosen[index]))


def balance(examples: Examples, kind: str, power: float, seed: int) -> Examples:
    """Returns training examples resampled by their `classes` [N]; unchanged if the kind is "none".

    Raises UserError for an unknown kind, a power out of range, and examples that do not have one
    class each.
    """
    one_of("data.balance", kind, KINDS)
    in_range(
        "data.balance_power",
        power,
        least=0,
        most=1,
        hint="0 changes nothing, 1 makes the classes equal",
    )
    if kind == "none":
        return examples
    if examples.classes is None:
        raise UserError(
            f"data.balance={kind} needs a task whose examples have one class each; set it to none"
        )
    return Resampled(examples, indices(np.asarray(examples.classes), kind, power, seed))
