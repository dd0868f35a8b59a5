"""Models: Linen modules that map a batch of named arrays to features and outputs of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from fmjax.contracts.types import Arrays, Batch, Heads, PyTree


class Model(Protocol):
    """A Linen module that maps a batch of named arrays to features and to the outputs of its heads,
    by kind.
    """

    heads: Heads
    settings: Any  # the family's frozen dataclass `Settings`

    def one_row_batch(self) -> Batch:
        """Returns the smallest batch with everything that a head may read, to initialize
        parameters.
        """

    def forward_flops(self, batch: Mapping[str, Any]) -> float:
        """Returns the floating-point operations of a forward pass over a batch (or its shapes), by
        formula.
        """


@runtime_checkable
class PacksPairs(Protocol):
    """A model that supports packed rows of several source-target pairs."""

    packs: ClassVar[bool]


@runtime_checkable
class Encodes(Protocol):
    """A model with an encoder whose memory a decoder reads."""

    encoder_inputs: ClassVar[
        tuple[str, ...]
    ]  # arrays that `encode` reads, each with one row per example

    @property
    def start_id(self) -> int | None:
        """The token that the decoder starts with; None if only the generation settings define
        it.
        """

    def encode(self, batch: Batch) -> Arrays:
        """Returns the memory: arrays with one row per example, such as `hidden [B,L,D]`."""


@runtime_checkable
class Generates(Protocol):
    """A Linen module that decodes with a cache. `settings.positions` limits its input length; 0
    means no limit.

    A cache is a value of constant shape: "index", "layers", and arrays with one row per row of the
    batch. In the cache of a layer, "attention" and "cross" hold keys and values. If several rows of
    the batch continue the same prompt, these have one row for all of them (see layers/cache.py)."""

    settings: Any

    def apply(self, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any) -> PyTree:
        """Calls a method with parameters (Linen's `apply`)."""

    def empty_cache(self, rows: int, length: int) -> PyTree:
        """Returns a cache with room for `length` tokens per row."""

    def decode(self, batch: Batch, memory: PyTree, cache: PyTree) -> tuple[Arrays, PyTree]:
        """Returns the outputs for more tokens, including logits [B,L,V] of the head `lm`, and the
        updated cache.

        Reads `input_ids [B,L]` and, if given, `attention_mask [B,L]` (with an encoder
        `decoder_input_ids` and `decoder_attention_mask`) and `predicted_positions [B,M]`, the only
        positions that need logits. `memory` is the encoder's."""
