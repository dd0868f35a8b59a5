"""Files are whole or as they were, whatever ends the writing."""

from __future__ import annotations

import os

import pytest

from fmjax.config.json_files import (
    open_atomically,
    parse_json,
    read_json,
    write_atomically,
    write_json,
)
from fmjax.errors import UserError


def test_what_is_written_is_there_whole(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "ä\n")
    assert path.read_bytes() == "ä\n".encode() and [file.name for file in tmp_path.iterdir()] == [
        "a.txt"
    ]
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"


def test_a_failure_leaves_the_old_content_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(KeyboardInterrupt), open_atomically(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_utf8_and_holds_what_a_command_line_may(tmp_path):
    path, content = (
        tmp_path / "a.json",
        {"b": "ä", "a": "caf\udce9"},
    )  # an argument that is no UTF-8
    write_json(path, content)
    assert (
        "ä".encode() in path.read_bytes()
        and read_json(path) == content
        and path.read_text().endswith("}\n")
    )
    write_json(path, content, indent=2, sort_keys=True)
    assert path.read_text().startswith('{\n  "a"')


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "contains a JSON list, not an object"),
        (b"{", "is not JSON"),
        (b'"\xff"', "is not JSON"),
        (None, "no such file; here"),
    ],
)
def test_what_is_no_json_object_is_named(content, message, tmp_path):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read_json(path, missing="no such file; here")
    assert str(raised.value).startswith(f"{path}: ")


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"a": {"b": 1, "c": 2, "b": 3}}', encoding="utf-8")
    with pytest.raises(UserError, match=r'a\.json: the key "b" occurs twice in a JSON object; remove one$'):
        read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match='the key "a" occurs twice'):
        parse_json('[{"a": 1, "a": 1}]')
    assert parse_json('[{"a": 1}, {"a": 2}]') == [{"a": 1}, {"a": 2}]
    for text in ("NaN", "[Infinity]", "-Infinity", "{'a': 1}"):
        with pytest.raises(ValueError, match="."):
            parse_json(text)
