"""Runs an experiment of `configs/claims.toml`: trains, evaluates and computes the floors.

In WORKDIR/NAME, each run has a folder RUN-SEED and, once it is evaluated, a file RUN-SEED.json; the
floors of a run are in RUN-FLOOR.json. What is finished is not repeated, what is half done is
continued.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax

from fmjax.bench.measure import processor
from fmjax.config import apply_overrides, load_config, overridden_keys, to_dict
from fmjax.config.json_files import read_json, without_nan, write_json
from fmjax.contracts import Config, Record
from fmjax.data.splits import open_split
from fmjax.distributed.hosts import say
from fmjax.errors import UserError, one_of
from fmjax.experiments import floors
from fmjax.experiments.datasets import folder_of, weights_of
from fmjax.experiments.entries import PLACE, Claim, Claims, Experiment, Measured, Run
from fmjax.experiments.shrunken import SECTIONS, shrunken_config
from fmjax.inference.evaluate import evaluate_run
from fmjax.inference.load import load_run
from fmjax.runs.folder import commit
from fmjax.runs.report import REPORT
from fmjax.train.loop import train

OLDER = "remove it and {folder}, or name another --workdir"


class Options(NamedTuple):
    """How to run: the folder of all experiments, that of the data sets, and the flags."""

    workdir: Path
    data: Path | None
    quick: bool = False
    download: bool = False

    @property
    def samples(self) -> Path:
        """The folder of the records of shrunken runs."""
        return self.workdir / "data"


class Runner:
    """Runs one experiment, and keeps what is found of it."""

    def __init__(self, one: Experiment, claims: Claims, options: Options):
        self.one, self.claims, self.options = one, claims, options
        self.folder = options.workdir / one.name
        self.places: dict[str, Path] = {}
        self.folders: dict[str, Path] = {}  # by run, of the first seed

    def check(self) -> None:
        """Raises UserError if data or weights are not there, or differ from what was measured."""
        for run in self.one.runs:
            for name in self.one.places(run):
                if name not in self.places and name not in self.one.runs:
                    self.places[name] = self.find(name).resolve()

    def find(self, name: str) -> Path:
        """Returns the folder of a data set or of weights; of a shrunken run, of a run in place of
        the weights."""
        options, claims = self.options, self.claims
        if name in claims.data:
            if options.quick:
                return options.samples
            prepared = options.workdir / "data"
            return folder_of(name, claims.data[name], options.data, prepared)
        weights, place = claims.weights[name], options.workdir / "weights"
        if options.quick:
            if not (place / name / REPORT).exists():
                train(shrunken_config(weights.quick, {}, options.samples), place / name, name)
            return place / name
        return weights_of(name, weights, place, options.download)

    def run(self) -> dict[str, Measured]:
        """Runs what is left to do; returns what was measured of each run, and of each floor of a
        claim, as "RUN/FLOOR"."""
        found: dict[str, list[Record]] = {}
        for name, run in self.one.runs.items():
            seeds = run.seeds[:1] if self.options.quick else run.seeds
            found[name] = [self.finished(name, seed) for seed in seeds]
        rows: dict[str, Measured] = {}
        for claim in self.one.claims:
            rows[claim.run] = self.row(found[claim.run], claim)
            name = self.one.data_run(claim.run)
            for floor in claim.floors:
                rows[f"{name}/{floor}"] = self.row([self.floor(name, floor)], claim)
        return rows

    def finished(self, name: str, seed: int) -> Record:
        """Returns the record of a run: evaluated before, or trained and evaluated now."""
        run, label = self.one.runs[name], f"{name}-{seed}"
        path, folder = self.folder / f"{label}.json", self.folder / label
        self.folders.setdefault(name, folder)
        described = self.settings(run, seed)
        before = stored(path, described, folder)
        if "metrics" in before:
            return before
        if self.options.quick and (same := self.same_run(name, seed)):
            return same
        say(f"{self.one.name}: {label}")
        with timed(path, described, before.get("cpu_seconds", 0.0)):
            given, overridden = self.config(run, seed)
            train(given, folder, f"{self.one.name} {label}", overridden=overridden)
            claimed = any(claim.run == name for claim in self.one.claims)
            split, files = self.judged_on(run, seed)
            result = evaluate_run(folder, split, files) if claimed else {}
        spent = read_json(path)["cpu_seconds"]
        record = {"settings": described, "metrics": without_nan(result), "cpu_seconds": spent}
        write_json(path, record | origin())
        return record | origin()

    def same_run(self, name: str, seed: int) -> Record:
        """Returns the record of an earlier shrunken run with the same config, empty if there is
        none."""
        config = self.config(self.one.runs[name], seed)
        for other in self.folders:
            if other == name or self.config(self.one.runs[other], seed) != config:
                continue
            found: Record = read_json(self.folders[other].with_suffix(".json"))
            if found["metrics"]:
                self.folders[name] = self.folders[other]
                return found
        return {}

    def floor(self, name: str, floor: str) -> Record:
        """Returns the record of a floor on the data of a run's first seed."""
        one_of("floor", floor, floors.FLOORS)
        run, path = self.one.runs[name], self.folder / f"{name}-{floor}.json"
        seed = run.seeds[0]
        folder, described = self.folders[name], self.settings(run, seed)
        if before := stored(path, described, folder):
            return before
        say(f"{self.one.name}: {floors.FLOORS[floor][0]}")
        loaded, begun = load_run(folder), time.process_time()
        data, (split, files) = loaded.config["data"], self.judged_on(run, seed)
        test = open_split(data | ({"files": {split: files}} if files else {}), split)
        found = floors.FLOORS[floor][1](floors.Sight(loaded, open_split(data, "train"), test))
        record = {
            "settings": described,
            "metrics": without_nan(found) | {"examples": len(test)},
            "cpu_seconds": time.process_time() - begun,
        }
        write_json(path, record | origin())
        return record | origin()

    def row(self, records: list[Record], claim: Claim) -> Measured:
        """Returns what was measured of a claim. A shrunken run is of another task, which need not
        have its metrics."""
        known = records[0]["metrics"]
        wanted = [name for name in claim.metrics if name in known or not self.options.quick]
        return measured(records, wanted)

    def judged_on(self, run: Run, seed: int) -> tuple[str, str]:
        """Returns the split that a run is evaluated on, and its files if the config does not name
        them."""
        if self.options.quick:
            return "validation", ""
        return run.split, self.filled(run.files, seed)

    def config(self, run: Run, seed: int) -> tuple[Config, frozenset[str]]:
        """Returns the config of a run, and the keys that do not come from its file."""
        if self.options.quick:
            kept = {
                key: self.filled(str(value), seed)
                for key, value in run.set.items()
                if self.keeps(key, str(value))
            }
            spec = run.quick or run.config
            return shrunken_config(spec, kept, self.options.samples), frozenset(kept)
        filled = {key: self.filled(str(value), seed) for key, value in run.set.items()}
        return full_config(run, filled, seed), overridden_keys([*filled.items()])

    def keeps(self, key: str, text: str) -> bool:
        """Returns whether an override also holds for a shrunken run."""
        named = PLACE.findall(text)
        if any(name in self.claims.data for name in named):
            return False
        return bool(named) or key.split(".")[0] in SECTIONS

    def filled(self, text: str, seed: int) -> str:
        """Returns a text with folders in place of the names in braces."""
        for name in PLACE.findall(text):
            if name in self.one.runs:
                seeds = self.one.runs[name].seeds
                shared = seed in seeds and not self.options.quick
                found = self.folder / f"{name}-{seed if shared else seeds[0]}"
            else:
                found = self.places[name]
            text = text.replace(f"{{{name}}}", str(found))
        return text

    def settings(self, run: Run, seed: int) -> str:
        """Returns a digest of all that a result depends on but the code and the machine."""
        config = full_config(run, {key: str(value) for key, value in run.set.items()}, seed)
        named = PLACE.findall(json.dumps(run.set) + run.files)
        data = {name: one.sha256 for name, one in self.claims.data.items() if name in named}
        parts = [config, run.split, run.files, data, self.options.quick]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def full_config(run: Run, overrides: Mapping[str, str], seed: int) -> Config:
    """Returns the config of a run with overrides and a seed."""
    config = load_config(run.config)
    apply_overrides(config, [*overrides.items(), ("train.seed", str(seed))])
    return to_dict(config)


