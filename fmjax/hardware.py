"""What chips can do, from their makers' data sheets: Google Cloud's pages of each TPU, NVIDIA's of each GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Figures of one chip; rates are a second's."""

    kinds: tuple[str, ...]  # parts of JAX's `device_kind`
    flops: float  # dense bf16
    memory: float  # bytes of HBM
    bandwidth: float  # bytes between HBM and the chip
    link: float  # bytes that the chip sends to the others of its slice or machine


# JAX calls a v5p "TPU v5", which is part of the name of a v5e and so stands behind it.
CHIPS: dict[str, Chip] = {
    "v6e": Chip(("TPU v6",), 918e12, 32e9, 1640e9, 448e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 819e9, 200e9),
    "v5p": Chip(("TPU v5",), 459e12, 95e9, 2765e9, 600e9),
    "v4": Chip(("TPU v4",), 275e12, 32e9, 1228e9, 300e9),
    "h200": Chip(("H200",), 989e12, 141e9, 4800e9, 450e9),
    "h100": Chip(("H100",), 989e12, 80e9, 3350e9, 450e9),
    "a100": Chip(("A100",), 312e12, 80e9, 2039e9, 300e9),
}


def chip_of(kind: str) -> Chip | None:
    """Returns the chip of a `device_kind`, None if it is not listed."""
    return next((chip for chip in CHIPS.values() if any(name.lower() in kind.lower() for name in chip.kinds)), None)
