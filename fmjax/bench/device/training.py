"""Training steps of four models at the size that is usual for one chip, beside transformers and
torch with fused attention, compiled: bf16 over fp32 parameters, AdamW, no dropout, no padding.

The losses of the first steps are compared before times are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from fmjax.bench import timing
from fmjax.bench.device.job import Job
from fmjax.bench.device.rows import Row, size
from fmjax.bench.material import prepare
from fmjax.bench.measure import compared
from fmjax.bench.workloads import (
    BERT_BASE,
    GPT_BASE,
    T5_BASE,
    WORKLOADS,
    Facts,
    Result,
    Size,
    Workload,
)

EAGER = "eager"
STEPS = 4  # whose losses are compared
ROUNDS, SECONDS = 1, 0.6  # of runs A B B A
PEER_LEAST = 15  # seconds without which a peer is not started


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row: its workload, what it aims at and what others report."""

    title: str
    workload: Workload
    aim: float  # of the chip's peak
    anchor: str = ""  # another's figure, with its hardware
    unit: str = "tokens"


def without_dropout(name: str, size: Size) -> Workload:
    """Returns a workload of the benchmark at another size, without dropout."""
    found = WORKLOADS[name]
    return dataclasses.replace(found, gpu=size, dropout=dict.fromkeys(found.dropout, 0.0))


ENTRIES: dict[str, Entry] = {
    "bert": Entry(
        "BERT-base fine-tuning, 64 x 384",
        without_dropout("bert_train", Size(BERT_BASE, 64, 384)),
        0.55,
        "932 sequences/s on an H200",
        "sequences",
    ),
    "gpt": Entry(
        "GPT-2 124M, 32 x 1,024",
        without_dropout("gpt_train", Size(GPT_BASE, 32, 1024)),
        0.55,
        "llm.c: 468k tokens/s on an H100",
    ),
    "t5": Entry(
        "T5-base, 64 x 512 to 114",
        without_dropout("t5_train", Size(T5_BASE, 64, 512, 114)),
        0.45,
        "nanoT5: 31 % MFU on an A100",
    ),
    "vit": Entry(
        "ViT-B/16, 256 x 197",
        without_dropout("vit_train", Size({"size": "base"}, 256, 197)),
        0.45,
        unit="images",
    ),
}


def run(job: Job) -> Iterator[Row]:
    """Yields the row of one model: first ours alone, then with each variant of the peer."""
    entry = ENTRIES[job.argument]
    folder = job.work / job.argument
    folder.mkdir()
    shape = entry.workload.size(job.sizes, tiny=job.rehearse)
    described = prepare(folder, entry.workload, shape, job.sizes)
    threads, wanted = len(os.sched_getaffinity(0)), variants(job)
    with contextlib.ExitStack() as stack, logged(folder):
        pool = stack.enter_context(ThreadPoolExecutor())

        def begin(side: timing.Side) -> Begun:
            return Begun(stack.enter_context(side), pool.submit(opened, side, folder))

        def rival(variant: str) -> Begun:
            return begin(timing.peer(folder, threads, variant, sys.executable, job.sizes))

        # Both sides compile at the same time, and are timed in turn afterwards.
        own = begin(timing.ours(folder, threads, {"JAX_PLATFORMS": job.platforms}))
        others = [rival(variant) for variant in wanted[:1]]
        losses = own.losses.result()
        runs = timing.in_turn([own.side], described, ROUNDS, SECONDS)
        facts = {"name": job.argument} | own.side.ask("peak")
        yield row(entry, described, runs, facts, job, "torch not measured")
        parity: Result = {"difference": {}, "holds": True}
        for variant in wanted:
            if variant not in [other.side.name for other in others]:
                if job.left < PEER_LEAST or (variant == EAGER and parity["difference"]):
                    continue
                others.append(rival(variant))
            other = others[-1]
            try:
                apart = timing.difference(losses, other.losses.result(), "train")
                both = timing.in_turn([own.side, other.side], described, ROUNDS, SECONDS)
            except timing.SideError as error:
                facts |= {variant: str(error)}
                if not parity["difference"]:
                    said = f"torch {variant} failed"
                    yield row(entry, described, runs, facts, job, said)
                continue
            parity["difference"][variant] = apart
            parity["holds"] &= apart <= timing.TOLERANCE[described["dtype"]]
            runs = both if faster(both[variant], runs) else runs
            yield row(entry, described, runs, facts, job, "", parity)


