"""Stand-ins for packages that fmjax imports and a measurement never calls: it then also runs on a
machine that has JAX and Flax but not all that fmjax needs for training.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import MutableSequence, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

# Config files, data sets, tokenizers, metrics and logs: none of them takes part in a step.
PACKAGES = (
    "array_record",
    "grain",
    "jiwer",
    "ml_collections",
    "pyarrow",
    "rouge_score",
    "sacrebleu",
    "sentencepiece",
    "seqeval",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "tokenizers",
)


class Absent(type):
    """A class of a package that is not installed: its attributes are such classes too, and it
    cannot be instantiated."""

    def __getattr__(cls, name: str) -> Absent:
        return absent_class(cls, name, cls.__module__)

    def __call__(cls, *_: object, **__: object) -> NoReturn:
        raise ModuleNotFoundError(f"No module named '{cls.__module__}'", name=cls.__module__)


class StandIn(ModuleType):
    """A module in which every name is such a class."""

    __path__: MutableSequence[str] = []  # noqa: RUF012 (as in ModuleType)

    def __getattr__(self, name: str) -> Absent:
        return absent_class(self, name, self.__name__.partition(".")[0])


def absent_class(owner: object, name: str, package: str) -> Absent:
    """Returns the class of a name, the same each time. Raises AttributeError for Python's own."""
    if name.startswith("__"):
        raise AttributeError(name)
    made = Absent(name, (), {"__module__": package})
    setattr(owner, name, made)
    return made


class Finder(MetaPathFinder, Loader):
    """Finds the stand-ins of packages and of all modules in them."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = frozenset(packages)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Does nothing: its names are made when they are asked for."""


def absent(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Returns the packages that are not installed here."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def install() -> None:
    """Makes stand-ins importable for the PACKAGES that are absent."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path) and (missing := absent()):
        sys.meta_path.append(Finder(missing))


def standing_in() -> list[str]:
    """Returns the packages that have a stand-in in this process."""
    finders = [finder for finder in sys.meta_path if isinstance(finder, Finder)]
    return sorted(set().union(*(finder.packages for finder in finders)))
