"""Files are read and written as UTF-8 whatever the locale says."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [path for folder in ("fmjax", "scripts", "configs") for path in (ROOT / folder).rglob("*.py")]
# What reads or writes text in the encoding of the locale unless it is told another, and the number
# of the argument that is a mode, from which one sees whether it is text.
MODES = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0}
ALWAYS = ("read_text", "write_text", "TextIOWrapper")


def is_text_without_encoding(call: ast.Call) -> bool:
    """Returns whether a call opens text, or a process's pipes as text, in the locale's encoding."""
    keywords = {word.arg: word.value for word in call.keywords}
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if "encoding" in keywords:
        return False
    if isinstance(pipes := keywords.get("text"), ast.Constant) and pipes.value is True:
        return True
    if name in ALWAYS:
        # What read_text is given by position is an encoding, or names a file of a package's metadata.
        return name != "read_text" or not call.args
    if name not in MODES:
        return False
    method = isinstance(call.func, ast.Attribute) and name == "open"  # Path.open(mode), or gzip.open(path) and its like
    place = 0 if method else MODES[name]
    mode = call.args[place] if len(call.args) > place else keywords.get("mode")
    if not isinstance(mode, ast.Constant):
        return mode is None and not method and name in ("open", "fdopen")
    return bool(re.fullmatch(r"[rwax]t?\+?", str(mode.value)))


def test_every_text_file_has_an_encoding():
    found = []
    for path in FILES:
        calls = (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call))
        found += [f"{path.name}:{call.lineno}: {ast.unparse(call)}" for call in calls if is_text_without_encoding(call)]
    assert len(FILES) > 150 and not found


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open('a')", True),
        ("gzip.open(path)", False),
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("os.fdopen(1, 'w')", True),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("tempfile.NamedTemporaryFile()", False),
        ("subprocess.run(words, text=True)", True),
    ],
)
def test_the_check_finds_what_it_looks_for(code, found):
    assert is_text_without_encoding(ast.parse(code).body[0].value) is found


SCRIPT = """
import sys
from fmjax.config import commandline

def main():
    flags = commandline.Flags("A command.")
    flags.add("--name")
    return commandline.run(flags, lambda args: print(args.name, open(args.name, encoding="utf-8").read()))

sys.exit(main())
"""


def test_a_command_reads_names_and_prints_in_any_locale(tmp_path):
    (tmp_path / "数据.csv").write_text("标签", encoding="utf-8")
    (tmp_path / "command.py").write_text(SCRIPT, encoding="utf-8")
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "command.py", "--name=数据.csv"]
    done = subprocess.run([word.encode() for word in words], cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, done.stdout.decode()) == (0, "数据.csv 标签\n"), done.stderr.decode()
