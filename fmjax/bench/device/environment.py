"""The machine: its device, the versions of what runs on it, and which packages it lacks."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator

from fmjax.bench import standins, timing
from fmjax.bench.device.job import Job
from fmjax.bench.device.rows import SKIPPED, Row, size, skipped
from fmjax.bench.measure import PACKAGES, processor
from fmjax.errors import UserError
from fmjax.hardware import chip_of
from fmjax.runs.folder import commit, version

OPTIONAL = ("tokamax",)


def run(job: Job) -> Iterator[Row]:
    """Yields what is known of the machine; the facts of the first row describe the device."""
    import jax

    device = jax.devices()[0]
    found = "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform
    facts = {"platform": found, "kind": device.device_kind, "count": jax.device_count()}
    limit = (device.memory_stats() or {}).get("bytes_limit", 0)
    chip = chip_of(device.device_kind)
    peak = f"{chip.flops / 1e12:.0f} TFLOP/s in bf16" if chip else "its peak is not known: no MFU"
    memory = f", {size(limit)} for JAX" if limit else ""
    shown = f"{facts['count']} x {facts['kind']}{memory}"
    yield Row("device", shown, peak, facts=facts | {"bytes_limit": limit})
    versions = {name: version(name) for name in PACKAGES if version(name)}
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    yield Row("versions", f"Python {platform.python_version()}, {listed}", facts=versions)
    cores = len(os.sched_getaffinity(0))
    yield Row("host", f"{processor()}, {cores} cores", f"commit {commit()[:12] or 'unknown'}")
    if found == "gpu":
        yield Row("driver", driver())
    yield peer()
    if names := standins.standing_in():
        yield skipped("not installed", f"{', '.join(names)}; this check calls none of them")
    for name in OPTIONAL:
        if importlib.util.find_spec(name) is None:
            yield skipped(name, "not installed; no kernel of fmjax is from it")


def driver() -> str:
    """Returns the driver's version, and what NVIDIA's tool says of the chip."""
    wanted = "driver_version,name,memory.total,power.limit"
    try:
        said = subprocess.run(
            ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"],
            capture_output=True,
            encoding="utf-8",
            timeout=20,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: nvidia-smi does not answer"
    return said.strip().splitlines()[0] if said.strip() else "unknown"


def peer() -> Row:
    """Returns the row of torch and transformers, with their versions as its facts."""
    try:
        found = timing.peer_versions(sys.executable)
    except UserError:
        found = {}
    if not found:
        why = "torch or transformers is not installed: no parity, and no ratio to them"
        return Row("peer", why, status=SKIPPED)
    return Row("peer", ", ".join(f"{name} {number}" for name, number in found.items()), facts=found)
