"""What formats say, and Python's text functions do not: their blanks, line breaks, byte order marks, extensions in any case."""

from __future__ import annotations

import gzip
import json

import pytest

from fmjax.data.characters import is_blank, is_mark, numbered_lines, split_fields
from fmjax.data.sources.open import open_source
from fmjax.errors import UserError


def records(path, source: str = "auto", **options) -> list:
    opened = open_source(source, str(path), "train", **options)
    return [opened[index] for index in range(len(opened))]


def test_blanks_are_those_of_formats():
    assert split_fields("\t10\u00a0000  B-NUM\r\n") == ["10\u00a0000", "B-NUM"]
    assert split_fields(" \t\n") == [] and is_blank("\r\n") and not is_blank("\u00a0") and not is_blank("\x1f")
    assert is_mark("\u0301") and is_mark("ी") and not is_mark("e") and not is_mark("\u200d")


@pytest.mark.parametrize("blank", ["\u00a0", "\u3000", "\u2009", "\x85", "\x1f"])
def test_a_word_of_conll_holds_blanks_of_unicode(tmp_path, blank):
    (tmp_path / "a.conll").write_text(f"10{blank}000 B-NUM\n{blank} O\n{blank}\tO\n", encoding="utf-8", newline="")
    assert records(tmp_path / "a.conll") == [{"tokens": [f"10{blank}000", blank, blank], "tags": ["B-NUM", "O", "O"]}]


# Content with a byte order mark and line feeds, by file extension, and the records.
FILES = {
    "conll": ("\ufeffone B\ntwo O\n\n3 O\n", [{"tokens": ["one", "two"], "tags": ["B", "O"]}, {"tokens": ["3"], "tags": ["O"]}]),
    "csv": ('\ufefftext,label\none,1\n"two\nlines",2\n', [{"text": "one", "label": "1"}, {"text": "two\nlines", "label": "2"}]),
    "tsv": ("\ufefftext\tlabel\none\t1\ntwo\t2", [{"text": "one", "label": "1"}, {"text": "two", "label": "2"}]),
    "jsonl": ('\ufeff{"a": 1}\n\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
    "txt": ("\ufeffone\ntwo\n\nthree\n", [{"text": "one two"}, {"text": "three"}]),
}  # fmt: skip


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("ending", FILES)
def test_line_breaks_byte_order_marks_and_upper_case(tmp_path, ending, line_break):
    content, wanted = FILES[ending]
    path = tmp_path / f"A.{ending.upper()}.GZ"
    path.write_bytes(gzip.compress(content.replace("\n", line_break).encode()))
    found = json.loads(json.dumps(records(path)).replace("\\r\\n", "\\n"))
    assert found == wanted
    opened = open_source("auto", str(path), "train")
    assert opened.where(1).rpartition(" ")[2] == str({"conll": 4, "txt": 4, "tsv": 3, "csv": 3, "jsonl": 3}[ending])


def test_a_whole_file_of_carriage_returns_has_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\rtwo\r")
    assert records(tmp_path / "a.txt", record="file") == [{"text": "one\ntwo\n"}]
    assert records(tmp_path / "a.txt", record="line") == [{"text": "one"}, {"text": "two"}]


def test_carriage_returns_beside_line_feeds_are_no_blanks_of_conll(tmp_path):
    (tmp_path / "a.conll").write_bytes(b"one B-X\rtwo O\rthree O\n")
    with pytest.raises(UserError, match="a.conll line 1: has a carriage return inside; end each line with a line feed"):
        records(tmp_path / "a.conll")


def test_lines_of_streams():
    assert list(numbered_lines(["a\n", "b\rc\n", "d"])) == [(1, "a\n"), (2, "b\rc\n"), (3, "d")]
    assert list(numbered_lines(["a\rb\r"])) == [(1, "a\n"), (2, "b\n")] and list(numbered_lines([])) == []


def test_folders_take_files_in_upper_case(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert records(tmp_path) == [{"text": "one"}, {"text": "two"}]


def test_what_was_opened_as_csv_can_be_opened_as_tsv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text\tlabel\n" + "the dog sleeps\tx\n" * 5000)  # large enough for a stored index
    assert open_source("csv", str(path), "train").columns == ("text\tlabel",)
    source = open_source("tsv", str(path), "train")
    assert source[4999] == {"text": "the dog sleeps", "label": "x"}
