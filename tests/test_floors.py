"""The house has floors: a folder imports only from folders below its own, at the head of a file and inside functions alike."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fmjax"

# From the ground up. A name alone is a file of that name or all of a folder; the folders of data have floors of their own.
ORDER = [
    "contracts", "errors", "pytree", "randomness", "memory", "hardware", "losses",
    "filesystems", "config", "distributed", "optim", "layers",
    "data/characters", "data/ragged",
    "data/records", "data/identity", "data/groups", "data/partitions",
    "data/tokenizers", "data/stream", "data/storage", "data/kinds", "data/augment", "data/sources", "data/splits",
    "metrics", "models", "hub", "tasks", "decoding", "defaults", "runs", "inference", "train", "planning",
    "prepare", "examples", "bench", "experiments",
]  # fmt: skip
FLOORS = {name: floor for floor, name in enumerate(ORDER)}
# Neither may know the other.
STRANGERS = ({"models", "tasks"}, {"layers", "data"})
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")
FILES = [path for path in FILES if path.stat().st_size]


def place(module: str) -> str:
    """Returns the entry of ORDER for a module below fmjax, such as "data/stream" for "data.stream.batches"."""
    parts = module.split(".")
    return next((name for name in ("/".join(parts[:2]), parts[0]) if name in FLOORS), module)


def module_of(path: Path) -> str:
    """Returns a file's module, without "fmjax." in front."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Returns the modules below fmjax that a file imports anywhere, such as "layers.linear"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fmjax":
            base = node.module.split(".")[1:]
            for alias in node.names:
                inner = [*base, alias.name]
                file = PACKAGE.joinpath(*inner)
                found.add(".".join(inner if file.is_dir() or file.with_suffix(".py").is_file() else base))
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.split(".")[0] == "fmjax"}
    return found - {""}


def head(path: Path) -> list[str]:
    """Returns a file's imports that are carried out when it is imported."""
    return [ast.unparse(node) for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_only_from_below(path: Path) -> None:
    own = place(module_of(path))
    assert own in FLOORS, f"{own} is in no folder of the layout (tests/test_floors.py, fmjax/README.md)"
    for module in sorted(imported(path)):
        other = place(module)
        assert FLOORS[other] <= FLOORS[own], f"{module_of(path)} imports {module}, which stands above it"
        assert {own.split("/")[0], other.split("/")[0]} not in STRANGERS


def test_the_layout_names_nothing_that_is_not_there() -> None:
    for name in ORDER:
        assert (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file(), name


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_files_stay_readable(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines), default=0) <= 100
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


def test_from_config_to_step_is_short() -> None:
    """Who wants to know what a run does reads these files."""
    stages = ("experiment", "stages", "resolve", "state", "step", "wrappers")
    assert sum(len((PACKAGE / "train" / f"{name}.py").read_text().splitlines()) for name in stages) < 600
    assert len((PACKAGE / "train" / "loop.py").read_text().splitlines()) <= 150


def test_nothing_imports_a_framework_that_is_not_ours() -> None:
    # The benchmark's peer is one, in a process of its own: nothing else imports its files at its head.
    names = ("peer.py", "peer_inputs.py", "peer_outputs.py")
    peers = [path for path in FILES if path.parent.name == "bench" and path.name in names]
    assert len(peers) == 3
    for path in FILES:
        assert path in peers or not any(f"bench.{peer.stem}" in line for peer in peers for line in head(path)), path
        if path in peers:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert not any(name.split(".")[0] in ("tensorflow", "torch", "transformers") for name in names), path


def test_preparing_data_alone_imports_datatrove() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            if isinstance(node, ast.Import | ast.ImportFrom) and any(name.split(".")[0] == "datatrove" for name in names):
                assert path.parent.name == "prepare" and path.name in ("run.py", "steps.py"), path


def test_every_folder_is_packaged() -> None:
    with open(PACKAGE.parent / "pyproject.toml", "rb") as file:
        packages = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("*.py")}
    assert set(packages) == folders | {"fmjax.configs", "fmjax.scripts"}
