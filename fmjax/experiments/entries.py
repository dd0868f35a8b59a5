"""The experiments that the pages claim, as `configs/claims.toml` describes them.

The head of that file explains its keys. Everything is checked when it is read: unknown keys, names
that nothing has, and values of another type are errors that name their place.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from fmjax.config.shipped import shipped_folder
from fmjax.errors import UserError, nearest, one_of
from fmjax.experiments.floors import FLOORS

FILE = "claims.toml"
BETTER = ("higher", "lower")
PLACE = re.compile(r"\{([a-z][a-z0-9-]*)\}")
Value = str | int | float
T = TypeVar("T")


class Written(float):
    """A number of the file, with the text that it was written as."""

    text: str

    def __new__(cls, text: str) -> Written:
        one = super().__new__(cls, text)
        one.text = text
        return one

    @property
    def decimals(self) -> int:
        """How many decimals it was written with; 0 if it has an exponent."""
        return 0 if "e" in self.text.lower() else len(self.text.partition(".")[2])


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set: its folder below $FMJAX_DATA, and the SHA-256 of each file's content."""

    folder: str
    get: str
    sha256: dict[str, str]
    prepare: str = ""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Pretrained weights in a package of the package index."""

    package: str
    folder: str
    about: str
    quick: str
    sha256: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Run:
    """A config with its overrides, and what to evaluate it on."""

    config: str
    label: str = ""
    seeds: tuple[int, ...] = (0,)
    set: dict[str, Value] = dataclasses.field(default_factory=dict)
    split: str = "validation"
    files: str = ""
    quick: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is claimed of a metric of a run."""

    run: str
    metric: str
    tolerance: float
    better: str = "higher"
    also: tuple[str, ...] = ()
    published: float | None = None
    source: str = ""
    floors: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric, *self.also)

    def worse(self, value: float, than: float) -> float:
        """Returns by how much a value is worse than another; negative if it is better."""
        return value - than if self.better == "lower" else than - value


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Runs, and claims about them."""

    name: str
    title: str
    runs: dict[str, Run]
    claims: tuple[Claim, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """What is measured: the runs, and the floors of claims as "RUN/FLOOR"."""
        floors = (
            f"{self.data_run(claim.run)}/{floor}" for claim in self.claims for floor in claim.floors
        )
        return tuple(dict.fromkeys([*self.runs, *floors]))

    def data_run(self, run: str) -> str:
        """Returns the first run with the same data as a run: their floors are the same."""

        def data(name: str) -> tuple[str, str, Value]:
            one = self.runs[name]
            return one.split, one.files, one.set.get("data.files.train", "")

        return next(name for name in self.runs if data(name) == data(run))

    def places(self, run: str) -> tuple[str, ...]:
        """Returns what a run names in braces: data sets, weights and other runs."""
        one = self.runs[run]
        texts = [one.files, *(str(value) for value in one.set.values())]
        return tuple(dict.fromkeys(name for text in texts for name in PLACE.findall(text)))


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a run, one value per seed, or of a baseline.

    `seeds` and `deviation` are the number of seeds of which only the mean is known, and their
    standard deviation.
    """

    values: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    seeds: int = 0
    deviation: dict[str, float] = dataclasses.field(default_factory=dict)
    examples: int = 0
    cpu_minutes: float = 0.0
    commit: str = ""
    date: str = ""
    machine: str = ""
    note: str = ""


class Claims(NamedTuple):
    """The content of the file; `measured` by experiment and by "RUN" or "RUN/FLOOR"."""

    data: Mapping[str, DataSet]
    weights: Mapping[str, Weights]
    experiments: Mapping[str, Experiment]
    measured: Mapping[str, Mapping[str, Measured]]

    def named(self, name: str) -> Experiment:
        """Returns an experiment. Raises UserError, with the nearest names, if there is none."""
        if name not in self.experiments:
            raise UserError(
                f'experiment "{name}"{nearest(name, self.experiments)}: there is none; choose from '
                f"{', '.join(self.experiments)}"
            )
        return self.experiments[name]


def claims_file() -> Path:
    """Returns the path of the file, beside the shipped configs."""
    return shipped_folder() / FILE


