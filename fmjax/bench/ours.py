"""fmjax's side of a benchmark: its training step, `.apply` and `.generate`, called as a user would.

python -m fmjax.bench.ours THREADS
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fmjax.bench import standins, worker
from fmjax.bench.workloads import Result
from fmjax.contracts import PyTree

BACKEND = "/jax/core/compile/backend_compile_duration"
TRACING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
)
RNG = {"cpu": "hash"}  # train.dropout_rng by platform


class Ours:
    """One job at a time."""

    def __init__(self) -> None:
        import jax

        self.jax = jax
        self.spent = dict.fromkeys((BACKEND, *TRACING), 0.0)
        jax.monitoring.register_event_duration_secs_listener(self.heard)

    def heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event in self.spent:
            self.spent[event] += duration_secs

    def describe(self) -> Result:
        device = self.jax.devices()[0]
        count = self.jax.device_count()
        return {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": count,
            "jax": self.jax.__version__,
        }

    def open(self, folder: str, phase: str, **settings: Any) -> Result:
        """Builds the model of a job, with the dropout rates of a phase and other settings, and its
        step function. Compiles nothing yet.
        """
        from fmjax.inference.load import load
        from fmjax.inference.pretrained import abstract_params
        from fmjax.pytree import names, unnames

        self.folder = folder
        self.job, self.batches = worker.read_job(Path(folder), "ours")
        loaded = load(Path(folder) / "model")
        given = self.job["dropout"][phase] | {"dtype": self.job["dtype"]} | settings
        changed = dataclasses.replace(loaded.model.settings, **given)
        wanted = names(abstract_params(loaded.model))
        params = unnames(
            {name: leaf for name, leaf in names(loaded.params).items() if name in wanted}
        )
        self.pretrained = dataclasses.replace(
            loaded, model=loaded.model.clone(settings=changed), params=params
        )
        self.step = getattr(self, self.job["kind"])
        if self.job["kind"] == "train":
            self.build()
        return {}

    def build(self) -> None:
        """Builds the compiled training step and its first state, with the stages of training."""
        from fmjax import tasks
        from fmjax.data.stream.batches import batch_spec
        from fmjax.distributed import sharding
        from fmjax.distributed.compiler import compiler_options
        from fmjax.distributed.layout import Layout
        from fmjax.randomness import dropout_key
        from fmjax.train.initial import with_params
        from fmjax.train.stages import describe, training_step

        model, task = self.pretrained.model, tasks.make(self.job["task"])
        devices = self.jax.devices()[: self.job["devices"]]
        self.layout = Layout(
            sharding.make_mesh({"data": -1}, devices), sharding.resolve_rules("dp")
        )
        config, spec = {"optim": self.job["optimizer"]}, batch_spec(self.batches[0])
        abstract = describe(config, model, spec, 1000, self.layout)
        self.state = with_params(
            self.pretrained.params, abstract.optimizer.transform, abstract.state
        )
        self.key = dropout_key(0, RNG.get(devices[0].platform, "rbg"))
        step = training_step(config, model, task, abstract)
        options = compiler_options(self.layout.mesh)
        self.jitted = self.jax.jit(step, donate_argnums=0, compiler_options=options)
        self.shardings = self.layout.of_batch(spec)

    def train(self, index: int) -> PyTree:
        batch = {
            name: self.jax.device_put(array, self.shardings[name])
            for name, array in self.next(index).items()
        }
        with self.layout.active():
            self.state, metrics = self.jitted(self.state, batch, self.key)
        return metrics["loss"]

    def forward(self, index: int) -> PyTree:
        outputs = self.pretrained.apply(**self.next(index))
        return self.jax.block_until_ready(outputs["last_hidden_state"])

    def generate(self, index: int) -> PyTree:
        settings = {
            "max_new_tokens": self.job["new_tokens"],
            "min_new_tokens": self.job["new_tokens"],
        }
        return self.pretrained.generate(**self.next(index), **settings, num_beams=self.job["beams"])

    def next(self, index: int) -> PyTree:
        return self.batches[index % len(self.batches)]

    def wait(self, result: PyTree) -> PyTree:
        """Returns a step's result as JSON: a loss, the sum of magnitudes of hidden states, or the
        tokens.
        """
        if self.job["kind"] == "generate":
            return result.tolist()
        return float(abs(result).sum()) if self.job["kind"] == "forward" else float(result)

    def compare(self, steps: int) -> Result:
        """Takes steps over the reference's own batches, padded to one length. Returns the result of
        each.
        """
        batches, (_, theirs) = self.batches, worker.read_job(Path(self.folder), "peer")
        most = max(batch["input_ids"].shape[1] for batch in theirs)
        self.batches = [
            {name: filled(array, most) for name, array in batch.items()} for batch in theirs
        ]
        try:
            return worker.losses(self, steps)
        finally:
            self.batches = batches

    def inputs(self, folder: str, **job: Any) -> dict[str, float]:
        from fmjax.bench.inputs import feed

        return feed(Path(folder), **job)

    def first(self, folder: str) -> dict[str, float]:
        """Opens a job and takes one step. Returns the seconds of building, of the first step and of
        the compilation in it.
        """
        begun = time.perf_counter()
        self.open(folder, "timing")
        built = time.perf_counter()
        before = dict(self.spent)
        self.wait(self.step(0))
        done = time.perf_counter()
        spent = {name: self.spent[name] - before[name] for name in self.spent}
        tracing = sum(spent[name] for name in TRACING)
        return {
            "build": built - begun,
            "first_step": done - built,
            "tracing": tracing,
            "backend_compile": spent[BACKEND],
        }

    def trace(self, folder: str, steps: int) -> Result:
        """Takes steps under JAX's profiler, which writes files for TensorBoard (xplane) and
        Perfetto to a folder.
        """
        with self.jax.profiler.trace(folder, create_perfetto_trace=True):
            for index in range(steps):
                self.wait(self.step(index))
        return {}

    def memory(self) -> dict[str, int]:
        """Returns the memory of the training step in bytes, according to the compiler."""
        with self.layout.active():
            compiled = self.jitted.lower(self.state, self.batches[0], self.key).compile()
        found = compiled.memory_analysis()
        if found is None:
            return {}
        return {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}

    def peak(self) -> dict[str, int]:
        """Returns the most bytes of the device's memory that this process has used; {} on a CPU."""
        found = self.jax.devices()[0].memory_stats() or {}
        return {"peak": found["peak_bytes_in_use"]} if "peak_bytes_in_use" in found else {}


def filled(array: np.ndarray, length: int) -> np.ndarray:
    """Returns a batch's array with rows zero-padded to a length."""
    return np.pad(array, ((0, 0), (0, length - array.shape[1]))) if array.ndim == 2 else array


if __name__ == "__main__":
    worker.pin(int(sys.argv[1]))
    standins.install()
    worker.serve(Ours)
