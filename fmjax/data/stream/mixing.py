"""Mixes several sources of training data into one stream in given proportions; the order is
computed arithmetically.

The section `data` names the sources and their shares, and how these change during training:

    mixture    = {"books": {"files": "books/*.txt", "weight": 0.7}, "wiki": {"files": {"train": ...,
    "validation": ...}}} temperature = 2.0                            # shares are weights ** (1 /
    temperature); weights default to sizes curriculum = {"1000": {"wiki": 3.0}}         # weights
    after step 1,000; those not named stay

A source's `epochs` limits how often it is read, `cap` how many of its examples are used in total;
once it is used up, the others take over its share. Each source has its own permutation for each of
its epochs. The order of the sources repeats a cycle in which example j of a source with c examples
is at (j + 1/2) / c, so that of the first n examples of a stream of k sources, n times a source's
share are from it, plus or minus at most (1 + k share) / 2.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fmjax.config.numbers import is_positive, number_of
from fmjax.contracts import Config, Example, Examples, Undrawn
from fmjax.data.stream.balance import Resampled
from fmjax.data.stream.randomness import ENDLESS, Shuffled
from fmjax.errors import UserError, in_range, nearest

CYCLE = 100_000  # length of the cycle, in which shares are exact
HELD = {"validation": "hold_out", "test": "hold_out_test"}  # keys without effect beside files
OWN = ("weight", "epochs", "cap")  # keys of a source of a mixture besides those of `data`


@dataclasses.dataclass(frozen=True)
class Share:
    """The settings of one source of a mixture: its weight (None: its size) and its limits (None: no
    limit)."""

    weight: float | None = None
    epochs: float | None = None
    cap: int | None = None


def parts_of(data: Config, keys: Sequence[str]) -> dict[str, Config]:
    """Returns the `data` section of each source of the mixture; empty if there is no mixture.

    `keys` are those of `data` that a source may set for itself. Raises UserError for another key,
    naming it.
    """
    parts = {}
    for name, settings in (data.get("mixture") or {}).items():
        if not isinstance(settings, Mapping):
            raise UserError(
                f"data.mixture.{name}={settings}: is not a group of keys; "
                f'write {{"files": ..., "weight": ...}}'
            )
        for key in settings:
            if key not in (*keys, *OWN):
                choices = (*OWN, *keys)
                raise UserError(
                    f"data.mixture.{name}.{key}{nearest(key, choices)}: no such key; choose from "
                    f"{', '.join(choices)}"
                )
        files = settings.get("files", {})
        own = {key: value for key, value in settings.items() if key not in OWN}
        given = [split for split in HELD if split in data["files"]]
        whole = {HELD[split]: None for split in given}
        since = own.get("hold_out_from") or data.get("hold_out_from") or ()
        fold = own.get("fold") or data.get("fold")
        for key, taken in (("fold", int(bool(fold))), ("hold_out_from", len(since))):
            if both := [split for split in list(HELD)[:taken] if split in given]:
                raise UserError(
                    f"data.{key} divides the training data, but data.files.{both[0]} is set too; "
                    "unset one of them"
                )
        # A source that is divided by its own times does not inherit a fraction of test data.
        by_time = {"hold_out_test": None} if own.get("hold_out_from") else {}
        parts[name] = (
            {**data, "mixture": {}}
            | whole
            | by_time
            | own
            | {"files": files if isinstance(files, Mapping) else {"train": files}}
        )
    if len(parts) == 1:
        raise UserError(
            f"data.mixture has only one source, {next(iter(parts))}; add another, or set "
            "data.files instead"
        )
    return parts


def shares(data: Config) -> dict[str, Share]:
    """Returns the settings of each source of a mixture.

    Raises UserError for settings that are not numbers, or out of range.
    """
    settings_of = {}
    for name, settings in data["mixture"].items():
        values = {
            key: number(f"data.mixture.{name}.{key}", settings[key])
            for key in OWN
            if settings.get(key) is not None
        }
        for key in ("epochs", "cap"):
            if not values.get(key, 1.0) > 0 or (key == "cap" and values.get(key, 1.0) % 1):
                raise UserError(
                    f"data.mixture.{name}.{key}={settings[key]}: must be above "
                    f"0{' and whole' * (key == 'cap')}"
                )
        cap = int(values["cap"]) if "cap" in values else None
        settings_of[name] = Share(values.get("weight"), values.get("epochs"), cap)
    weighted = [name for name, share in settings_of.items() if share.weight is not None]
    if weighted and len(weighted) < len(settings_of):
        missing = ", ".join(name for name in settings_of if name not in weighted)
        raise UserError(
            f"data.mixture: {missing} has no weight, but {weighted[0]} has one; give a weight to "
            "all sources, or to none (by size)"
        )
    return settings_of


def number(key: str, value: float | str) -> float:
    """Returns a number that a config has as a number or as text.

    Raises UserError if it is not a number, negative or infinite.
    """
    try:
        parsed = number_of(value)
    except ValueError:
        parsed = -1.0
    if parsed < 0:
        raise UserError(f"{key}={value}: must be a number, 0 or more")
    return parsed


def stages(data: Config, weights: Mapping[str, float]) -> list[tuple[int, dict[str, float]]]:
    """Returns (step, weights of all sources) of the curriculum, the first at step 0, temperature
    applied.

    Raises UserError for a malformed step, and for an unknown source.
    """
    temperature = number("data.temperature", data.get("temperature", 1.0))
    in_range(
        "data.temperature",
        temperature,
        above=0,
        hint="1 leaves the weights unchanged, more makes them more equal",
    )
    changed: dict[int, Mapping[str, float]] = {0: weights}
    for step, changes in (data.get("curriculum") or {}).items():
        if not is_positive(str(step)) or not isinstance(changes, Mapping):
            raise UserError(
                f'data.curriculum.{step}: write {{"STEP": {{"SOURCE": WEIGHT}}}}, with a step of 1 '
                "or more"
            )
        for name in changes:
            if name not in weights:
                raise UserError(
                    f"data.curriculum.{step}.{name}{nearest(name, weights)}: is not a source of "
                    f"data.mixture, which has {', '.join(weights)}"
                )
        if int(step) in changed:
            raise UserError(f"data.curriculum.{step}: step {int(step)} occurs twice; remove one")
        changed[int(step)] = {
            name: number(f"data.curriculum.{step}.{name}", weight)
            for name, weight in changes.items()
        }
    curriculum, present = [], dict(weights)
    for step in sorted(changed):
        present = {**present, **changed[step]}
        if not any(present.values()):
            raise UserError(f"data.mixture: all weights are 0 from step {step} on; raise one")
        largest = max(present.values())
        curriculum.append(
            (
                step,
                {name: (weight / largest) ** (1 / temperature) for name, weight in present.items()},
            )
        )
    return curriculum


class Segment(NamedTuple):
    """A part of the stream with constant shares."""

    begin: int  # the number of its first example
    before: np.ndarray  # [sources]: number of examples of each before it
    order: np.ndarray  # [cycle]: the source at each place
    ranks: np.ndarray  # [cycle]: number of the same source before it in the cycle
    counts: np.ndarray  # [sources]: number of each in a cycle

    def used(self, at: int) -> np.ndarray:
        """Returns [sources]: the number of examples of each before position `at` of the stream."""
        cycles, place = divmod(at - self.begin, len(self.order))
        return np.asarray(
            self.before
            + cycles * self.counts
            + np.bincount(self.order[:place], minlength=len(self.counts))
        )

    def end_of(self, source: int, limit: int) -> int:
        """Returns the position right after the one where a source has been used `limit` times."""
        cycles, rank = divmod(limit - int(self.before[source]) - 1, int(self.counts[source]))
        places = np.flatnonzero(self.order == source)
        return self.begin + cycles * len(self.order) + int(places[rank]) + 1


def cycle_of(
    weights: np.ndarray, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the order, ranks and counts of a cycle with shares `weights` [sources].

    Raises UserError for a share above 0 that is too small for a place in a cycle.
    """
    exact = weights / weights.sum() * CYCLE
    counts = np.floor(exact + 1e-6).astype(np.int64)
    rest = CYCLE - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:rest]] += 1
    for name, weight, count in zip(names, weights, counts, strict=True):
        if weight > 0 and not count:
            raise UserError(
                f"data.mixture.{name}: its share is below 1 of {CYCLE:,}; "
                "raise its weight or data.temperature"
            )
    counts //= np.gcd.reduce(counts)
    source = np.repeat(np.arange(counts.size), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    order = np.argsort((rank + 0.5) / counts[source], kind="stable")
    return source[order].astype(np.uint16), rank[order].astype(np.int32), counts


class Schedule:
    """The source at each position of the stream, and the number of its examples before.

    Args:
      limits: the maximum number of examples of each source; ENDLESS means no limit.
      stages: (step, weights), the first at step 0.
      batch_size: examples per step.
    """

    def __init__(
        self,
        limits: Mapping[str, int],
        stages: Sequence[tuple[int, Mapping[str, float]]],
        batch_size: int,
    ):
        self.names = list(limits)
        most = np.array([limits[name] for name in self.names], np.int64)
        self.segments: list[Segment] = []
        self.begins: list[int] = []
        self.total = 0
        begin, used = 0, np.zeros(len(most), np.int64)
        borders = [step * batch_size for step, _ in stages[1:]] + [ENDLESS]
        for (_, weights), border in zip(stages, borders, strict=True):
            wanted = np.array([weights[name] for name in self.names])
            while begin < border:
                present = np.where(used < most, wanted, 0)
                if not present.any():
                    return  # used up
                segment = Segment(begin, used, *cycle_of(present, self.names))
                limited = [i for i in np.flatnonzero(present).tolist() if most[i] < ENDLESS]
                end = min([border, *(segment.end_of(i, int(most[i])) for i in limited)])
                self.segments.append(segment)
                self.begins.append(begin)
                self.total = begin = end
                if end < ENDLESS:
                    used = segment.used(end)

    def __getitem__(self, at: int) -> tuple[int, int]:
        """Returns the index of the source at a position of the stream, and the number of its
        examples before."""
        if not 0 <= at < self.total:
            raise IndexError(at)
        segment = self.segments[bisect.bisect_right(self.begins, at) - 1]
        cycles, place = divmod(at - segment.begin, len(segment.order))
        source = int(segment.order[place])
        return source, int(segment.before[source]) + cycles * int(segment.counts[source]) + int(
            segment.ranks[place]
        )


class MixtureOrder:
    """The indices of the examples of a mixture in the order of its stream, computed on demand."""

    def __init__(self, schedule: Schedule, sizes: Sequence[int], seed: int):
        self.schedule, self.offsets = schedule, np.cumsum([0, *sizes]).tolist()
        seeds = np.random.SeedSequence(seed).generate_state(len(sizes))
        self.own = [Shuffled(size, int(own)) for size, own in zip(sizes, seeds, strict=True)]

    def __len__(self) -> int:
        return self.schedule.total

    def __getitem__(self, at: int) -> int:
        source, count = self.schedule[at]
        return int(self.offsets[source]) + self.own[source][count]


class MixedExamples(Examples):
    """The concatenated training examples of several sources; `order` mixes them in training.

    Args:
      parts: the examples of each source, by name.
      data: the config's `data` section, which has the shares.
      seed: chooses the examples of a source with a `cap`.

    Raises UserError for settings that do not fit the data.
    """

    def __init__(self, parts: Mapping[str, Examples], data: Config, seed: int):
        wanted = shares(data)
        for index, (name, share) in enumerate(wanted.items()):
            size = len(parts[name])
            if not size:
                raise UserError(f"data.mixture.{name}: has no examples; add data, or leave it out")
            if share.cap is not None and share.cap < size:
                chosen = np.random.default_rng([seed, index]).permutation(size)[: share.cap]
                parts = {**parts, name: Resampled(parts[name], np.sort(chosen))}
        self.parts: dict[str, Examples] = {name: parts[name] for name in wanted}
        self.sizes = [len(part) for part in self.parts.values()]
        self.begins = np.cumsum([0, *self.sizes])[:-1].tolist()
        weights = {
            name: float(size) if share.weight is None else share.weight
            for (name, share), size in zip(wanted.items(), self.sizes, strict=True)
        }
        limits = {
            name: ENDLESS if share.epochs is None else max(int(share.epochs * size), 1)
            for (name, share), size in zip(wanted.items(), self.sizes, strict=True)
        }
        self.schedule = Schedule(limits, stages(data, weights), int(data["batch_size"]))

    def __len__(self) -> int:
        return sum(self.sizes)

    def find(self, index: int) -> tuple[str, int]:
        """Returns the source of an example, and its index there."""
        part = bisect.bisect_right(self.begins, index) - 1
        return list(self.parts)[part], index - self.begins[part]

    def __getitem__(self, index: int) -> tuple[str, Undrawn]:
        name, own = self.find(index)
        return name, self.parts[name][own]

    def draw(self, example: tuple[str, Undrawn], rng: np.random.Generator) -> Example:
        name, own = example
        return self.parts[name].draw(own, rng)

    def where(self, index: int) -> str:
        name, own = self.find(index)
        return f"{name}: {self.parts[name].where(own)}"

    def order(self, seed: int) -> MixtureOrder:
        """Returns the numbers of the examples in the order of training."""
        return MixtureOrder(self.schedule, self.sizes, seed)

    def check_steps(self, steps: int, batch_size: int) -> None:
        """Raises UserError if the sources do not suffice for this number of steps."""
        if steps * batch_size > self.schedule.total:
            raise UserError(
                f"the epochs of data.mixture end after {self.schedule.total:,} examples, but "
                f"{steps:,} steps of {batch_size} need {steps * batch_size:,}; "
                "raise data.mixture.*.epochs, or lower train.steps"
            )

    def describe(self) -> str:
        """Returns one line about the sources and their initial shares."""
        first = self.schedule.segments[0]
        parts = zip(self.parts, self.sizes, first.counts / first.counts.sum(), strict=True)
        return "data.mixture: " + ", ".join(
            f"{name} {share:.1%} of {size:,} examples" for name, size, share in parts
        )
