"""Records from files, TFDS and the embedded corpus: what is read, what is refused, and with which words."""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.data.sources.open import check_columns, hold_out, open_source
from fmjax.errors import UserError

CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=12)


def write(folder, name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


def records(source) -> list:
    return [source[index] for index in range(len(source))]


def texts(path: str, **options) -> list[str]:
    return [record["text"] for record in records(open_source("auto", path, "train", **options))]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.text", "a.txt.gz"])
def test_paragraphs_join_wrapped_lines(tmp_path, name):
    path = write(tmp_path, name, b"\xef\xbb\xbfone\r\ntwo \r\n\r\n \t\r\n\n  three\nfour")
    source = open_source("auto", path, "train")
    assert records(source) == [{"text": "one two"}, {"text": "three four"}]
    assert [source.where(0), source.where(1)] == [f"{name} line 1", f"{name} line 6"]
    assert source.columns == ("text",)


def test_lines_and_files(tmp_path):
    path = write(tmp_path, "a.txt", "one\r\n\n  two\u2028x \nthree")
    assert texts(path, record="line") == ["one", "two\u2028x", "three"]
    assert texts(path, record="file") == ["one\n\n  two\u2028x \nthree"]
    with pytest.raises(UserError, match=r'data.record="lines" \(did you mean "line"\?\): choose one of paragraph, line, file'):
        texts(path, record="lines")


def test_several_files_in_order(tmp_path):
    for name in ("b.txt", "a.txt.gz", "c.md"):
        write(tmp_path, name, f"in {name}")
    write(tmp_path, "README.md", "not data")
    write(tmp_path, "LICENSE.txt", "not data")
    write(tmp_path, "notes.pdf", "not data")
    wanted = ["in a.txt.gz", "in b.txt", "in c.md"]
    assert texts(str(tmp_path)) == wanted
    assert texts(f"{tmp_path}/[a-c].*") == wanted
    assert texts(f"{tmp_path}/a.txt.gz, {tmp_path}/b.txt,{tmp_path}/c.md") == wanted
    assert [record["text"] for record in records(open_source("auto", [f"{tmp_path}/b.txt"], "train"))] == ["in b.txt"]


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.txt", "here")
    assert texts("~/a.txt") == ["here"]


def test_missing_files_name_what_is_there(tmp_path):
    write(tmp_path, "train.txt", "x")
    with pytest.raises(UserError, match=r'trian.txt: no such file \(did you mean "train.txt"\?\); the folder has train.txt'):
        texts(f"{tmp_path}/trian.txt")
    with pytest.raises(UserError, match="nor the folder"):
        texts(f"{tmp_path}/nowhere/train.txt")
    with pytest.raises(UserError, match="no file matches"):
        texts(f"{tmp_path}/*.csv")
    with pytest.raises(UserError, match="no file that ends in .csv"):
        open_source("csv", str(tmp_path), "train")


def test_kinds_of_files_are_not_guessed_or_mixed(tmp_path):
    write(tmp_path, "a.csv", "text\nx\n")
    write(tmp_path, "a.txt", "x")
    with pytest.raises(UserError, match=r"different kinds \(a.csv is csv, a.txt is text\)"):
        texts(str(tmp_path))
    with pytest.raises(UserError, match="a.raw: its file extension is not one of"):
        texts(write(tmp_path, "a.raw", "x"))
    with pytest.raises(UserError, match=r'data.source="tekst" \(did you mean "text"\?\)'):
        open_source("tekst", str(tmp_path), "train")
    with pytest.raises(UserError, match="data.record is an option of json, text, not of csv"):
        open_source("auto", f"{tmp_path}/a.csv", "train", record="line")
    with pytest.raises(UserError, match="set --config.data.files.validation=FILE"):
        open_source("text", None, "validation")
    with pytest.raises(UserError, match="is built in and reads no files"):
        open_source("python_docs", f"{tmp_path}/a.txt", "train")


def test_bad_bytes_are_named_with_their_line(tmp_path):
    with pytest.raises(UserError, match=r"a.txt line 3: is not UTF-8 \(byte 0xe9\)"):
        texts(write(tmp_path, "a.txt", "é\n\ncaf".encode() + b"\xe9\nmore"))
    with pytest.raises(UserError, match="cannot be read .*gzip"):
        (tmp_path / "b.txt.gz").write_bytes(b"plain")
        texts(f"{tmp_path}/b.txt.gz")
    with pytest.raises(UserError, match="is not a complete gzip file"):
        (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-12])
        texts(f"{tmp_path}/c.txt.gz")


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("b.txt", " \n\n"), ("c.csv", "text,label\n"), ("d.jsonl", "\n")])
def test_empty_data_are_refused(tmp_path, name, content):
    with pytest.raises(UserError, match=f"{name}: no records for test"):
        open_source("auto", write(tmp_path, name, content), "test")


