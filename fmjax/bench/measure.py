"""Prepares, compares and times one workload side by side, and records the result."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import platform
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

from fmjax.bench import timing
from fmjax.bench.material import prepare
from fmjax.bench.workloads import WORKLOADS, Facts, Result
from fmjax.config.json_files import without_nan, write_json
from fmjax.runs.folder import commit, version

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True)
class Options:
    """The requested options, and the properties of the machine."""

    workdir: Path
    threads: int
    rounds: int
    seconds: float  # approximate seconds per run
    device: str  # cpu or gpu
    described: Facts  # of JAX's devices
    python: str  # the peer's interpreter
    peer: Mapping[str, str]  # versions; empty: absent
    compiled: bool = True  # whether torch.compile is tried
    tiny: bool = False
    profile: Path | None = None


def machine(options: Options) -> Result:
    """Returns the machine, time, versions and command of a measurement."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES} | dict(options.peer),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "load": os.getloadavg()[0],
        "devices": f"{options.described['count']} x {options.described['kind']}",
        "device": options.device,
        "tiny": options.tiny,
        "torch.compile": options.compiled,
    }


def processor() -> str:
    """Returns the processor's name as Linux names it, or as Python does."""
    with contextlib.suppress(OSError):
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def side_by_side(name: str, options: Options) -> Result:
    """Returns the result of one of WORKLOADS: first parity, then alternating runs. A side that
    fails is reported and left out.
    """
    workload = WORKLOADS[name]
    folder = options.workdir / "jobs" / name
    folder.mkdir(parents=True, exist_ok=True)
    job = prepare(folder, workload, workload.size(options.device, options.tiny), options.device)
    result: Result = {
        "workload": name,
        "title": workload.title,
        "unit": workload.unit,
        "job": job,
        "failed": {},
    }
    wanted = []
    if options.peer:
        second = timing.SECOND in options.peer
        wanted = timing.variants(workload.kind, options.device, options.compiled, second)
    with contextlib.ExitStack() as stack:
        own = stack.enter_context(timing.ours(folder, options.threads))
        started = (
            timing.peer(folder, options.threads, variant, options.python, options.device)
            for variant in wanted
        )
        others = [stack.enter_context(side) for side in started]
        result["parity"] = parity(own, others, folder, job, result["failed"]) if others else {}
        sides = opened([own, *others], folder, job, result["failed"])
        if options.profile:
            own.ask("trace", folder=str(options.profile / name), steps=job["batches"])
        runs = timing.in_turn(sides, job, options.rounds, options.seconds)
        if workload.kind == "train":
            result["bytes"] = own.ask("memory")
    result["sides"] = {side: timing.summary(own, job) for side, own in runs.items()}
    result |= compared(result["sides"], runs, result["parity"])
    result["bar"] = None if options.tiny else workload.bar.get(options.device)
    return result | {"machine": machine(options)}


def parity(
    own: timing.Side, others: list[timing.Side], folder: Path, job: Facts, failed: dict[str, str]
) -> Result:
    """Returns, for each variant of the peer, the difference of its results from ours without
    dropout; for training, of the losses of 20 steps. If a compiled module is timed with dropout, it
    is not compiled again without it: the eager one is compared instead."""
    count = (
        timing.STEPS
        if job["kind"] == "train"
        else 1
        if job["kind"] == "generate"
        else job["batches"]
    )
    own.ask("open", folder=str(folder), phase="parity")
    # Grouped batches are the same sentences in another order: compared are the reference's own.
    ours = own.ask("compare" if job["dynamic"] else "losses", steps=count)["results"]
    found: Result = {
        "steps": count,
        "tolerance": timing.TOLERANCE[job["dtype"]],
        "ours": ours,
        "difference": {},
    }
    for side in others:
        if side.name != "eager" and any(job["dropout"]["timing"].values()):
            continue
        try:
            side.ask("open", folder=str(folder), phase="parity")
            theirs = side.ask("losses", steps=count)["results"]
        except timing.SideError as error:
            failed[side.name] = str(error)
            continue
        found["difference"][side.name] = timing.difference(ours, theirs, job["kind"])
    first = [value for name, value in found["difference"].items() if name != timing.SECOND]
    found["holds"] = bool(first) and all(value <= found["tolerance"] for value in first)
    if job["kind"] == "generate":
        del found["ours"]
    return found


def opened(
    sides: list[timing.Side], folder: Path, job: Facts, failed: dict[str, str]
) -> list[timing.Side]:
    """Returns the sides that have opened the job for timing and completed a pass; ours must be
    among them."""
    ready = []
    for side in sides:
        try:
            side.ask("open", folder=str(folder), phase="timing")
            side.ask("run", passes=1, count=job["batches"])
            ready.append(side)
        except timing.SideError as error:
            if side is sides[0]:
                raise
            failed[side.name] = str(error)
    return ready


def compared(sides: Facts, runs: Facts, parity: Facts) -> Result:
    """Returns the peer's fastest variant and our speedup over it: the median and range over
    neighboring runs. The same as `second` for the second peer, if its results are ours.
    """
    others = [name for name in sides if name not in ("fmjax", timing.SECOND)]
    if not others:
        return {"peer": None, "ratio": None}
    best = min(others, key=lambda name: sides[name]["step_seconds"])
    found = timing.ratios(runs["fmjax"], runs[best])
    cpu = timing.ratios(runs["fmjax"], runs[best], "cpu")
    if not parity.get("holds"):
        return {
            "peer": best,
            "ratio": None,
            "why": "the two sides' results differ, so their times are not compared",
        }
    result: Result = {
        "peer": best,
        "ratio": statistics.median(found),
        "ratio_range": [min(found), max(found)],
        "cpu_ratio": statistics.median(cpu),
    }
    if timing.SECOND in sides and parity["difference"][timing.SECOND] <= parity["tolerance"]:
        second = timing.ratios(runs["fmjax"], runs[timing.SECOND])
        spread = [min(second), max(second)]
        result["second"] = {"ratio": statistics.median(second), "ratio_range": spread}
    return result


def write(name: str, result: Facts, options: Options) -> Path:
    """Writes a result to WORKDIR/bench/NAME.json."""
    path = options.workdir / "bench" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, without_nan(result))
    return path
