"""Memory and speed against length: training steps of a small decoder with the same number of
tokens, by the kernel that `auto` chooses and by the plain path until it fails."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from fmjax.bench import worker
from fmjax.bench.device.job import Job
from fmjax.bench.device.rows import Row, failed, size, skipped
from fmjax.bench.material import prepare
from fmjax.bench.ours import Ours
from fmjax.bench.workloads import WORKLOADS, Size
from fmjax.hardware import explanation

MODEL = {
    "width": 512,
    "layers": 4,
    "attention_heads": 8,
    "mlp_width": 1408,
    "vocab_size": 8192,
    "context": 2**15,
}
TINY = MODEL | {
    "width": 32,
    "layers": 1,
    "attention_heads": 2,
    "mlp_width": 48,
    "vocab_size": 64,
}
LENGTHS, TOKENS = (512, 2048, 8192, 32768), 2**15
TINY_LENGTHS, TINY_TOKENS = (32, 64), 128
WORKLOAD = dataclasses.replace(
    WORKLOADS["gpt_train"], family="llama", architecture="LlamaForCausalLM", dropout={}
)
PASSES = 3


def run(job: Job) -> Iterator[Row]:
    """Yields the rows of one kernel, from short to long. The device counts the most memory that a
    process has used, so each kernel has a process of its own."""
    kernel = job.argument
    lengths, tokens = (TINY_LENGTHS, TINY_TOKENS) if job.rehearse else (LENGTHS, TOKENS)
    ours = Ours()
    for length in lengths:
        what = f"{kernel}, {tokens // length} x {length:,}"
        if job.left < 2:
            yield skipped(what, "no time was left")
            continue
        shape = Size(TINY if job.rehearse else MODEL, tokens // length, length)
        try:
            yield measured(what, ours, shape, job)
        except Exception as error:
            # How long the plain path gets before the memory is full is a result.
            said = explanation(error)
            yield Row(what, said.partition(";")[0]) if said else failed(what, error)
            break


def measured(what: str, ours: Ours, shape: Size, job: Job) -> Row:
    """Returns the row of a length."""
    folder = job.work / f"length_{job.argument}"
    folder.mkdir(exist_ok=True)
    described = prepare(folder, WORKLOAD, shape, job.sizes)
    ours.open(str(folder), "timing", attention=job.argument, scan_layers=True)
    begun = time.perf_counter()
    worker.run(ours, 1, described["batches"])
    compiled = time.perf_counter() - begun
    spent = worker.run(ours, PASSES, described["batches"])["seconds"] / PASSES
    rate = described["useful_per_pass"] / spent
    compiler, peak = ours.memory(), ours.peak()
    shown = [f"{rate:,.0f} tokens/s", f"{size(sum(compiler.values()))} by the compiler"]
    if peak:
        shown.append(f"{size(peak['peak'])} at most so far")
    facts = {"tokens_per_second": rate, "first_step_seconds": compiled, **compiler, **peak}
    return Row(what, ", ".join(shown), facts=facts)
