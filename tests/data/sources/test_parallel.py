"""Line-aligned files of several languages, and pairs in tab-separated files."""

from __future__ import annotations

import gzip
import pickle

import pytest

from fmjax.data.sources.open import hold_out, open_source
from fmjax.errors import UserError

ENGLISH, GERMAN = "A dog.\nTwo men.\n\nA girl.", "Ein Hund.\r\nZwei Männer.\n \nEin Mädchen.\n"


@pytest.fixture
def files(tmp_path):
    (tmp_path / "train.en").write_text(ENGLISH, encoding="utf-8")
    with gzip.open(tmp_path / "train.de.gz", "wt", encoding="utf-8", newline="") as stream:
        stream.write(GERMAN)
    return f"{tmp_path}/train.en,{tmp_path}/train.de.gz"


def test_lines_go_together(files):
    source = open_source("parallel", files, split="train")
    assert source.columns == ("en", "de") and len(source) == 3
    assert source[1] == {"en": "Two men.", "de": "Zwei Männer."}
    assert source[2] == {"en": "A girl.", "de": "Ein Mädchen."}
    assert source.where(2) == "train.en, train.de.gz line 4"
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
    rest, held = hold_out(source, 0.3)
    assert len(rest) == 2 and len(held) == 1


def test_columns_can_be_named(files):
    source = open_source("parallel", files, split="train", columns=("source", "target"))
    assert source[0] == {"source": "A dog.", "target": "Ein Hund."}


def test_the_fingerprint_tells_order_names_and_content(files, tmp_path):
    prints = [open_source("parallel", files, split="train").fingerprint()]
    prints.append(open_source("parallel", ",".join(reversed(files.split(","))), split="train").fingerprint())
    prints.append(open_source("parallel", files, split="train", columns=("a", "b")).fingerprint())
    (tmp_path / "train.en").write_text(ENGLISH.replace("dog", "cat"), encoding="utf-8")
    prints.append(open_source("parallel", files, split="train").fingerprint())
    assert all(one != other for i, one in enumerate(prints) for other in prints[:i])
    assert str(tmp_path) not in str(prints)


@pytest.mark.parametrize(
    ("english", "columns", "named"),
    [
        ("A dog.\nTwo men.\n", (), "numbers of lines are 2 in train.en, 4 in train.de.gz"),
        ("A dog.\n\n\nA girl.", (), "train.en line 2: is blank, but its counterpart is not"),
        ("A dog.\nTwo men.\nA cat.\nA girl.", (), "train.de.gz line 3: is blank"),
        (ENGLISH, ("en",), r"names 1 columns \(en\) for 2 files"),
        (ENGLISH, ("en", "en"), "do not name the columns"),
    ],
)
def test_what_does_not_fit_is_refused(files, tmp_path, english, columns, named):
    (tmp_path / "train.en").write_text(english, encoding="utf-8")
    with pytest.raises(UserError, match=named) as caught:
        open_source("parallel", files, split="train", columns=columns)
    assert "\n" not in str(caught.value)


def test_one_file_and_blank_files_are_refused(files, tmp_path):
    with pytest.raises(UserError, match="train.en is one file"):
        open_source("parallel", files.split(",")[0], split="train")
    for name in ("a.en", "a.de"):
        (tmp_path / name).write_text("\n\n")
    with pytest.raises(UserError, match="no records for train"):
        open_source("parallel", f"{tmp_path}/a.en,{tmp_path}/a.de", split="train")


def test_pairs_in_a_tab_separated_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "cmn.txt").write_bytes("\ufeffHi.\t嗨。\tCC-BY 2.0\nRun.\t跑。\tCC-BY 2.0\n".encode())
    source = open_source("tsv", str(tmp_path / "cmn.txt"), split="train", columns=("en", "zh", "..."))
    assert source[0] == {"en": "Hi.", "zh": "嗨。"} and len(source) == 2


def test_real_corpora(shared_data):
    folder = shared_data / "mt_multi30k"
    source = open_source("parallel", f"{folder}/val.en.gz,{folder}/val.de.gz", split="validation")
    assert len(source) == 1014 and source[0]["de"].startswith("Eine Gruppe von Männern")
    pairs = open_source("tsv", f"{shared_data}/mt_tatoeba_en_zh/cmn.txt.gz", split="train", columns=("en", "zh", "..."))
    assert len(pairs) == 29155 and pairs[0]["en"] == "Hi."
