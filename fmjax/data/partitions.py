"""Divides the records of one source into training, validation and test data: at random, by time,
by the last records of each group, or in folds.

All are functions of the records' groups and times, so they are the same in every process. Records
with the same time keep their order in the source.
"""

from __future__ import annotations

import dataclasses
import heapq
import re
from typing import Self

import numpy as np

from fmjax.contracts import Config, Record, Source, Value
from fmjax.data.groups import bounds_of, group_numbers, reader_of, times_of
from fmjax.data.records import scrambled
from fmjax.errors import UserError

TRAIN, VALIDATION, TEST = range(3)
SPLITS = ("train", "validation", "test")
# The keys of the `data` section that divide a source.
KEYS = ("hold_out", "hold_out_test", "hold_out_by", "hold_out_from", "time", "fold", "group_by")


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a source is divided; see `meanings.py` for the keys. Zero and empty mean unset."""

    hold_out: float = 0.0
    hold_out_test: float = 0.0
    hold_out_by: str = ""
    hold_out_from: tuple[str, ...] = ()
    time: str = ""
    fold: str = ""
    group_by: str = ""

    @classmethod
    def of(cls, data: Config) -> Self:
        """Returns the rules of a `data` section. A split that has files is not held out.

        Raises UserError for rules that contradict each other.
        """
        rules = cls(**{name: data[name] for name in KEYS if data.get(name)})
        files = data["files"]
        chosen = "hold_out_from" if rules.hold_out_from else "fold" if rules.fold else ""
        taken = SPLITS[1:][: max(len(rules.hold_out_from), 1)] if chosen else ()
        given = [split for split in taken if split in files and "train" in files]
        if given:
            raise UserError(
                f"data.{chosen} divides the training data, but data.files.{given[0]} is set too; "
                "unset one of them"
            )
        rules.check()
        by_fraction = not rules.hold_out_from
        validate = by_fraction and not rules.fold and "validation" not in files
        test = by_fraction and "test" not in files
        rules = dataclasses.replace(
            rules,
            hold_out=rules.hold_out if validate else 0.0,
            hold_out_test=rules.hold_out_test if test else 0.0,
        )
        return rules

    def check(self) -> None:
        """Raises UserError for rules that contradict each other or have no effect."""
        if self.hold_out_from and not self.time:
            raise UserError("data.hold_out_from needs the column of the times; set data.time")
        if self.hold_out_from and self.fold:
            raise UserError(
                "data.hold_out_from and data.fold both choose the validation data; unset one"
            )
        if self.hold_out_from and self.hold_out_by:
            raise UserError(
                "data.hold_out_from divides by time alone, which leaves the records of a value of "
                f"data.hold_out_by={self.hold_out_by} in several splits; unset one"
            )
        for name, count in (("hold_out", self.hold_out), ("hold_out_test", self.hold_out_test)):
            if count >= 1 and (not self.time or self.fold or count != round(count)):
                raise UserError(
                    f"data.{name}={count:g}: must be a fraction between 0 and 1, or with data.time "
                    "a whole number of last records; correct it"
                )
        divides = self.hold_out or self.hold_out_test or self.hold_out_from
        if self.time and not self.group_by and (self.fold or not divides):
            other = "data.fold divides at random" if self.fold else "nothing divides the data"
            raise UserError(
                f"data.time={self.time} has no effect, since {other}; set data.hold_out or "
                "data.hold_out_from instead, or unset data.time"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that exist besides the training data."""
        validation = self.hold_out or self.hold_out_from or self.fold
        test = self.hold_out_test or len(self.hold_out_from) > 1
        return ("validation",) * bool(validation) + ("test",) * bool(test)

    @property
    def mixes_times(self) -> bool:
        """Whether records of a group are held out at random, so that some of those that stay in
        the training data may be later ones."""
        at_random = bool(self.fold or not self.time) and not self.hold_out_from
        return bool(self.group_by and self.splits and at_random) and (
            self.hold_out_by != self.group_by
        )

    @property
    def mark(self) -> Record:
        """The rules that are set, for fingerprints."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which records belong to which split.

    Attributes:
      parts: the split of each record [N], a number of SPLITS.
      groups: the group of each record by `group_by` [N]; None if it is unset.
      times: the time of each record [N]; None if `time` is unset.
    """

    parts: np.ndarray
    groups: np.ndarray | None
    times: np.ndarray | None


def divide(source: Source, rules: Rules) -> Partition:
    """Returns the split of every record.

    Raises UserError for missing columns, bad times, and if a split would have no records.
    """
    times = times_of(source, rules.time) if rules.time else None
    by = {
        name: group_numbers(source, name, required=bool(rules.fold or rules.group_by or rules.time))
        for name in dict.fromkeys((rules.hold_out_by, rules.group_by))
        if name
    }
    groups = by.get(rules.hold_out_by)
    count = len(source)
    if rules.hold_out_from:
        assert times is not None
        parts = by_time(times, times_from(source, rules))
    elif times is not None and not rules.fold and groups is not None:
        parts = last_of_groups(groups, times, rules.hold_out, rules.hold_out_test)
    elif times is not None and not rules.fold:
        order = np.argsort(times, kind="stable")
        parts = in_order(order[::-1], rules.hold_out_test, rules.hold_out, (TEST, VALIDATION))
    else:
        own = np.arange(count) if groups is None else groups
        total = int(own.max()) + 1
        order = np.argsort(scrambled(total), kind="stable")
        shares = (rules.hold_out, rules.hold_out_test)
        of_groups = in_order(order, *shares, (VALIDATION, TEST))
        parts = of_groups[own]
        if rules.fold:
            index, folds = fold_of(rules.fold)
            rest = np.flatnonzero(parts == TRAIN)
            parts[rest[folds_of(own[rest], folds, rules) == index]] = VALIDATION
    check_parts(parts, rules)
    return Partition(parts.astype(np.uint8), by.get(rules.group_by), times)


