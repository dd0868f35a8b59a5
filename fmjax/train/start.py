"""How a run begins, or continues: what it records, announces and reads."""

from __future__ import annotations

import hashlib
import json

from fmjax.config import write_config
from fmjax.contracts import Config
from fmjax.data.kinds import lifecycle
from fmjax.data.stream.batches import Reading, TrainBatches
from fmjax.distributed import hosts
from fmjax.distributed.hosts import say
from fmjax.runs import folder as run_folder
from fmjax.train import facts as run_facts
from fmjax.train.experiment import Experiment
from fmjax.train.length import schedule_change


def record(experiment: Experiment, given: Config) -> None:
    """Writes what the run begins with into its directory, on the first host, if all hosts have the
    same.

    Raises UserError, naming what differs, if they do not.
    """
    data, workdir = experiment.data, experiment.workdir
    facts = {"config": given} | data.fingerprints
    hosts.check_same({name: digest(fact) for name, fact in facts.items()})
    if not hosts.first():  # the first writes once all have read what was there before
        return
    if not experiment.resumed:
        lifecycle.store(workdir, data.processors)
    notes = experiment.built.notes | {run_facts.KEY: run_facts.gather(experiment)}
    run_folder.record(workdir, data.fingerprints, notes)
    run_folder.record_left_out(workdir, data.tolerance.found)
    # Last, as the config makes the folder a run; at a restart it takes up what may change.
    write_config(workdir, experiment.config, given)


def digest(fact: object) -> str:
    """Returns the SHA-256 of a fact, as JSON."""
    return hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()


def training_batches(experiment: Experiment) -> TrainBatches:
    """Returns the training batches, read ahead as the config says."""
    data = experiment.config["data"]
    reading = Reading(
        workers=int(data.get("workers", 0)),
        prefetch=int(data.get("prefetch", 4)),
        stall_seconds=float(data.get("stall_seconds", 0.0)),
    )
    return TrainBatches(
        experiment.built.examples["train"],
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        reading=reading,
        rows=experiment.rows,
        tolerance=experiment.data.tolerance,
        tell=say,
    )


def announce(experiment: Experiment, begun: int) -> None:
    """Prints the facts about the run that is about to go on from a step, and its steps.

    Says also what another length than before changes in the learning rate.
    """
    if not hosts.first():
        return
    stored = run_folder.read_provenance(experiment.workdir).get(run_facts.KEY)  # none in a dry run
    facts = stored or run_facts.gather(experiment)
    rows = experiment.batch_size
    steps = {"text": f"{begun:,} to {experiment.built.steps:,}, of {rows:,} examples each"}
    for line in run_facts.lines(facts | {"steps": steps}):
        say(line)
    if begun:
        params, now = experiment.abstract.state.params, experiment.built.steps
        before, workdir = experiment.steps_before, experiment.workdir
        if changed := schedule_change(experiment.config, params, before, now, begun, workdir):
            say(changed)
