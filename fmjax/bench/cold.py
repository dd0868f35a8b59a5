"""Time from the start of a process to the end of its first step, without and with JAX's persistent
compilation cache.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fmjax.bench import timing
from fmjax.bench.material import prepare
from fmjax.bench.measure import Options, machine
from fmjax.bench.table import markdown
from fmjax.bench.workloads import WORKLOADS, Facts, Result

BARS = {"first_step": 1 / 2, "backend_compile": 1 / 4}  # cached over cold


def measure(options: Options) -> Result:
    """Returns, for each workload, the seconds of a start with an empty cache and of one with a
    filled cache.
    """
    found = {}
    for name in WORKLOADS:
        if name.endswith("_base") or (options.tiny and name not in ("bert_train", "gpt_greedy")):
            continue
        folder = options.workdir / "jobs" / name
        folder.mkdir(parents=True, exist_ok=True)
        prepare(
            folder,
            WORKLOADS[name],
            WORKLOADS[name].size(options.device, options.tiny),
            options.device,
        )
        cache = folder / "compiled"
        shutil.rmtree(cache, ignore_errors=True)
        env = {
            "JAX_COMPILATION_CACHE_DIR": str(cache.resolve()),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        found[name] = {kind: start(folder, options.threads, env) for kind in ("cold", "cached")}
    return {"starts": found, "bars": BARS, "machine": machine(options)}


def start(folder: Any, threads: int, env: Mapping[str, str]) -> dict[str, float]:
    """Returns how the time from process start to the end of the first step is spent."""
    begun = time.perf_counter()
    with timing.ours(folder, threads, env) as side:
        spent = side.ask("first", folder=str(folder))
        return {"start_to_first_step": time.perf_counter() - begun, **spent}


def table(result: Facts) -> str:
    """Returns the table: cold, cached, and their ratio against the targets."""
    columns = ("start_to_first_step", "first_step", "tracing", "backend_compile")
    head = (
        "workload",
        *(f"{name.replace('_', ' ')}, cold / cached (s)" for name in columns),
        "met",
    )
    rows: list[Sequence[str]] = []
    for name, pair in result["starts"].items():
        cold, cached = pair["cold"], pair["cached"]
        met = all(cached[what] <= bar * cold[what] for what, bar in BARS.items())
        rows.append(
            (name, *(f"{cold[c]:.2f} / {cached[c]:.2f}" for c in columns), "yes" if met else "no")
        )
    return markdown(head, rows) + "\nbars: first step <= 1/2 of cold, backend compile <= 1/4"
