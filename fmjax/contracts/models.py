"""Models: Linen modules from a batch of named arrays to features and outputs of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from fmjax.contracts.types import Arrays, Batch, Heads, PyTree


class Model(Protocol):
    """A Linen module that maps a batch of named arrays to features and to the outputs of its heads
    by kind.
    """

    heads: Heads
    settings: Any  # the family's frozen dataclass `Settings`

    def one_row_batch(self) -> Batch:
        """Returns the smallest batch with all that a head might read, to initialize parameters
        with.
        """

    def forward_flops(self, batch: Mapping[str, Any]) -> float:
        """Returns the floating-point operations of a forward pass over a batch, or its shapes, by
        formula.
        """


@runtime_checkable
class PacksPairs(Protocol):
    """A model that reads packed rows of several pairs of source and target."""

    packs: ClassVar[bool]


@runtime_checkable
class Encodes(Protocol):
    """A model with an encoder whose memory a decoder reads."""

    encoder_inputs: ClassVar[
        tuple[str, ...]
    ]  # arrays that `encode` reads, all with a row per example

    @property
    def start_id(self) -> int | None:
        """The token that the decoder begins with; None if only the settings of generation say
        it.
        """

    def encode(self, batch: Batch) -> Arrays:
        """Returns the memory: arrays with a row per example, such as `hidden [B,L,D]`."""


@runtime_checkable
class Generates(Protocol):
    """A Linen module that decodes with a cache; its `settings.positions` limits what it reads, 0
    being no limit.

    A cache is a value of constant shape: "index", and arrays with a row per row of the batch (see
    layers/cache.py)."""

    settings: Any

    def apply(self, variables: Mapping[str, PyTree], *args: PyTree, **kwargs: Any) -> PyTree:
        """Linen's: calls a method with parameters."""

    def empty_cache(self, rows: int, length: int) -> PyTree:
        """Returns a cache with room for `length` tokens per row."""

    def decode(self, batch: Batch, memory: PyTree, cache: PyTree) -> tuple[Arrays, PyTree]:
        """Returns the outputs for more tokens, and the cache with them; of the head `lm` logits
        [B,L,V].

        Reads `input_ids [B,L]` and, where given, `attention_mask [B,L]` (with an encoder
        `decoder_input_ids` and `decoder_attention_mask`) and `predicted_positions [B,M]`, where
        alone logits are wanted. `memory` is the encoder's."""
