"""Five families against transformers' own models, with the same random weights and inputs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fmjax.bench.device.job import Job
from fmjax.bench.device.rows import FAILED, PASSED, Row, failed, skipped
from fmjax.inference.load import load

FAMILIES = ("BERT", "GPT-2", "T5", "ViT", "Llama")  # as in peer_outputs.MODELS
# Errors of the outputs, relative to the largest: in fp32 with full products; in bf16, twice that of
# the reference in bf16, which rounds at other places.
FULL, TWICE, LEAST = 1e-4, 2.0, 1e-2


def run(job: Job) -> Iterator[Row]:
    """Yields a row for each family."""
    if not job.device.get("peer"):
        for name in FAMILIES:
            yield skipped(name, "torch or transformers is not installed")
        return
    folder = job.work / "parity"
    folder.mkdir()
    made = subprocess.run(
        [sys.executable, "-m", "fmjax.bench.peer_outputs", str(folder)], stdout=sys.stderr
    )
    if made.returncode:
        raise RuntimeError(f"the peer ended with exit code {made.returncode}; see the log")
    for name in FAMILIES:
        if job.left <= 0:
            yield skipped(name, "no time was left")
            continue
        try:
            yield compared(name, folder / name)
        except Exception as error:
            yield failed(name, error)


def compared(name: str, folder: Path) -> Row:
    """Returns the row of a family. In bf16, the bound is what the reference's own rounding does."""
    model = load(folder)
    with np.load(folder / "inputs.npz") as inputs, np.load(folder / "outputs.npz") as outputs:
        arrays, theirs = dict(inputs), dict(outputs)
    wanted, seen = theirs["float32"], arrays.get("attention_mask")
    # What stands at padding is nobody's output.
    real = np.ones(wanted.shape[:2], bool)
    if seen is not None and seen.shape == real.shape:
        real = seen.astype(bool)

    def error(logits: np.ndarray) -> float:
        largest = np.abs(logits - wanted)[real].max() / np.abs(wanted)[real].max()
        return float(largest) if np.isfinite(largest) else float("inf")

    found = {}
    for dtype in ("float32", "bfloat16"):
        settings = dataclasses.replace(model.model.settings, dtype=dtype)
        own = dataclasses.replace(model, model=model.model.clone(settings=settings))
        found[dtype] = error(np.asarray(own.apply(**arrays)["logits"], np.float32))
    rounding = error(theirs["bfloat16"])
    bound = max(TWICE * rounding, LEAST)
    held = found["float32"] <= FULL and found["bfloat16"] <= bound
    return Row(
        name,
        f"fp32 {found['float32']:.0e}; bf16 {found['bfloat16']:.0e}",
        f"<= {FULL:.0e}, <= {bound:.0e} (torch itself: {rounding:.0e})",
        PASSED if held else FAILED,
        found | {"rounding": rounding},
    )
