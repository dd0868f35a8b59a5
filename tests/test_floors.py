"""The house has floors: a file imports only from floors below its own, and models and tasks never from each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fmjax"

FLOORS = {
    "errors": 0, "pytree": 0, "sharding": 0, "config": 0, "commandline": 0, "hosts": 0, "roll_call": 0, "hardware": 0,
    "randomness": 0, "memory": 0,
    "layers": 1, "data": 1, "losses": 1, "metrics": 1, "metrics_text": 1, "metrics_qa": 1,
    "algorithms": 1, "optim": 1, "hlo": 1, "hub": 1, "tensorfiles": 1,
    "models": 2, "tasks": 2, "llama2c": 2,
    "train": 3, "evaluate": 3, "pretrained": 3, "predict": 3, "convert": 3, "defaults": 3, "baselines": 3, "quickstart": 3,
    "generation": 3, "scores": 3, "beam": 3, "generate": 3, "plan": 3, "plan_report": 3, "bench": 3, "prepare": 3,
}  # fmt: skip


def imported(path: Path) -> set[str]:
    """Returns the parts of fmjax that a file imports at its head, such as "layers" or "train"."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module == "fmjax":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fmjax."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fmjax.")}
    return found


def head(path: Path) -> list[str]:
    """Returns a file's imports that are carried out when it is imported."""
    return [ast.unparse(node) for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_from_below(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for other in imported(path) - {own}:
        assert FLOORS[other] <= FLOORS[own], f"{own} (floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"
        assert {own, other} != {"models", "tasks"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 410


def test_nothing_imports_a_framework_that_is_not_ours() -> None:
    # The benchmark's peer is one, in a process of its own: nothing else imports its files at its head.
    peers = [path for path in FILES if path.parent.name == "bench" and path.name in ("peer.py", "peer_inputs.py")]
    assert len(peers) == 2
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
