"""The wheel: it holds every file that is needed, and works where there is no checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fmjax.config.shipped import shipped_configs

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"fmjax": "fmjax", "scripts": "fmjax/scripts", "configs": "fmjax/configs"}


def sources() -> dict[str, Path]:
    """Returns the files of the checkout that are installed, by their name in the wheel."""
    found = {}
    for folder, installed in FOLDERS.items():
        for pattern in ("*.py", "*.toml", "py.typed"):
            for path in (ROOT / folder).rglob(pattern):
                found[f"{installed}/{path.relative_to(ROOT / folder).as_posix()}"] = path
    return found


def test_every_file_is_listed():
    tool = PROJECT["tool"]["setuptools"]
    assert {name.replace(".", "/"): folder for name, folder in tool["package-dir"].items()} == {
        installed: folder for folder, installed in FOLDERS.items()
    }
    packages = {package.replace(".", "/") for package in tool["packages"]}
    assert {name.rpartition("/")[0] for name in sources()} == packages
    for name, path in sources().items():
        patterns = tool["package-data"].get(name.rpartition("/")[0].replace("/", "."), ())
        assert path.suffix == ".py" or any(fnmatch(path.name, pattern) for pattern in patterns), name
    # Whatever else is read at run time would be missing.
    others = [path for path in (ROOT / "fmjax").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {path.suffix for path in others} <= {".py", ".md", ".typed"}


def test_every_command_is_there():
    for name, target in PROJECT["project"]["scripts"].items():
        module, _, function = target.partition(":")
        path = ROOT / "scripts" / f"{module.removeprefix('fmjax.scripts.')}.py"
        assert f"def {function}(" in path.read_text(encoding="utf-8"), name
        assert name == f"fmjax-{path.stem.replace('_', '-')}"
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"}
    assert len(PROJECT["project"]["scripts"]) == len(scripts)


def test_no_advice_to_install_a_name_that_is_not_ours():
    # fmjax is on no package index: `pip install fmjax` would install whatever someone else puts there.
    advice = re.compile(r"install\s+(?:-\w+\s+)*['\"]?fmjax(?:\[|['\"`]|\s*$|==)")
    pages = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    for path in pages:
        if path.suffix in (".py", ".md", ".sh"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                assert not advice.search(line), f"{path}:{number}: {line.strip()}"


@pytest.mark.full
def test_the_wheel_works_from_an_empty_folder(tmp_path):
    checkout, here, home = tmp_path / "checkout", tmp_path / "empty", tmp_path / "venv"
    checkout.mkdir()
    here.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, checkout)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(*words: object, code: int = 0) -> str:
        done = subprocess.run([str(word) for word in words], cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == code, f"{words}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, checkout)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if ".dist-info/" not in name} == set(sources())

    # The dependencies are those of the suite's environment, whose own fmjax is not seen.
    run(sys.executable, "-m", "venv", "--without-pip", home)
    purelib = Path(run(home / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(*pip, "--python", home / "bin" / "python", "install", "--quiet", "--no-deps", "--no-index", wheel)
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    commands = home / "bin"
    assert Path(run(commands / "python", "-c", "import fmjax; print(fmjax.__file__)").strip()).is_relative_to(purelib)

    assert run(commands / "fmjax-train", "--version").startswith(f"fmjax {PROJECT['project']['version']} ")
    assert [line.split()[0] for line in run(commands / "fmjax-train", "--list").splitlines()] == list(shipped_configs())
    assert "model.width=" in run(commands / "fmjax-train", "--config", "bert_mlm:tiny", "--help")
    small = ("--config.train.steps=2", "--config.model.layers=1", "--config.data.vocab_size=300", "--config.data.source=text")
    (here / "texts.txt").write_text("The cat sat on the mat.\n\n" * 200)
    files = "--config.data.files.train=texts.txt"
    run(commands / "fmjax-train", "--config", "bert_mlm:tiny", "--workdir", "run", *small, files)
    (here / "in.txt").write_text("The [MASK] sat.\n")
    run(commands / "fmjax-predict", "--workdir", "run", "--input", "in.txt", "--output", "out.jsonl")
    assert len(json.loads((here / "out.jsonl").read_text())["masks"][0]) == 5
    refused = run(commands / "fmjax-train", "--config", "bert_mln:tiny", "--workdir", "other", code=2)
    assert 'no such file (did you mean "bert_mlm.py"?)' in refused
    assert "Pretraining changes accuracy" in run(commands / "fmjax-quickstart", "--tiny", "--seeds", "1")
