"""Sources by name: what a module declares is found, and a source outside of fmjax needs a file and a permission, no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fmjax.data.records import RecordSource, check_columns, hold_out
from fmjax.data.sources.kinds import SourceKind, extensions, find_kind, kinds
from fmjax.data.sources.open import open_source
from fmjax.errors import UserError

TOY = '''
"""Numbers in files of their own kind: one per line, as many as `record` says together."""

from fmjax.data.records import RecordSource
from fmjax.data.sources.kinds import SourceKind


class Numbers(RecordSource):
    columns = ("number", "square")

    def __init__(self, paths, split, columns=()):
        self.name = f"{paths[0].name} {split}"
        self.numbers = [int(line) for path in paths for line in path.read_text().split()]
        self.columns = tuple(columns) or self.columns

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return {"number": self.numbers[index], "square": self.numbers[index] ** 2}

    def where(self, index):
        return f"{self.name} number {index}"

    def fingerprint(self):
        return {"source": "toy", "numbers": self.numbers}


SOURCES = (SourceKind("toy", Numbers, options=("columns",), extensions=(".toy",)),)
'''


@pytest.fixture()
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a source in it, permitted, and a folder of its files."""
    package, data = tmp_path / "my_sources", tmp_path / "data"
    for folder in (package, data):
        folder.mkdir()
    (package / "__init__.py").write_text("")
    (package / "toy.py").write_text(TOY)
    (package / "two.py").write_text(TOY + "\nSOURCES *= 2\n")
    (package / "none.py").write_text("")
    for name, content in (("a.toy", "1\n2\n3\n"), ("b.toy", "4\n"), ("c.txt", "text")):
        (data / name).write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FMJAX_EXTENSIONS", "my_sources")
    yield data
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_sources"]:
        del sys.modules[name]


def test_a_source_outside_of_fmjax_is_opened_by_its_name(toys):
    source = open_source("my_sources.toy", str(toys), "train")
    assert [source[index]["square"] for index in range(len(source))] == [1, 4, 9, 16]
    assert source.value(2, "number") == 3 and source.where(1) == "a.toy train number 1"
    # It takes part in all that is the same for every source.
    part = open_source("my_sources.toy", f"{toys}/*.toy[1:3]", "train", columns=("number",))
    assert [part.value(index, "number") for index in range(len(part))] == [2, 3]
    assert part.fingerprint() == {"source": "toy", "numbers": [1, 2, 3, 4], "slice": "[1:3]"}
    rest, held = hold_out(source, 0.25)
    assert (len(rest), len(held)) == (3, 1)
    check_columns(source, ("square",))


def test_what_a_source_outside_of_fmjax_may_not_do(toys, monkeypatch):
    for arguments, message in (
        (("my_sources.toys", str(toys)), 'data.source="my_sources.toys": cannot be imported'),
        (("my_sources.none", str(toys)), "the module has no `SOURCES`; define it there"),
        (("my_sources.two", str(toys)), "the module declares 2 kinds of source; keep only one in SOURCES"),
        (("my_sources.toy", None), "data.source=my_sources.toy needs files; set --config.data.files.train=FILE"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(*arguments, "train")
    with pytest.raises(UserError, match="data.record is an option of json, text, not of my_sources.toy; leave it out"):
        open_source("my_sources.toy", str(toys), "train", record="line")
    monkeypatch.delenv("FMJAX_EXTENSIONS")
    with pytest.raises(UserError, match="if you trust it, allow its package: export FMJAX_EXTENSIONS=my_sources"):
        open_source("my_sources.toy", str(toys), "train")


def test_every_kind_is_declared_once():
    assert {"text", "csv", "tar", "tfds", "class_folders", "python_docs", "huggingface"} <= set(kinds())
    assert all(kind.name == name and find_kind(name) is kind for name, kind in kinds().items())
    declared = [extension for kind in kinds().values() for extension in kind.extensions]
    assert len(declared) == len(set(declared)) == len(extensions()) and all(text.startswith(".") for text in declared)
    with pytest.raises(UserError, match=r'data.source="parket" \(did you mean "parquet"\?\): choose one of auto, '):
        find_kind("parket")


def test_finding_a_kind_imports_no_heavy_package():
    heavy = ("tensorflow_datasets", "pyarrow", "sklearn", "array_record", "etils", "jax", "grain")
    code = "import sys; from fmjax.data.sources.open import open_source; from fmjax.data.sources.kinds import kinds; kinds(); "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_source_has_a_value_by_default():
    class Letters(RecordSource):
        columns = ("letter",)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return {"letter": "ab"[index]}

    assert Letters().value(1, "letter") == "b" and list(Letters()) == [{"letter": "a"}, {"letter": "b"}]
    with pytest.raises(NotImplementedError):
        Letters().where(0)
    assert SourceKind("letters", Letters).recognizes("a.txt") == 0
