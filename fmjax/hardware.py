"""Devices: specifications of chips, available memory, and JAX's errors about memory and devices.

The specifications come from the data sheets of the makers: Google Cloud's pages on each TPU,
NVIDIA's on each GPU."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from fmjax.errors import UserError, one_line


@dataclass(frozen=True)
class Chip:
    """Specifications of one chip; rates are per second."""

    kinds: tuple[str, ...]  # substrings of JAX's `device_kind`
    flops: float  # dense bf16
    memory: float  # bytes of HBM
    bandwidth: float  # bytes per second between HBM and the chip
    link: float  # bytes per second that the chip sends to the others of its slice or machine
    network: float = 0.0  # the same to other slices, its share of its host's network; 0: unknown


# JAX calls a v5p "TPU v5", which is a prefix of the name of a v5e, so the v5e comes first.
CHIPS: dict[str, Chip] = {
    "v6e": Chip(("TPU v6",), 918e12, 32e9, 1640e9, 448e9, 12.5e9),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16e9, 819e9, 200e9, 3.125e9),
    "v5p": Chip(("TPU v5",), 459e12, 95e9, 2765e9, 600e9, 6.25e9),
    "v4": Chip(("TPU v4",), 275e12, 32e9, 1228e9, 300e9),
    "h200": Chip(("H200",), 989e12, 141e9, 4800e9, 450e9),
    "h100": Chip(("H100",), 989e12, 80e9, 3350e9, 450e9),
    "a100": Chip(("A100",), 312e12, 80e9, 2039e9, 300e9),
}


def chip_of(kind: str) -> Chip | None:
    """Returns the chip of a `device_kind`, None if it is not listed."""
    return next(
        (
            chip
            for chip in CHIPS.values()
            if any(name.lower() in kind.lower() for name in chip.kinds)
        ),
        None,
    )


@dataclass(frozen=True)
class Room:
    """The memory available for the arrays of a program."""

    per_device: float  # bytes
    what: str  # in words


def memory_of_devices() -> Room | None:
    """Returns the memory of the local devices, None if unknown.

    The CPU devices of a process share the machine's memory.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        machine = memory_of_machine()
        return Room(machine / len(devices), what_has(len(devices))) if machine else None
    try:
        limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    except jax.errors.JaxRuntimeError:
        return None
    return Room(limit, f"one {devices[0].device_kind}") if limit else None


def what_has(devices: int) -> str:
    return "this machine" if devices == 1 else f"each of the {devices} devices of this machine"


def memory_of_machine() -> float | None:
    """Returns the memory of this machine or container in bytes, including swap; None if unknown."""
    try:
        sizes = {
            name: int(value.split()[0]) * 1024
            for name, _, value in (
                line.partition(":")
                for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
            )
        }
        whole = float(sizes["MemTotal"] + sizes.get("SwapTotal", 0))
    except (OSError, ValueError, KeyError, IndexError):
        try:
            whole = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (OSError, ValueError, AttributeError):
            return None
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            whole = min(whole, float(int(Path(file).read_text(encoding="ascii"))))
        except (OSError, ValueError):  # missing, or "max"
            continue
    return whole


# JAX's platforms -> the extra that an installation without such a device lacks.
EXTRAS = {"cuda": "cuda", "gpu": "cuda", "tpu": "tpu"}
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|[Oo]ut of memory|failed to allocate", re.IGNORECASE)
NO_BACKEND = re.compile(r"[Uu]nable to initialize backend|[Nn]o (?:visible )?\w* ?devices? found")


@contextmanager
def explained() -> Iterator[None]:
    """Turns JAX's errors about devices and memory in the block into a one-line UserError.

    Other errors propagate.
    """
    try:
        yield
    except (RuntimeError, AssertionError, MemoryError) as error:
        if (message := explanation(error)) is None:
            raise
        raise UserError(message) from error


def explanation(error: Exception) -> str | None:
    """Returns a one-line explanation with a remedy for an error of JAX or Python about devices or
    memory.

    Returns None for any other error.
    """
    said = one_line(error, 300)
    if isinstance(error, MemoryError) or NO_MEMORY.search(said):
        found = re.search(r"allocat\w* (?:of )?([\d.]+ ?(?:bytes|[KMGT]i?B))", said)
        asked = f" for {found[1]}" if found else ""
        return (
            f"out of memory{asked}; lower data.batch_size or data.max_length, raise "
            "train.accumulate, set model.remat=everything, or choose a smaller model"
        )
    # JAX asserts that there are GPUs, without a message.
    asserted = isinstance(error, AssertionError) and any(
        frame.name in ("_init_backend", "backends", "make_gpu_client")
        for frame in traceback.extract_tb(error.__traceback__)
    )
    if asserted or NO_BACKEND.search(said):
        return no_device(said)
    return None


def no_device(said: str) -> str:
    """Returns the message for a device that JAX was told to use but does not find."""
    platforms = jax.config.values.get("jax_platforms") or os.environ.get("JAX_PLATFORMS", "")
    reason = said.partition("(set JAX_PLATFORMS")[0].rpartition("INTERNAL: ")[2].strip(" :")
    extra = next((EXTRAS[name] for name in platforms.split(",") if name in EXTRAS), "")
    how = f", or install JAX for it: pip install -e '.[{extra}]'" if extra else ""
    detail = f" ({reason})" if reason else ""
    return (
        f"JAX_PLATFORMS={platforms}: JAX finds no such device{detail}; "
        f"unset JAX_PLATFORMS to use the devices of this machine{how}"
    )
