"""Any text trains: where records are too few to hold some out, a part of their text is."""

from __future__ import annotations

import re

import pytest

from fmjax.data.sources.open import open_source
from fmjax.data.sources.sections import Spans, hold_out_sections, needs_sections
from fmjax.data.splits import open_split
from fmjax.errors import UserError

SENTENCES = [f"Sentence {number} has its end here." for number in range(400)]


def numbers(texts: list[str]) -> list[int]:
    """Returns the numbers of the sentences that are whole in texts."""
    return sorted(int(found) for text in texts for found in re.findall(r"Sentence (\d+) has its end here\.", text))


def parts(path, capsys, share: float = 0.05, **more) -> tuple[list[str], list[str], str]:
    data = {"source": "auto", "files": {"train": str(path)}, "hold_out": share, **more}
    opened = [open_split(data, split) for split in ("train", "validation")]
    rest, held = ([source[index]["text"] for index in range(len(source))] for source in opened)
    said = capsys.readouterr().err
    assert said.count("sections") <= 1, "the training part alone says it"
    assert not said or f"which makes {len(rest)} train and {len(held)} validation records" in said
    return rest, held, " ".join(said.split())


def test_a_book_of_one_paragraph_is_cut_at_sentences(tmp_path, capsys):
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(SENTENCES).encode())
    rest, held, said = parts(path, capsys)
    whole = " ".join(SENTENCES)
    assert numbers(rest + held) == list(range(400))
    assert all(text in whole and text.startswith("Sentence") and text.endswith("here.") for text in rest + held)
    assert 0.03 < sum(map(len, held)) / len(whole) < 0.07 and len(rest) <= len(held) + 1
    assert "data.hold_out=0.05: the training data has 1 record, so the text is cut at sentences into 20" in said
    assert parts(path, capsys)[:2] == (rest, held), "a resumed run validates on the same text"


def test_what_is_held_out_is_frozen(tmp_path, capsys):
    """It must not change between versions: a resumed run would validate on what it trained on."""
    (tmp_path / "a.txt").write_text(" ".join(SENTENCES[:30]))
    _, held, _ = parts(tmp_path / "a.txt", capsys, 0.25)
    assert held == ["Sentence 15 has its end here. Sentence 16 has its end here. Sentence 17 has its end here. "
                    "Sentence 18 has its end here. Sentence 19 has its end here. Sentence 20 has its end here. "
                    "Sentence 21 has its end here. Sentence 22 has its end here."]  # fmt: skip


def test_lines_of_a_whole_file_and_texts_without_borders(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES))
    rest, held, said = parts(tmp_path / "a.txt", capsys, record="file")
    assert "cut at lines into" in said and "\n".join(SENTENCES).count(held[0]) == 1
    (tmp_path / "b.txt").write_text("日本語の文。" * 100)
    rest, held, said = parts(tmp_path / "b.txt", capsys)
    assert "cut at sentences" in said and all(text.endswith("。") for text in rest + held)
    (tmp_path / "c.txt").write_text("e\u0301" * 500)
    rest, held, said = parts(tmp_path / "c.txt", capsys)
    assert "cut at characters" in said and not any(text.startswith("\u0301") for text in rest + held)


def test_a_few_records_are_cut_where_they_end(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(SENTENCES[i : i + 50]) for i in range(0, 400, 50)))
    rest, held, said = parts(tmp_path / "a.txt", capsys)
    assert "has 8 records" in said and numbers(rest + held) == list(range(400))


def test_records_that_are_many_enough_stay_whole(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(SENTENCES))
    rest, held, said = parts(tmp_path / "a.txt", capsys)
    assert (len(rest), len(held), said) == (380, 20, "")
    source = open_source("auto", str(tmp_path / "a.txt"), "train")
    assert not needs_sections(source, 0.05) and not needs_sections(source, 1.5)


def test_where_and_fingerprint(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(SENTENCES))
    rest, held, _ = hold_out_sections(open_source("auto", str(tmp_path / "a.txt"), "train"), 0.05)
    assert isinstance(held, Spans) and held.where(0).startswith("a.txt line 1 (characters ")
    marks = [source.fingerprint() for source in (rest, held)]
    assert [mark["part"] for mark in marks] == ["rest", "held"] and marks[0]["sections"] == marks[1]["sections"] > 10


def test_a_text_of_a_few_words_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a few words")
    with pytest.raises(UserError, match=r"data\.hold_out=0\.05 of 1 record leaves one side empty; add data, or"):
        parts(tmp_path / "a.txt", capsys)


def test_botchan_trains_with_the_defaults(shared_data, capsys):
    rest, held, said = parts(shared_data / "lm_books" / "botchan_en.txt", capsys)
    assert 0.03 < sum(map(len, held)) / sum(map(len, rest + held)) < 0.07 and "1 record" in said