def stored(path: Path, settings: str, folder: Path) -> Record:
    """Returns the record of an earlier run; empty if there is none.

    Raises UserError if it was run with other settings."""
    found: Record = read_json(path) if path.exists() else {}
    if found and found.get("settings") != settings:
        raise UserError(
            f"{path}: was measured with other settings than the claims have now; "
            f"{OLDER.format(folder=folder)}"
        )
    return found


@contextmanager
def timed(path: Path, settings: str, before: float) -> Iterator[None]:
    """Stores the CPU seconds of the block in addition to those before, also if it is
    interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    try:
        yield
    finally:
        spent = before + time.process_time() - begun
        write_json(path, {"settings": settings, "cpu_seconds": spent})


def origin() -> Record:
    """Returns the commit, the day and the machine."""
    device = jax.devices()[0]
    where = f"{os.cpu_count()} cores of {processor()}"
    kind = where if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"commit": commit(), "date": today, "machine": kind}


def measured(records: list[Record], metrics: Sequence[str]) -> Measured:
    """Returns what was measured by several seeds.

    Raises UserError if a run does not have a metric that is claimed.
    """
    values: dict[str, tuple[float, ...]] = {}
    for metric in metrics:
        found = [record["metrics"].get(metric) for record in records]
        if None in found:
            names = ", ".join(
                name for name, one in records[0]["metrics"].items() if isinstance(one, float)
            )
            raise UserError(f'metric "{metric}" was not measured; choose from {names}')
        values[metric] = tuple(float(value) for value in found)
    last, seconds = records[-1], sum(record["cpu_seconds"] for record in records)
    return Measured(
        values,
        examples=int(records[0]["metrics"]["examples"]),
        cpu_minutes=round(seconds / 60 / len(records), 2),
        commit=last["commit"],
        date=last["date"],
        machine=last["machine"],
    )
