"""Runs an experiment of `configs/claims.toml`: trains, evaluates and computes the floors.

In WORKDIR/NAME, each run has a folder RUN-SEED and, once it is evaluated, a file RUN-SEED.json; the
floors of a run are in RUN-FLOOR.json. What is finished is not repeated, what is half done is
continued.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax

from fmjax import tasks
from fmjax.bench.measure import processor
from fmjax.config import apply_overrides, load_config, overridden_keys, to_dict
from fmjax.config.json_files import read_json, without_nan, write_json
from fmjax.contracts import Config, Record
from fmjax.data.splits import open_split
from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.experiments import floors
from fmjax.experiments.datasets import folder_of, weights_of
from fmjax.experiments.entries import PLACE, Claims, Experiment, Measured, Run
from fmjax.experiments.shrunken import SECTIONS, shrunken_config
from fmjax.inference.evaluate import evaluate_run
from fmjax.inference.load import load_run
from fmjax.runs.folder import commit
from fmjax.runs.report import REPORT
from fmjax.train.loop import train

BEST = {"higher": "max", "lower": "min"}
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
        """Raises UserError if a claim does not fit its task, or data or weights are not there, or
        differ from what was measured."""
        self.check_claims()
        for run in self.one.runs:
            for name in self.one.places(run):
                if name not in self.places and name not in self.one.runs:
                    try:
                        self.places[name] = self.find(name).resolve()
                    except UserError as error:
                        raise UserError(f"{self.one.name}: {error}") from None

    def check_claims(self) -> None:
        """Raises UserError if a claim takes a metric's worse direction for the better one."""
        for at, claim in enumerate(self.one.claims):
            run = self.one.runs[claim.run]
            config = full_config(run, texts(run), run.seeds[0])
            known = tasks.make(config["task"]).measures
            # A metric of two classes is known only once the data are read.
            if known.get(claim.metric, BEST[claim.better]) != BEST[claim.better]:
                other = next(name for name in BEST if name != claim.better)
                raise UserError(
                    f'{self.one.name}.claims[{at}]: better="{claim.better}" is not true of '
                    f'{claim.metric}; write better = "{other}"'
                )

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
        wanted: dict[str, dict[str, None]] = {name: {} for name in self.one.rows}
        for claim in self.one.claims:
            data_run = self.one.data_run(claim.run)
            for name in (claim.run, *(f"{data_run}/{floor}" for floor in claim.floors)):
                wanted[name] |= dict.fromkeys(claim.metrics)
        for name in wanted:
            if name not in found:
                found[name] = [self.floor(*name.split("/"))]
        return {name: self.row(found[name], metrics) for name, metrics in wanted.items()}

    def finished(self, name: str, seed: int) -> Record:
        """Returns the record of a run: evaluated before, or trained and evaluated now."""
        run, label = self.one.runs[name], f"{name}-{seed}"
        path, folder = self.folder / f"{label}.json", self.folder / label
        self.folders.setdefault(name, folder)
        described = self.settings(name, seed)
        before = stored(path, described, folder)
        if "metrics" in before:
            return before
        if self.options.quick and (same := self.same_run(name, seed)):
            return same
        say(f"{self.one.name}: {label}")
        begun = origin()
        with timed(path, described, before.get("cpu_seconds", 0.0)):
            given, overridden = self.config(run, seed)
            train(given, folder, f"{self.one.name} {label}", overridden=overridden)
            claimed = any(claim.run == name for claim in self.one.claims)
            split, files = self.judged_on(run, seed)
            result = evaluate_run(folder, split, files) if claimed else {}
        spent = read_json(path)["cpu_seconds"]
        record = {"settings": described, "metrics": without_nan(result), "cpu_seconds": spent}
        write_json(path, record | begun)
        return record | begun

    def same_run(self, name: str, seed: int) -> Record:
        """Returns the record of an earlier shrunken run with the same config, empty if there is
        none."""
        config = self.config(self.one.runs[name], seed)
        for other in self.folders:
            if other == name or self.config(self.one.runs[other], seed) != config:
                continue
            found: Record = read_json(beside(self.folders[other]))
            if found["metrics"]:
                self.folders[name] = self.folders[other]
                return found
        return {}

    def floor(self, name: str, floor: str) -> Record:
        """Returns the record of a floor on the data of a run's first seed."""
        run, path = self.one.runs[name], self.folder / f"{name}-{floor}.json"
        seed = run.seeds[0]
        folder, described = self.folders[name], self.settings(name, seed)
        if before := stored(path, described, folder):
            return before
        say(f"{self.one.name}: {floors.FLOORS[floor][0]}")
        begun, before_cpu, loaded = origin(), cpu_seconds(), load_run(folder)
        data, (split, files) = loaded.config["data"], self.judged_on(run, seed)
        test = open_split(data | ({"files": {split: files}} if files else {}), split)
        found = floors.FLOORS[floor][1](floors.Sight(loaded, open_split(data, "train"), test))
        record = {
            "settings": described,
            "metrics": without_nan(found) | {"examples": len(test)},
            "cpu_seconds": cpu_seconds() - before_cpu,
        }
        write_json(path, record | begun)
        return record | begun

    def row(self, records: list[Record], metrics: Iterable[str]) -> Measured:
        """Returns what was measured of a run or a floor. A shrunken run is of another task, which
        need not have its metrics."""
        known = records[0]["metrics"]
        wanted = [name for name in metrics if name in known or not self.options.quick]
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
                found = self.folder / f"{name}-{self.seed_of(name, seed)}"
                if self.options.quick:
                    found = self.folders[name]  # maybe of another run with the same config
            else:
                found = self.places[name]
            text = text.replace(f"{{{name}}}", str(found))
        return text

    def seed_of(self, name: str, seed: int) -> int:
        """Returns the seed of a run that a run with a seed names: the same, if it has that."""
        seeds = self.one.runs[name].seeds
        return seed if seed in seeds and not self.options.quick else seeds[0]

    def settings(self, name: str, seed: int) -> str:
        """Returns a digest of all that a result depends on but the code and the machine: the
        config, data and weights of a run, and of the runs that it names."""
        run, claims, places = self.one.runs[name], self.claims, self.one.places(name)
        data = {place: claims.data[place].sha256 for place in places if place in claims.data}
        parts = [full_config(run, texts(run), seed), run.split, run.files, data, self.options.quick]
        starts: dict[str, object] = {}
        for place in places:
            if place in self.one.runs:
                starts[place] = self.settings(place, self.seed_of(place, seed))
            elif place in claims.weights:
                starts[place] = claims.weights[place].sha256
        if starts:
            parts.append(starts)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def texts(run: Run) -> dict[str, str]:
    """Returns the overrides of a run as on the command line."""
    return {key: str(value) for key, value in run.set.items()}


