"""Resampling of the classes of training data, at the level of indices: which examples an epoch consists of.

Class c of n_c examples is given m (n_c / m)^(1 - power) of them, m being the size of the largest class (oversample) or of the
smallest (undersample): with power 1 all classes are equally large, with power 0 nothing changes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fmjax.errors import UserError, nearest

KINDS = ("none", "oversample", "undersample")


def targets(counts: np.ndarray, kind: str, power: float) -> np.ndarray:
    """Returns how many examples of each class [C] an epoch has, at least one of a class that has any."""
    there = counts[counts > 0]
    most = there.max() if kind == "oversample" else there.min()
    wanted = most * (counts / most) ** (1 - power)
    return np.where(counts > 0, np.maximum(np.rint(wanted), 1), 0).astype(np.int64)


def indices(classes: np.ndarray, kind: str, power: float, seed: int) -> np.ndarray:
    """Returns the examples of an epoch, in order: each of a class as often as every other, but for a rest drawn by the seed."""
    counts = np.bincount(classes)
    rng = np.random.default_rng([seed, classes.size])
    chosen = []
    for number, wanted in enumerate(targets(counts, kind, power).tolist()):
        own = np.flatnonzero(classes == number)
        if wanted:
            whole, rest = divmod(wanted, own.size)
            chosen += [np.tile(own, whole), rng.permutation(own)[:rest]]
    return np.sort(np.concatenate(chosen))


class Resampled:
    """Examples of which some occur several times, or not at all."""

    def __init__(self, examples: Any, chosen: np.ndarray):
        self.examples, self.chosen = examples, chosen
        if getattr(examples, "lengths", None) is not None:  # for buckets
            self.lengths, self.sized = np.asarray(examples.lengths)[chosen], examples.sized

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[int(self.chosen[index])]

    def draw(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return self.examples.draw(example, rng)


def balance(examples: Any, kind: str, power: float, seed: int) -> Any:
    """Returns training examples resampled by their `classes` [N]; as they are, if the kind is "none".

    Raises UserError for an unknown kind, a power out of range, and examples that have not one class each.
    """
    if kind not in KINDS:
        raise UserError(f'data.balance="{kind}"{nearest(kind, KINDS)}: choose one of {", ".join(KINDS)}')
    if not 0 <= power <= 1:
        raise UserError(f"data.balance_power={power}: must be from 0 (as the classes are) to 1 (all equal)")
    if kind == "none":
        return examples
    classes = getattr(examples, "classes", None)
    if classes is None:
        raise UserError(f"data.balance={kind} needs examples of one class each, which this task's are not; choose none")
    return Resampled(examples, indices(np.asarray(classes), kind, power, seed))
