"""Grain's shuffling and random numbers, as functions of a seed and a position.

A stream of examples is one permutation per epoch, and a generator of random numbers per position.
Both are those of `grain.MapDataset.source(examples).seed(seed).shuffle().repeat().random_map(draw)`
(grain 0.2; `tests/data/stream/test_randomness.py` compares them), without the bookkeeping of its
pipelines, which takes more time than reading a row of tokens. So the order of training does not
change with the version of Grain.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import grain
import numpy as np

ENDLESS = sys.maxsize  # the length of an endless order
# The state of a generator that has drawn nothing, but for its counter and key.
FRESH = {
    "bit_generator": "Philox",
    "buffer": np.zeros(4, np.uint64),
    "buffer_pos": 4,
    "has_uint32": 0,
    "uinteger": 0,
}
ROUNDS = 4  # of Grain's permutation
# Grain derives the seed of an operation from that of the data set and the operations between them.
SHUFFLE, RANDOM_MAP, RANDOM_MAP_OF_SHUFFLED = 1, 1, 3


def derived(seed: int, depth: int) -> int:
    """Returns the seed of an operation."""
    return int(np.random.SeedSequence((seed, depth)).generate_state(1, np.uint32)[0])


class Shuffled:
    """Indices 0 to `count` - 1 in an endless order: a new permutation in each epoch."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, derived(seed, SHUFFLE)

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, at: int) -> int:
        epoch, place = divmod(at, self.count)
        seed = (self.seed + epoch) % 2**32
        last, shuffle = self.count - 1, grain.experimental.index_shuffle
        return int(shuffle(place, max_index=last, seed=seed, rounds=ROUNDS))


class Generators:
    """Random numbers for each position of a stream: Philox with the position as its counter (Salmon
    et al. 2011)."""

    def __init__(self, seed: int, shuffled: bool = False):
        self.seed = derived(seed, RANDOM_MAP_OF_SHUFFLED if shuffled else RANDOM_MAP)
        self.key = np.random.Philox(self.seed).state["state"]["key"]
        self.own = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, own=threading.local())

    def __getitem__(self, at: int) -> np.random.Generator:
        """Returns a generator that is valid until this thread asks for another: making a new one
        takes more than twice as long."""
        if "rng" not in vars(self.own):
            self.own.rng = np.random.Generator(np.random.Philox(self.seed))
        rng: np.random.Generator = self.own.rng
        place = {"counter": np.array([0, 0, 0, at], np.uint64), "key": self.key}
        rng.bit_generator.state = FRESH | {"state": place}
        return rng
