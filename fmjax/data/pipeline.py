"""From examples to batches with Grain: batch = f(seed, step), the same for any number of hosts, resumed in O(1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np
from grain.experimental import ElasticIterator

Batch = dict[str, np.ndarray]


class TrainBatches:
    """An endless iterator over shuffled training batches, its state a small dictionary.

    Each epoch is a new permutation of the examples, cut into batches without regard to the ends of epochs, so that
    none is dropped or repeated; what is random in an example depends on the seed and the example's number in the
    stream alone.
    """

    def __init__(self, examples: Any, *, batch_size: int, seed: int, threads: int = 1):
        stream = grain.MapDataset.source(examples).seed(seed).shuffle().repeat(None).random_map(examples.draw)
        shard = grain.sharding.ShardOptions(shard_index=jax.process_index(), shard_count=jax.process_count())
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=4 * batch_size)
        self._iterator = iter(ElasticIterator(stream, batch_size, shard, read_options=options))

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        """Returns the next batch: this host's rows of it."""
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """Returns where the iterator stands, as JSON-able numbers."""
        return self._iterator.get_state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to where `state` was taken."""
        self._iterator.set_state(dict(state))


def eval_batches(examples: Any, *, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yields every example once, in order, in batches of one size; `valid [B]` is 0 for the rows that fill up the last."""
    drawn = grain.MapDataset.source(examples).seed(seed).random_map(examples.draw)
    for begin in range(0, len(drawn), batch_size):
        rows = [drawn[index] for index in range(begin, min(begin + batch_size, len(drawn)))]
        fill = batch_size - len(rows)
        valid = np.array([1.0] * len(rows) + [0.0] * fill, np.float32)
        rows += [rows[0]] * fill
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]} | {"valid": valid}
