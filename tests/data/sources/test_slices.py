"""Parts of files: every record or character once, by TFDS's grammar, refused where malformed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.data.sources.open import open_source
from fmjax.data.sources.slices import Slice, place
from fmjax.errors import UserError

TEXTS = ["première ligne", "zwei", "三", "four\nlines\n\nhere", "the end"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    (folder / "lines.txt").write_text("".join(f"line {number}\n" for number in range(10)), encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(f'{{"n": {number}}}\n' for number in range(10)), encoding="utf-8")
    (folder / "whole").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "whole" / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "odd[:1]").write_text("a name with brackets", encoding="utf-8")
    return folder


def texts(files, record: str = "line") -> list[str]:
    source = open_source("auto", files, "train", record=record)
    return [source[index]["text"] for index in range(len(source))]


@pytest.mark.parametrize(
    ("part", "numbers"),
    [
        ("[:90%]", range(9)),
        ("[90%:]", range(9, 10)),
        ("[25%:75%]", range(2, 7)),
        ("[99.9%:]", range(9, 10)),
        ("[-25%:]", range(8, 10)),
        ("[:3]", range(3)),
        ("[3:-2]", range(3, 8)),
        ("[:]", range(10)),
        ("[ 1 : 50% ]", range(1, 5)),
    ],
)
def test_parts_of_records(folder, part, numbers):
    assert texts(f"{folder}/lines.txt{part}") == [f"line {number}" for number in numbers]
    source = open_source("auto", [f"{folder}/rows.jsonl{part}"], "train")
    assert [source[index]["n"] for index in range(len(source))] == list(numbers)
    assert source.columns == ("n",) and source.where(0) == f"rows.jsonl line {numbers[0] + 1}"


@settings(deadline=None, max_examples=50)
@given(st.fractions(0, 100).map(lambda share: round(share, 1)), st.integers(1, 2_000_000))
def test_parts_that_meet_have_everything_once(share, count):
    written = f"{float(share)}%"
    border = place(written, count)
    assert border == share * count // 100 and 0 <= border <= count
    if 0 < border < count:
        first, second = (Slice("", *bounds).span(count, "records") for bounds in (("", written), (written, "")))
        assert first == (0, border) and second == (border, count)
    assert place(f"-{written}", count) == count - border


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_characters_of_whole_files_are_counted_through_all_of_them(folder, data):
    whole = "".join(TEXTS)
    begin = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(begin + 1, len(whole)))
    found = texts(f"{folder}/whole[{begin}:{end}]", record="file")
    assert "".join(found) == whole[begin:end] and all(found)
    share = data.draw(st.integers(3, 97))
    parts = [texts(f"{folder}/whole/*.txt{part}", record="file") for part in (f"[:{share}%]", f"[{share}%:]")]
    assert ["".join(part) for part in parts] == [whole[: (border := share * len(whole) // 100)], whole[border:]]


def test_a_cut_record_is_named_by_its_file(folder):
    source = open_source("auto", f"{folder}/whole[16:19]", "train", record="file")
    assert [source[index]["text"] for index in range(len(source))] == ["ei", "三"]
    assert [source.where(index) for index in range(2)] == ["1.txt", "2.txt"] and source.columns == ("text",)


def test_fingerprints_hold_the_part(folder):
    def fingerprint(part: str, record: str) -> dict:
        return open_source("auto", f"{folder}/lines.txt{part}", "train", record=record).fingerprint()

    for record in ("line", "file"):
        plain, part, other = (fingerprint(written, record) for written in ("", "[:90%]", "[90%:]"))
        assert part == plain | {"slice": "[:90%]"} and other == plain | {"slice": "[90%:]"}
        assert fingerprint("[ :90% ]", record) == part


def test_brackets_that_are_no_part(folder):
    assert texts(f"{folder}/[l]ines.txt") == texts(f"{folder}/lines.txt")
    assert open_source("text", f"{folder}/odd[:1]", "train")[0] == {"text": "a name with brackets"}


@pytest.mark.parametrize(
    ("files", "record", "message"),
    [
        ("lines.txt[:x%]", "line", r"lines.txt\[:x%\]: \[:x%\] is not a part; write \[BEGIN:END\]"),
        ("lines.txt[90%]", "line", r"\[90%\] is not a part"),
        ("lines.txt[1:2:3]", "line", "is not a part"),
        ("lines.txt[:1e3]", "line", "is not a part"),
        ("lines.txt[1.5:]", "line", "is not a part"),
        ("lines.txt[5:5]", "line", "selects none of the 10 records"),
        ("lines.txt[:11]", "line", "selects none of the 10 records"),
        ("lines.txt[-11:]", "line", "selects none of the 10 records"),
        ("lines.txt[:1%]", "line", "selects none of the 10 records"),
        ("lines.txt[:100.5%]", "line", r"\[:100.5%\] is not a part"),
        ("lines.txt[:100]", "file", "selects none of the 70 characters; choose a part that contains some"),
        (
            "lines.txt[:5],lines.txt",
            "line",
            r"lines.txt\[:5\]: a part applies to one file, glob or folder; match the 2 files with a glob",
        ),
        ("nowhere.txt[:5]", "line", "nowhere.txt: no such file"),
    ],
)
def test_refused_parts(folder, monkeypatch, files, record, message):
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_source("auto", files, "train", record=record)
    assert "\n" not in str(caught.value)


def test_tiny_shakespeare_is_parted_as_nanogpt_does(shared_data):
    path = shared_data / "lm_tinyshakespeare" / "input.txt"
    first, rest = (texts(f"{path}{part}", record="file") for part in ("[:90%]", "[90%:]"))
    assert [len(text) for text in (*first, *rest)] == [1_003_854, 111_540]
    assert first[0] + rest[0] == path.read_text(encoding="utf-8")
