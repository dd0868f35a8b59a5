"""From a config to everything a run needs, checked before anything is compiled or written."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator
from functools import partial

import jax
import numpy as np
from jax.sharding import NamedSharding

from fmjax.config import continued
from fmjax.contracts import Config, HostBatch, PyTree
from fmjax.data.stream.batches import batch_shapes, eval_batches
from fmjax.distributed import hosts
from fmjax.distributed.layout import lay_out
from fmjax.filesystems.paths import RunPath
from fmjax.runs import folder as run_folder
from fmjax.train import limits
from fmjax.train.budget import check_memory
from fmjax.train.initial import create_params, create_state, with_params
from fmjax.train.length import steps_before
from fmjax.train.stages import Abstract, Built, Data, build, describe, open_data
from fmjax.train.state import TrainState
from fmjax.train.warm_start import completed, starting_weights
from fmjax.train.wrappers import main_part, unmixed


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run that may begin, or continue: the results of all stages."""

    workdir: RunPath
    resumed: bool
    steps_before: int  # that it had when it was last stopped; a new run: that it has
    data: Data
    built: Built
    abstract: Abstract
    weights: PyTree | None  # parameters to start from, on the host

    @property
    def config(self) -> Config:
        return self.built.config

    @property
    def batch_size(self) -> int:
        return int(self.config["data"]["batch_size"])

    @property
    def seed(self) -> int:
        return int(self.config["train"]["seed"])

    @property
    def rows(self) -> np.ndarray | None:
        """The rows of a batch that this host reads; None: all."""
        return hosts.rows_of(self._shardings["valid"], self.batch_size)

    def initial_state(self) -> TrainState:
        """Returns the state of step 0, with the parameters of `init.weights` if they are given."""
        transform, abstract = self.abstract.optimizer.transform, self.abstract.state
        model, spec = self.built.model, self.abstract.spec
        if self.weights is None:
            return create_state(model, transform, spec, abstract, self.seed)
        fresh = partial(create_params, model, spec, abstract.params, self.seed)
        params = completed(self.config, abstract.params, self.weights, fresh)
        return with_params(params, transform, abstract)

    def eval_batches(self, split: str) -> Iterator[dict[str, np.ndarray]]:
        """Returns the batches of a split, every example once."""
        examples = self.built.examples[split]
        return eval_batches(examples, batch_size=self.batch_size, seed=self.seed, rows=self.rows)

    def place(self, batch: HostBatch) -> dict[str, jax.Array]:
        """Puts this host's rows of a batch where they belong on the devices."""
        return hosts.place(batch, self._shardings, self.batch_size)

    @functools.cached_property
    def _shardings(self) -> dict[str, NamedSharding]:
        spec = self.abstract.spec
        _, _, evaluated = main_part(self.built.model, self.built.task, spec)
        valid = jax.ShapeDtypeStruct((self.batch_size,), np.float32)
        return self.abstract.layout.of_batch({**evaluated, **spec, "valid": valid})


def prepare(given: Config, workdir: RunPath, overridden: Collection[str] = ()) -> Experiment:
    """Returns the experiment that a config describes, or continues, in its run directory.

    `overridden` keys do not come from the config's file: a size among them outweighs that of
    `init.weights`. Writes only the empty run directory. Raises UserError for what does not fit."""
    limits.check_config(given)
    resumed = run_folder.check_workdir(workdir)
    config = continued(workdir, given) if resumed else given
    layout = lay_out(config)
    data = open_data(config, workdir, resumed, overridden)
    built = build(data, resumed, layout)
    spec = batch_shapes(built.config, built.examples["train"])
    check_memory(built.config, built.model, built.task, spec, layout)
    abstract = describe(built.config, built.model, spec, built.steps, layout)
    weights = None
    if data.pretrained is not None:
        model, params = unmixed(built.model), abstract.state.params
        weights = starting_weights(built.config, data.pretrained, model, built.task, params)
    before = steps_before(workdir, built.examples["train"]) if resumed else built.steps
    return Experiment(workdir, resumed, before, data, built, abstract, weights)
