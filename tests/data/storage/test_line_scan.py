"""Lines that are found a megabyte at a time are those that are found one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmjax.data.storage import line_scan
from fmjax.data.storage.mapped import File, lines
from fmjax.data.stream.tolerance import Tolerance
from fmjax.errors import UserError

WHITE = [chr(code) for code in range(0x110000) if chr(code).isspace()]
PIECES = st.sampled_from(["a", "é", "中", "\u200b", "\ufeff", "\n", "\n\n", "\r", "\r\n", *WHITE])


def test_white_space_is_that_of_strip():
    assert [chr(code) for code in range(128) if line_scan.WHITE[code]] == [letter for letter in WHITE if letter < "\x80"]
    assert all(line_scan.WIDE.fullmatch(letter.encode()) for letter in WHITE if letter >= "\x80")
    others = "".join(chr(code) for code in range(0x80, 0x110000) if not chr(code).isspace() and not 0xD800 <= code < 0xE000)
    assert line_scan.WIDE.search(others.encode()) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(PIECES, max_size=30).map("".join), st.sampled_from([1, 3, 2**20]), st.booleans())
@example("\ufeff\u3000\n \x85\n中\n\na\n", 4, False)
def test_lines_and_paragraphs(tmp_path_factory, text, chunk, bad):
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes(text.encode() + (b"\xe3\x80\n\xff" if bad else b""))
    file = File(path)
    with pytest.MonkeyPatch.context() as patch, Tolerance("skip:9").active():
        patch.setattr(line_scan, "MEGABYTE", chunk)
        slow = list(lines(file))
        tables = list(line_scan.line_tables(file))
        found = [np.concatenate([*parts, np.zeros(0, int)]).tolist() for parts in zip(*tables, strict=True)] or [[]] * 3
        assert found == [[line.begin for line in slow], [line.end for line in slow], [bool(line.text.strip()) for line in slow]]
        wanted, begin = [], None
        for line in slow:
            if line.text.strip():
                begin, end = line.begin if begin is None else begin, line.end
            elif begin is not None:
                wanted.append([begin, end])
                begin = None
        wanted += [[begin, end]] if begin is not None else []
        assert [row for part in line_scan.paragraphs(file) for row in part.tolist()] == wanted


def test_a_line_that_is_not_utf8_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes("eins\nzwei\nfünf\n\n".encode() * 2 + b"\xff\n")
    monkeypatch.setattr(line_scan, "MEGABYTE", 7)
    with pytest.raises(UserError, match=r"a.txt line 9: is not UTF-8 \(byte 0xff\)"):
        list(line_scan.paragraphs(File(tmp_path / "a.txt")))