def read_claims(path: Path) -> Claims:
    """Returns the content of a file of claims.

    Raises UserError, naming the place, for anything that is not as described above.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Written)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as TOML ({error}); correct it") from None
    data = {
        name: build(DataSet, part, f"data.{name}") for name, part in taken(content, "data").items()
    }
    weights = {
        name: build(Weights, part, f"weights.{name}")
        for name, part in taken(content, "weights").items()
    }
    rows = taken(content, "measured")
    experiments = {name: experiment(name, dict(part)) for name, part in content.items()}
    for one in experiments.values():
        check(one, {*data, *weights})
    measured: dict[str, dict[str, Measured]] = {}
    for name, part in rows.items():
        one_of("measured", name, experiments)
        known = experiments[name].rows
        for row in part:
            one_of(f"measured.{name}: row", row, known)
        measured[name] = {
            row: build(Measured, values, f"measured.{name}.{row}") for row, values in part.items()
        }
    return Claims(data, weights, experiments, measured)


def experiment(name: str, part: dict[str, Any]) -> Experiment:
    """Returns an experiment from its part of the file; its runs take over what `like` names."""
    runs: dict[str, dict[str, Any]] = {}
    for label, given in taken(part, "runs").items():
        own = dict(given)
        if (base := own.pop("like", None)) is not None:
            one_of(f"{name}.runs.{label}.like", base, runs)
            own = runs[base] | own | {"set": runs[base].get("set", {}) | own.get("set", {})}
        runs[label] = own
    claims = [
        build(Claim, one, f"{name}.claims[{at}]") for at, one in enumerate(part.pop("claims", []))
    ]
    built = {label: build(Run, own, f"{name}.runs.{label}") for label, own in runs.items()}
    return build(Experiment, part | {"name": name, "runs": built, "claims": claims}, name)


def check(one: Experiment, folders: Iterable[str]) -> None:
    """Raises UserError if an experiment names what nothing has, or has no claim."""
    before = list(folders)
    for name, run in one.runs.items():
        where = f"{one.name}.runs.{name}"
        if name in before:
            raise UserError(f"{where}: something else has that name, too; choose another")
        for place in one.places(name):
            one_of(f"{where}: {{{place}}}", place, before)
        if not run.seeds:
            raise UserError(f"{where}.seeds: is empty; name at least one")
        before.append(name)
    if not one.claims:
        raise UserError(f"{one.name}: has no claim; add [[{one.name}.claims]]")
    for at, claim in enumerate(one.claims):
        one_of(f"{one.name}.claims[{at}].run", claim.run, one.runs)
        one_of(f"{one.name}.claims[{at}].better", claim.better, BETTER)
        for floor in claim.floors:
            one_of(f"{one.name}.claims[{at}].floors", floor, FLOORS)
        if (claim.published is None) != (not claim.source):
            raise UserError(f"{one.name}.claims[{at}]: published and source come together")
        if not one.runs[claim.run].label:
            raise UserError(f"{one.name}.runs.{claim.run}: a claim is about it; give it a label")


def taken(content: dict[str, Any], key: str) -> dict[str, Any]:
    """Removes a table from a larger one and returns it, empty if there is none."""
    found = content.pop(key, {})
    if not isinstance(found, dict) or not all(isinstance(one, dict) for one in found.values()):
        raise UserError(f"{key}: is not a table of tables; write [{key}.NAME]")
    return found


def build(kind: type[T], part: dict[str, Any], where: str) -> T:
    """Returns a dataclass from a table. Raises UserError for keys that it lacks or does not know,
    and for values of another type."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in part:
        one_of(f"{where}: key", key, fields)
    needed = [
        name
        for name, field in fields.items()
        if field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in needed if name not in part]:
        raise UserError(f"{where}: {', '.join(missing)} is missing; add it")
    read = {
        key: value_of(value, str(fields[key].type), f"{where}.{key}") for key, value in part.items()
    }
    return kind(**read)


def value_of(value: Any, kind: str, where: str) -> Any:
    """Returns a value of TOML as the type of a field, such as "tuple[int, ...]"."""
    if kind.startswith("tuple["):
        if isinstance(value, list | tuple):
            return tuple(value_of(one, kind[6:-6], where) for one in value)
    elif kind.startswith("dict[str, "):
        if isinstance(value, Mapping):
            return {key: value_of(one, kind[10:-1], f"{where}.{key}") for key, one in value.items()}
    elif kind.removesuffix(" | None") == "float":
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value if isinstance(value, Written) else float(value)
    elif kind in PLAIN:
        if isinstance(value, PLAIN[kind]) and not isinstance(value, bool):
            return value
    else:
        return value  # built before
    raise UserError(f"{where}={value!r}: is not {WORDS.get(kind, kind)}")


PLAIN: dict[str, Any] = {"str": str, "int": int, "Value": str | int | float}
WORDS = {"str": "a text", "int": "a whole number", "float": "a number", "Value": "text or a number"}


def data_of(one: Experiment, claims: Claims) -> Iterator[str]:
    """Yields the names of the data sets of an experiment."""
    used = dict.fromkeys(place for run in one.runs for place in one.places(run))
    yield from (name for name in used if name in claims.data)
