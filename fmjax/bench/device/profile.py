"""Where the time of the slowest training row goes: its operations on the device, from a trace."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fmjax.bench.device.job import Job
from fmjax.bench.device.rows import Row, skipped
from fmjax.bench.device.training import ENTRIES
from fmjax.bench.ours import Ours

STEPS, SHOWN = 3, 15
TRACE = "profile.trace.json.gz"


def run(job: Job) -> Iterator[Row]:
    """Yields a row for each of the operations that take longest."""
    if not job.slowest:
        yield skipped("profile", "no training row was measured")
        return
    ours = Ours()
    ours.open(str(job.work / job.slowest), "timing")
    for index in range(2):
        ours.wait(ours.step(index))
    folder = job.work / "trace"
    ours.trace(str(folder), STEPS)
    found = sorted(path for path in folder.rglob("*.trace.json.gz"))
    if not found:
        yield skipped("profile", "JAX's profiler wrote no trace")
        return
    shutil.copyfile(found[0], job.out / TRACE)
    total, spent = operations(read(found[0]))
    title = ENTRIES[job.slowest].title.partition(",")[0]
    if not spent:
        yield skipped(title, f"the trace has no operations of the device; see {TRACE}")
        return
    yield Row(title, f"{total / 1e3 / STEPS:.3g} ms per step on the device", TRACE)
    for number, (name, micros) in enumerate(spent[:SHOWN], start=1):
        facts = {"microseconds": micros / STEPS, "part": micros / total}
        shown = f"{micros / 1e3 / STEPS:.3g} ms per step, {100 * micros / total:.1f} %"
        yield Row(f"{number}. {name[:60]}", shown, facts=facts)


def read(path: Path) -> list[Mapping[str, Any]]:
    """Returns the events of a trace in Chrome's format."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events: list[Mapping[str, Any]] = json.load(file)["traceEvents"]
    return events


def operations(events: Sequence[Mapping[str, Any]]) -> tuple[float, list[tuple[str, float]]]:
    """Returns the microseconds of all operations on the device, and those of each name, longest
    first.

    On a GPU they are the kernels on the device's streams, on a TPU its line of XLA's operations.
    On a CPU they are the events that name their operation, which may run at the same time.
    """
    processes, lines = names(events, "process_name"), names(events, "thread_name")
    devices = {pid for (pid, _), name in processes.items() if "/device:" in name}
    streams = {place for place, name in lines.items() if name.startswith("Stream")}
    streams = streams or {place for place, name in lines.items() if name == "XLA Ops"}
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        place = event.get("pid"), event.get("tid")
        on_device = place[0] in devices and place in streams
        on_host = not devices and "hlo_op" in event.get("args", {})
        if event.get("ph") == "X" and (on_device or on_host):
            spent[event["name"]] += event.get("dur", 0)
    return sum(spent.values()), sorted(spent.items(), key=lambda pair: -pair[1])


def names(events: Sequence[Mapping[str, Any]], what: str) -> dict[tuple[Any, Any], str]:
    """Returns the names of processes or threads, by the numbers of both."""
    return {
        (event.get("pid"), event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event.get("name") == what
    }