def in_order(order: np.ndarray, first: float, second: float, names: tuple[int, int]) -> np.ndarray:
    """Returns the split of each item [N]: the first ones in `order` belong to the split names[0],
    the next ones to names[1]. Amounts below 1 are fractions of all, rounded."""
    parts = np.zeros(len(order), np.uint8)
    begin = 0
    for name, amount in zip(names, (first, second), strict=True):
        size = int(amount) if amount >= 1 else round(amount * len(order))
        parts[order[begin : begin + size]] = name
        begin += size
    return parts


def last_of_groups(
    groups: np.ndarray, times: np.ndarray, hold_out: float, hold_out_test: float
) -> np.ndarray:
    """Returns the split of each record [N]: the last ones of each group are test data, those
    before them validation data. Amounts below 1 are fractions of a group, rounded down, but for
    errors of floating-point numbers: 0.29 of 100 are 29.

    The first record of a group is always training data: a group with fewer than three records has
    none of them in validation, and one with a single record is only in training.
    """
    order = np.lexsort((times, groups))
    bounds = bounds_of(groups[order])
    sizes = np.diff(bounds)
    taken = [
        np.full(len(sizes), int(amount))
        if amount >= 1
        else np.floor(amount * sizes + 1e-9).astype(np.int64)
        for amount in (hold_out_test, hold_out)
    ]
    test = np.minimum(taken[0], sizes - 1)
    validation = np.minimum(taken[1], sizes - 1 - test)
    left = np.repeat(bounds[1:], sizes) - np.arange(len(order))  # 1 for the last of a group
    of_test, of_validation = np.repeat(test, sizes), np.repeat(validation, sizes)
    parts = np.zeros(len(order), np.uint8)
    parts[order[left <= of_test + of_validation]] = VALIDATION
    parts[order[left <= of_test]] = TEST
    return parts


def by_time(times: np.ndarray, since: list[int | float]) -> np.ndarray:
    """Returns the split of each record [N]: validation data begin at the first time, test data at
    the second, if there is one."""
    return np.searchsorted(np.array(since), times, side="right")


def times_from(source: Source, rules: Rules) -> list[int | float]:
    """Returns the times of `hold_out_from`. Raises UserError if they are not like the data's."""
    how, read = reader_of(source.value(0, rules.time))
    found: list[int | float] = []
    for written in rules.hold_out_from:
        try:
            found.append(read(written))
        except (ValueError, TypeError, OverflowError):
            raise UserError(
                f"data.hold_out_from={written}: must be {how}, as in the column "
                f'"{rules.time}"; correct it'
            ) from None
    if len(found) > 2 or sorted(set(found)) != found:
        raise UserError(
            f"data.hold_out_from={','.join(map(str, rules.hold_out_from))}: name the time at which "
            "the validation data begin, and then, if wanted, a later one for the test data"
        )
    return found


def fold_of(written: Value) -> tuple[int, int]:
    """Returns the number of a fold, from 0, and the number of folds, written as "0/5".

    Raises UserError if it is written in another way.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", str(written))
    index, folds = (int(match[1]), int(match[2])) if match else (0, 0)
    if not match or folds < 2 or index >= folds:
        raise UserError(
            f'data.fold="{written}": write FOLD/FOLDS, such as 0/5 to 4/5 for five folds; the fold '
            "is the validation data"
        )
    return index, folds


def folds_of(groups: np.ndarray, folds: int, rules: Rules) -> np.ndarray:
    """Returns the fold of each record [N]; all records of a group are in one fold.

    The largest group goes first, each to the fold with the fewest records, as in scikit-learn's
    GroupKFold; hashes order groups of the same size. Raises UserError if there are fewer groups
    than folds.
    """
    there, own, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(there) < folds:
        what = f"values of {rules.hold_out_by}" if rules.hold_out_by else "records"
        raise UserError(
            f"data.fold={rules.fold}: {folds} folds of {len(there)} {what} leave some empty; "
            "use fewer folds, or add data"
        )
    order = np.lexsort((scrambled(len(there)), -sizes))
    chosen = np.empty(len(there), np.int64)
    if sizes.max() == 1:
        chosen[order] = np.arange(len(order)) % folds
        return chosen[own]
    loads = [(0, fold) for fold in range(folds)]
    for group in order.tolist():
        load, fold = heapq.heappop(loads)
        chosen[group] = fold
        heapq.heappush(loads, (load + int(sizes[group]), fold))
    return chosen[own]


def check_parts(parts: np.ndarray, rules: Rules) -> None:
    """Raises UserError if a split has no records."""
    counts = np.bincount(parts, minlength=len(SPLITS))
    for split in ("train", *rules.splits):
        if not counts[SPLITS.index(split)]:
            written = ", ".join(
                f"data.{name}={','.join(value) if isinstance(value, list | tuple) else value}"
                for name, value in rules.mark.items()
            )
            raise UserError(
                f"{written}: leaves no {split} data among {len(parts):,} records; "
                "choose other values, or add data"
            )