def beside(folder: Path) -> Path:
    """Returns the path of the record of a run in a folder."""
    return folder.with_name(f"{folder.name}.json")


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
    begun = cpu_seconds()
    try:
        yield
    finally:
        spent = before + cpu_seconds() - begun
        write_json(path, {"settings": settings, "cpu_seconds": spent})


def cpu_seconds() -> float:
    """Returns the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


def origin() -> Record:
    """Returns the commit, the day and the machine."""
    device = jax.devices()[0]
    where = f"{os.cpu_count()} cores of {processor()}"
    kind = where if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"commit": commit(), "date": today, "machine": kind}


def measured(records: list[Record], metrics: Sequence[str]) -> Measured:
    """Returns what was measured by several seeds; NaN stands for what is not finite.

    Raises UserError if a run does not have a metric that is claimed.
    """
    values: dict[str, tuple[float, ...]] = {}
    for metric in metrics:
        if any(metric not in record["metrics"] for record in records):
            names = ", ".join(
                name for name, one in records[0]["metrics"].items() if isinstance(one, float)
            )
            raise UserError(f'metric "{metric}" was not measured; choose from {names}')
        found = (record["metrics"][metric] for record in records)
        values[metric] = tuple(math.nan if value is None else float(value) for value in found)
    seconds = sum(record["cpu_seconds"] for record in records)
    commits, dates, machines = (
        ", ".join(dict.fromkeys(record[key] for record in records))
        for key in ("commit", "date", "machine")
    )
    return Measured(
        values,
        examples=int(records[0]["metrics"].get("examples", 0)),
        cpu_minutes=round(seconds / 60 / len(records), 2),
        commit=commits,
        date=dates,
        machine=machines,
    )