def test_an_empty_file_among_others_is_named(tmp_path):
    for name, content in (("a.txt", "one"), ("b.txt", "\n"), ("c.txt", "three")):
        write(tmp_path, name, content)
    with pytest.raises(UserError, match="b.txt: no records for train; use a file that is not empty"):
        texts(str(tmp_path))


def test_json_lines(tmp_path):
    lines = ['{"text": "é \\u00e9", "label": 1, "tags": ["x"]}', "", '{"label": 2.5, "tags": [], "text": ""}']
    path = write(tmp_path, "a.jsonl", "\n".join(lines))
    source = open_source("auto", path, "train")
    assert source.columns == ("text", "label", "tags")
    assert records(source) == [{"text": "é é", "label": 1, "tags": ["x"]}, {"text": "", "label": 2.5, "tags": []}]
    assert source.where(1) == "a.jsonl line 3"


@pytest.mark.parametrize(
    ("line", "message"),
    [("{'a': 1}", "line 2: is not JSON"), ("[1]", "line 2: is not a JSON object"), ('{"a": "\\ud800"}', "line 2: has half of a")],
)
def test_malformed_json_lines(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        open_source("auto", write(tmp_path, "a.ndjson", '{"a": 1}\n' + line), "train")


def test_json_records_need_not_have_the_same_keys(tmp_path):
    """As in Parquet, a value that is not there is None, and the task says so if it needs one."""
    source = open_source("auto", write(tmp_path, "a.jsonl", '{"text": "x", "note": 1}\n{"text": "y", "label": 2}'), "train")
    assert source.columns == ("text", "note", "label")
    assert records(source) == [{"text": "x", "note": 1, "label": None}, {"text": "y", "note": None, "label": 2}]


def test_csv_quoting_and_line_numbers(tmp_path):
    path = write(tmp_path, "a.csv", '\ufefftext,label\r\n"one, ""two""\r\nthree",1\r\n\r\nfour,2\r\n')
    source = open_source("auto", path, "train")
    assert records(source) == [{"text": 'one, "two"\r\nthree', "label": "1"}, {"text": "four", "label": "2"}]
    assert [source.where(0), source.where(1)] == ["a.csv line 2", "a.csv line 5"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_csv_reads_what_csv_writes(tmp_path_factory, rows):
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([("a", "b"), *rows])
    path = write(tmp_path_factory.mktemp("csv"), "a.csv", stream.getvalue())
    assert [tuple(record.values()) for record in records(open_source("auto", path, "train"))] == rows


def test_tsv_has_no_quoting(tmp_path):
    path = write(tmp_path, "a.tsv", 'he said "no\t0\nsize 5\'10"\t1\n')
    source = open_source("auto", path, "train", columns=("text", "label"))
    assert records(source) == [{"text": 'he said "no', "label": "0"}, {"text": "size 5'10\"", "label": "1"}]
    assert source.where(1) == "a.tsv line 2"


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", "text,label\nx,1\ny\n", (), "a.csv line 3: has 1 fields, not the 2 of text, label"),
        ("a.tsv", "x\t1\ny\t2\t3\n", ("text", "label"), r'line 2: has 3 fields.* end with "..."'),
        ("a.csv", "x\t1\n", ("text", "label"), "separated by tabs: use --config.data.source=tsv"),
        ("a.csv", 'text\n"x\ny\n', (), r"a.csv line 2: is not CSV \(unexpected end of data\)"),
        ("a.csv", "text,text\nx,y\n", (), 'two columns have the name "text"'),
    ],
)
def test_malformed_tables(tmp_path, name, content, columns, message):
    with pytest.raises(UserError, match=message):
        open_source("auto", write(tmp_path, name, content), "train", columns=columns)


