"""The run directory: where its contents came from."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fmjax.runs import folder


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Returns a function that makes a repository with a commit, and fmjax's file below it."""

    def make(place: str) -> tuple[str, Path]:
        root = tmp_path / place.replace("/", "-")
        file = root / place / "fmjax" / "runs" / "folder.py"
        file.parent.mkdir(parents=True)
        file.write_text("")
        who = ("-c", "user.name=A", "-c", "user.email=a@b")
        for words in (("init", "-q"), ("add", "-A"), (*who, "commit", "-qm", "first")):
            subprocess.run(["git", "-C", str(root), *words], check=True)
        head = ["git", "-C", str(root), "rev-parse", "HEAD"]
        found = subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()
        monkeypatch.setattr(folder, "__file__", str(file))
        return found, root

    return make


def test_a_checkout_has_its_commit(repository):
    head, root = repository(".")
    assert folder.commit() == head
    (root / "fmjax" / "runs" / "folder.py").write_text("changed")
    assert folder.commit() == f"{head}-dirty"


def test_the_commit_of_the_project_that_fmjax_is_installed_in_is_not_its_own(repository):
    head, _ = repository(".venv/lib/python3.11/site-packages")
    assert folder.commit() != head


def test_a_hook_of_another_repository_does_not_mislead(repository, monkeypatch):
    _, root = repository("other")
    head, _ = repository(".")
    monkeypatch.setenv("GIT_DIR", str(root / ".git"))
    assert folder.commit() == head