@dataclasses.dataclass(frozen=True)
class Begun:
    """A side that is opening its job in the background, and the losses of its first steps."""

    side: timing.Side
    losses: Future[Sequence[float]]


def opened(side: timing.Side, folder: Path) -> Sequence[float]:
    """Opens a job and returns the losses of its first steps. Raises SideError."""
    side.ask("open", folder=str(folder), phase="timing")
    losses: Sequence[float] = side.ask("losses", steps=STEPS)["results"]
    return losses


def variants(job: Job) -> Sequence[str]:
    """Returns the variants of the peer to measure, none if it is not there or does not run on the
    device. The eager one is there for a model that does not compile."""
    if not job.device.get("peer") or job.platform == "tpu":
        return ()
    return (EAGER,) if job.rehearse else ("compiled", "compiled/cudnn", EAGER)


def faster(runs: Sequence[Mapping[str, float]], best: Mapping[str, Sequence[Facts]]) -> bool:
    """Returns whether a peer's runs are faster than those of the fastest peer so far."""
    others = [held for name, held in best.items() if name != "fmjax"]
    quick = min(run["seconds"] for run in runs)
    return not others or quick < min(run["seconds"] for run in others[0])


@contextlib.contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Copies what the sides wrote to stderr at the end, as their own logs are not kept."""
    try:
        yield
    finally:
        for path in sorted(folder.glob("*.log")):
            print(f"-- {path.name}\n{path.read_text(encoding='utf-8')[-20_000:]}", file=sys.stderr)


def row(
    entry: Entry,
    described: Facts,
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    facts: Facts,
    job: Job,
    without: str,
    parity: Facts | None = None,
) -> Row:
    """Returns the row of a model; `without` says why there is no peer."""
    sides = {name: timing.summary(held, described) for name, held in runs.items()}
    own = sides["fmjax"]
    rate = own["per_second"]
    if entry.unit == "sequences":
        rate = described["sizes"]["rows"] / own["step_seconds"]
    shown = [f"{1e3 * own['step_seconds']:.3g} ms per step", f"{rate:,.0f} {entry.unit}/s"]
    found = dict(facts) | {"step_seconds": own["step_seconds"], "per_second": rate}
    if job.chip is not None and own["flops_per_second"]:
        mfu = own["flops_per_second"] / job.chip.flops
        found |= {"mfu": mfu, "of_aim": mfu / entry.aim}
        shown.append(f"MFU {100 * mfu:.1f} %")
    if "peak" in facts:
        shown.append(size(facts["peak"]))
    against = [without] if without else []
    if parity is not None:
        result = compared(sides, runs, parity)
        found |= {"peer": result, "sides": sides, "parity": dict(parity)}
        against = [against_peer(sides, result)]
    if not job.rehearse:
        against += [f"aim {100 * entry.aim:.0f} % MFU", *filter(None, [entry.anchor])]
    title = f"{entry.title.partition(',')[0]}, tiny" if job.rehearse else entry.title
    return Row(title, ", ".join(shown), "; ".join(against), facts=found)


def against_peer(sides: Facts, result: Facts) -> str:
    """Returns how the peer's fastest variant compares."""
    name = result["peer"]
    shown = f"torch {name} {1e3 * sides[name]['step_seconds']:.3g} ms"
    if result["ratio"] is None:
        return f"{shown}, not compared: the losses differ"
    return f"{shown}: {result['ratio']:.2f} x as fast"