def test_more_fields_than_columns_on_request(tmp_path):
    path = write(tmp_path, "a.tsv", "x\t1\ny\t2\tsource\n")
    source = open_source("auto", path, "train", columns=("text", "label", "..."))
    assert source.columns == ("text", "label")
    assert records(source) == [{"text": "x", "label": "1"}, {"text": "y", "label": "2"}]


def test_tables_of_several_files_have_one_header(tmp_path):
    write(tmp_path, "a.csv", "text,label\nx,1\n")
    write(tmp_path, "b.csv", "text,label\ny,2\n")
    assert [record["text"] for record in records(open_source("csv", str(tmp_path), "train"))] == ["x", "y"]
    write(tmp_path, "b.csv", "label,text\n2,y\n")
    with pytest.raises(UserError, match="b.csv line 1: the columns are label, text, but those of a.csv are text, label"):
        open_source("csv", str(tmp_path), "train")


def test_check_columns(tmp_path):
    source = open_source("auto", write(tmp_path, "a.csv", "sentence,label\nx,1\n"), "train")
    check_columns(source, ("sentence", "label"))
    with pytest.raises(UserError, match=r'no column "sentense" \(did you mean "sentence"\?\); a.csv line 2 has sentence, label'):
        check_columns(source, ("sentense",))


def test_fingerprints_follow_content_not_place(tmp_path):
    (tmp_path / "moved").mkdir()
    here, there = (write(folder, "a.txt", "one\n\ntwo") for folder in (tmp_path, tmp_path / "moved"))
    first = open_source("text", here, "train").fingerprint()
    assert first == open_source("text", there, "train").fingerprint() == json.loads(json.dumps(first))
    assert str(tmp_path) not in json.dumps(first)
    others = [open_source("text", here, "train", record="line"), open_source("text", here, "test")]
    others.append(open_source("text", write(tmp_path, "a.txt", "one\n\ntwO"), "train"))
    assert first not in [other.fingerprint() for other in others]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_sources_are_pickled_without_their_content(tmp_path, name):
    source = open_source("auto", write(tmp_path, name, "word " * 100_000), "train")
    packed = pickle.dumps(source)
    assert len(packed) < 2000
    assert records(pickle.loads(packed)) == records(source)


def test_reading_ends_at_the_last_record(tmp_path):
    assert len(list(open_source("auto", write(tmp_path, "a.txt", "one\n\ntwo"), "train"))) == 2


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 300), st.floats(0.01, 0.99))
def test_hold_out_parts_the_records(tmp_path_factory, count, share):
    path = write(tmp_path_factory.mktemp("hold"), "a.txt", "\n".join(map(str, range(count))))
    source = open_source("auto", path, "train", record="line")
    if not 0 < round(share * count) < count:
        with pytest.raises(UserError, match="leaves one side empty"):
            hold_out(source, share)
        return
    rest, held = hold_out(source, share)
    assert len(held) == round(share * count)
    assert sorted(int(record["text"]) for record in records(rest) + records(held)) == list(range(count))
    assert rest.fingerprint() != held.fingerprint()
    assert held.where(0) == f"a.txt line {int(held[0]['text']) + 1}"


def test_hold_out_is_frozen(tmp_path):
    """The chosen records must not change between versions: a resumed run would validate on what it trained on."""
    source = open_source("auto", write(tmp_path, "a.txt", "\n".join(map(str, range(20)))), "train", record="line")
    assert [record["text"] for record in records(hold_out(source, 0.25)[1])] == ["2", "4", "6", "8", "18"]
    for share in (0.0, 1.0, -1.0, 1.5):
        with pytest.raises(UserError, match="choose a fraction between 0 and 1"):
            hold_out(source, share)


