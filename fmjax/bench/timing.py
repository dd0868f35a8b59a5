"""Starts each side as a process, compares the results, and times the sides in turn."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.bench.workloads import Facts, Result
from fmjax.errors import UserError, one_line

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20  # whose losses are compared
# Largest relative difference of losses after STEPS steps, or of the hidden states' sum of
# magnitudes.
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}
PEER_ABSENT = (
    "peer: torch and transformers are not installed here, so only fmjax is measured; pip install "
    "torch transformers, or name a "
    "Python that has them with --peer_python"
)


SECOND = "ctranslate2"  # a second peer of decoding, with which the target has nothing to do


class SideError(UserError):
    """A side failed; its message names the log."""


class Side:
    """A process that waits, without using a core, while the other sides run."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str]):
        self.name, self.log = name, log
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.errors = open(log, "w", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            encoding="utf-8", env={**os.environ, "PYTHONPATH": paths, **env},
        )  # fmt: skip

    def ask(self, do: str, **arguments: Any) -> Result:
        """Returns the side's answer. Raises SideError if it fails or has died."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SideError(f"{self.name}: the process ended; see {self.log}")
        answer: Result = json.loads(line)
        if "error" in answer:
            raise SideError(f"{self.name}: {answer['error'][:300]}; see {self.log}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.close()
            self.process.wait(timeout=10)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def ours(folder: Path, threads: int, env: Mapping[str, str] | None = None) -> Side:
    """Starts fmjax's side."""
    quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **(env or {})}
    return Side(
        "fmjax",
        [sys.executable, "-m", "fmjax.bench.ours", str(threads)],
        folder / "ours.log",
        quiet,
    )


def peer(folder: Path, threads: int, variant: str, python: str, device: str) -> Side:
    """Starts the peer in one of its variants, or the second peer."""
    env = {"TORCHINDUCTOR_CACHE_DIR": str(folder.parent.resolve() / "inductor")}
    log = folder / f"peer_{variant.replace('/', '_')}.log"
    module = ["fmjax.bench.peer_ctranslate2", str(threads)]
    if variant != SECOND:
        module = ["fmjax.bench.peer", str(threads), variant, device]
    return Side(variant, [python, "-m", *module], log, env)


def peer_versions(python: str) -> dict[str, str]:
    """Returns the versions of torch and transformers in an interpreter, {} if it lacks one, and of
    CTranslate2 where it is there, too.

    Raises UserError if it cannot be run.
    """
    code = (
        "import importlib.metadata as m, importlib.util as u, json\n"
        "names = ('torch', 'transformers')\n"
        "more = [n for n in ('ctranslate2',) if u.find_spec(n)]\n"
        "print(json.dumps({n: m.version(n) for n in (*names, *more)} if all(map(u.find_spec, "
        "names)) else {}))"
    )
    try:
        found = subprocess.run(
            [python, "-c", code], capture_output=True, encoding="utf-8", timeout=60
        )
        versions: dict[str, str] = json.loads(found.stdout)
        return versions
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"--peer_python={python}: cannot be run as Python ({one_line(error, 100)}); name "
            "another interpreter"
        ) from None


def variants(kind: str, device: str, compiled: bool, second: bool = False) -> list[str]:
    """Returns the variants of the peer to try, and the `second` peer, if it is there, for decoding
    on a CPU."""
    others = [SECOND] if second and kind == "generate" and device == "cpu" else []
    if not compiled or (device == "cpu" and kind == "generate"):
        return ["eager", *others]
    if device == "gpu":
        return [
            "eager",
            *(f"compiled/{kernel}" for kernel in ("flash", "efficient", "cudnn", "math")),
        ]
    return ["eager", "compiled"]


def difference(own: Sequence[Any], other: Sequence[Any], kind: str) -> float:
    """Returns the largest relative difference of two sides' results; for tokens, the fraction that
    differs.
    """
    a, b = np.asarray(own, np.float64), np.asarray(other, np.float64)
    if a.shape != b.shape:
        return float("inf")
    if kind == "generate":
        return float((a != b).mean())
    return float(np.max(np.abs(a - b) / np.maximum(np.abs(b), 1e-6)))


def in_turn(
    sides: Sequence[Side], job: Facts, rounds: int, seconds: float
) -> dict[str, list[dict[str, float]]]:
    """Runs the warm sides in the order A B B A, `rounds` times. Each run takes about `seconds` and
    consists of whole passes. Returns the runs of each side.
    """
    count = job["batches"]
    passes = {}
    for side in sides:
        took = side.ask("run", passes=1, count=count)["seconds"]
        passes[side.name] = max(1, round(seconds / took))
    runs: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in [*sides, *reversed(sides)]:
            run = side.ask("run", passes=passes[side.name], count=count)
            run = {name: value / passes[side.name] for name, value in run.items()}
            runs[side.name].append(run)
    return runs


def summary(runs: Sequence[Mapping[str, float]], job: Facts) -> Result:
    """Returns the median and range of a side's seconds per step, its CPU seconds and its
    throughput.
    """
    seconds, count = [run["seconds"] for run in runs], job["batches"]
    middle = statistics.median(seconds)
    flops = job["flops_per_pass"]
    return {
        "step_seconds": middle / count,
        "step_seconds_range": [min(seconds) / count, max(seconds) / count],
        "step_cpu_seconds": statistics.median(run["cpu"] for run in runs) / count,
        "per_second": job["useful_per_pass"] / middle,
        "flops_per_second": flops / middle if flops else None,
        "runs": [dict(run) for run in runs],
    }


def ratios(
    own: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]], what: str = "seconds"
) -> list[float]:
    """Returns the speedup of fmjax for each pair of neighboring runs."""
    return [b[what] / a[what] for a, b in zip(own, other, strict=True)]
