"""Records that are read many at once are those that are read one by one; so are errors."""

import numpy as np
import pytest

from fmjax.data.records import Selected, block_of, records_of, values_of
from fmjax.data.sources import json_blocks
from fmjax.data.sources.open import open_source
from fmjax.data.stream.tolerance import Tolerance
from fmjax.errors import UserError

USUAL = b'{"text": "a \\ud83d\\ude00 b", "n": 1}\r\n\n{"n": -0, "text": null}\n{"text": "\xc3\xa9"}\n'
FINE = [
    USUAL,
    b"\xef\xbb\xbf" + USUAL,
    b'{"a": true}\n{"a": false}',
    b'{"a": 1}\n{"a": 1.5}\n',
    b'{"a": "x"}\n{"a": ["x"], "b": {"c": 1}}\n',
    b'{"a": "2020-01-01"}\n  \n{"b": "y", "a": "x"}\n',
    b'{"a": 1}\r{"a": 2}\r',
    b' {"a": 1}\n{"a": 123456789012345678901}\n',
    b'{"a": "x"}\n{"\\u0061": "\\u0000"}\n',
]
BAD = [
    b'{"a": 1}\n{"a": 1, "a": 2}\n',
    b'{"a": 1}\n{"a": NaN}\n',
    b'{"a": "x"}\n{"a": "\\ud83d"}\n',
    b'{"a": "x"}\n{"a": "\\ude00"}\n',
    b'{"a": "x"}\n{"a": "\xff"}\n',
    b'{"a": 1} {"a": 2}\n{"a":\n3}\n',
    b'{"a": {}\n,"b": {}}\n',
    b'{"a": 1}\n[1]\n',
    b'{"a": 1}\n{"a": 1} x\n',
    b'{"a": "x\ty"}\n',
    b'{"a": 01}\n{"a": 1,}\n',
]  # fmt: skip


def outcome(path):
    """Returns the columns and records of a file, read one by one, or the error."""
    try:
        source = open_source("jsonl", str(path), "train")
    except UserError as error:
        return str(error)
    records = [source[index] for index in range(len(source))]
    return source.columns, records, [source.where(index) for index in range(len(source))]


@pytest.mark.parametrize("content", FINE + BAD)
def test_lines_of_json_are_read_alike_at_once_and_one_by_one(tmp_path, monkeypatch, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    found = outcome(path)
    assert isinstance(found, str) == (content in BAD)
    if not isinstance(found, str):
        source = open_source("jsonl", str(path), "train")
        assert list(map(repr, records_of(source, range(len(source))))) == list(map(repr, found[1]))
    with Tolerance("skip:9").active():
        source = open_source("jsonl", str(path), "train")
        found_bad = source.block(np.arange(len(source))) is None
    assert found_bad == (content in BAD)
    monkeypatch.setattr(json_blocks, "table", lambda *_: None)
    assert outcome(path) == found


def test_usual_lines_are_read_by_arrow():
    lines = json_blocks.objects(USUAL)
    assert json_blocks.records(USUAL, len(lines), ("n", "text", "c")) == [
        {"n": 1, "text": "a \U0001f600 b", "c": None},
        {"n": 0, "text": None, "c": None},
        {"n": None, "text": "é", "c": None},
    ]


def test_an_error_names_the_line_also_after_lines_that_were_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("fmjax.data.sources.lines.MEGABYTE", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n' * 4 + '{"a": 3}\n{"a": }\n')
    with pytest.raises(UserError, match="a.jsonl line 14: is not JSON"):
        open_source("jsonl", str(path), "train")


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        ("csv", 'a,b\n1,"x\ny ""z"""\n\n2,é\n"3",\n'),
        ("csv", "a,b\r1,2\r3,4\r"),
        ("tsv", 'a\tb\n1\t"x\n2\té\n'),
        ("text", "one\ntwo\n\n\nthree é\n\nfour"),
    ],
)
def test_other_files_are_read_alike_at_once_and_one_by_one(tmp_path, kind, content):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content.encode())
    source = open_source(kind, str(path), "train")
    every = [source[index] for index in range(len(source))]
    assert source.block(np.arange(len(source))) == every == list(records_of(source, range(len(source))))
    some = Selected(source, np.array([0, len(source) - 1]), {})
    assert list(records_of(some, range(2))) == [every[0], every[-1]]
    name = source.columns[0]
    assert list(values_of(source, name, [1])) == [every[1][name]]
    assert block_of(Selected(source, np.array([1, 0]), {}), np.arange(2)) is None