TFDS = """
import json, pickle, sys
import numpy as np
import tensorflow_datasets as tfds
from fmjax.data.sources.open import open_source
from fmjax.errors import UserError

class TinyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        text, label = tfds.features.Text(), tfds.features.ClassLabel(names=["no", "yes"])
        columns = {"text": text, "label": label, "score": tfds.features.Scalar(np.float32)}
        columns |= {"tags": tfds.features.Sequence(text), "spans": tfds.features.Sequence(np.int32)}
        columns |= {"kinds": tfds.features.Sequence({"kind": label}), "other": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(columns))

    def _split_generators(self, manager):
        return {"train": self.make(8), "test": self.make(2)}

    def _generate_examples(self):
        raise NotImplementedError

    def make(self, count):
        for i in range(count):
            yield i, {"text": f"é {i}", "label": i % 2, "score": 0.5, "tags": ["a", "ü"], "spans": [i, 1],
                      "kinds": [{"kind": 1}, {"kind": 0}], "other": 2 if i else -1}

folder = sys.argv[1]
TinyTexts(data_dir=folder, file_format="array_record").download_and_prepare()

def opened(**options):
    return open_source("tfds", options.pop("files", None), options.pop("split", "train"), **{"data_dir": folder, **options})

def refused(**options):
    try:
        opened(**options)
    except UserError as error:
        return str(error)

source = opened(name="tiny_texts")
again = pickle.loads(pickle.dumps(source))
part = opened(name="tiny_texts", files="train[:50%]", split="validation")
out = {
    "records": [again[i] for i in range(len(again))], "where": source.where(3), "columns": source.columns,
    "mark": source.fingerprint(), "part": len(part), "part_mark": part.fingerprint(), "iterated": len(list(source)),
    "split": refused(name="tiny_texts", split="dev"), "absent": refused(name="glue/sst2"), "config": refused(name="glue/sst3"),
    "unknown": refused(name="tiny_text"), "typo": refused(name="imdb_review"), "nameless": refused(),
    "tensorflow": "tensorflow" in sys.modules, "numbers": [again[i]["label"].number for i in range(len(again))],
}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def tfds_report(tmp_path_factory):
    """What a process of its own saw of a small TFDS data set: this one must not import TFDS for the other tests."""
    command = [sys.executable, "-c", TFDS, str(tmp_path_factory.mktemp("tfds"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_tfds_records_are_plain(tfds_report):
    rows = sorted(tfds_report["records"], key=lambda record: record["text"])
    kinds = {"kind": ["yes", "no"]}
    for i, row in enumerate(rows):
        assert row == {
            "label": ("no", "yes")[i % 2], "score": 0.5, "spans": [i, 1], "tags": ["a", "ü"], "text": f"é {i}", "kinds": kinds,
            "other": "2" if i else None,
        }  # fmt: skip
    assert sorted(tfds_report["columns"]) == ["kinds", "label", "other", "score", "spans", "tags", "text"]
    # The source's numbers stay known: older runs have them for labels.
    assert sorted(tfds_report["numbers"]) == [0] * 4 + [1] * 4
    assert tfds_report["where"] == "tiny_texts/1.2.0 train record 3"
    assert tfds_report["iterated"] == 8


def test_tfds_needs_no_tensorflow(tfds_report):
    assert tfds_report["tensorflow"] is False


def test_tfds_parts_of_splits(tfds_report):
    assert tfds_report["part"] == 4
    assert tfds_report["mark"] != tfds_report["part_mark"]
    assert tfds_report["mark"]["name"] == "tiny_texts/1.2.0"


def test_tfds_refusals(tfds_report):
    assert 'no split "dev"; choose from train, test' in tfds_report["split"]
    assert "--config.data.download=true" in tfds_report["absent"]
    assert "cola, sst2" in tfds_report["config"]
    assert 'TFDS has no data set "tiny_text"' in tfds_report["unknown"]
    assert 'did you mean "imdb_reviews"' in tfds_report["typo"]
    assert "--config.data.name" in tfds_report["nameless"]
    assert not any("\n" in tfds_report[name] for name in ("split", "absent", "config", "unknown", "typo", "nameless"))


def test_the_real_files(shared_data):
    sst2 = open_source("tsv", str(shared_data / "cls_sst2" / "train.tsv"), "train", columns=("text", "label"))
    assert len(sst2) == 6920 and {record["label"] for record in records(sst2)} == {"0", "1"}
    names = ("genre", "file", "year", "id", "score", "first", "second", "...")
    stsb = open_source("tsv", str(shared_data / "glue_stsb" / "sts-train.csv"), "train", columns=names)
    assert len(stsb) == 5749 and 0 <= np.mean([float(record["score"]) for record in records(stsb)]) <= 5
    reviews = open_source("auto", str(shared_data / "zh_chinesenlpcorpus" / "waimai_10k.csv"), "train")
    assert len(reviews) == 11987 and reviews.columns == ("label", "review")
