"""ArrayRecord files of JSON objects and of texts: any record by its number, and what is damaged by its name."""

from __future__ import annotations

import json
import pickle

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from fmjax.data.sources.open import open_source
from fmjax.errors import UserError

ROWS = [{"text": f"é {number}", "label": number, "tags": ["a"] * (number % 3)} for number in range(500)]


def write(path, records, options: str = "group_size:1") -> str:
    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode())
    writer.close()
    return str(path)


def opened(path, split: str = "train"):
    return open_source("auto", str(path), split)


def records(source) -> list:
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("options", ["group_size:1", "group_size:64"])
def test_objects(tmp_path, options):
    source = opened(write(tmp_path / "a.array_record", ROWS, options))
    assert records(source) == ROWS and source[-1] == ROWS[-1] and source.columns == ("text", "label", "tags")
    assert source.where(321) == "a.array_record record 321"
    packed = pickle.dumps(source)
    assert len(packed) < 1000 and records(pickle.loads(packed)) == ROWS
    with pytest.raises(IndexError):
        source[500]


def test_texts(tmp_path):
    texts = ["one\ntwo", "", '{"not": json', "三"]
    source = opened(write(tmp_path / "a.array_record", [text.encode() for text in texts]))
    assert records(source) == [{"text": text} for text in texts] and source.columns == ("text",)


def test_shards_under_the_names_of_tfds(tmp_path):
    for number in range(3):
        write(tmp_path / f"x-train.array_record-{number:05d}-of-00003", ROWS[number * 10 : number * 10 + 10])
    source = opened(tmp_path)
    assert records(source) == ROWS[:30] and source.where(25) == "x-train.array_record-00002-of-00003 record 5"
    assert records(opened(f"{tmp_path}/x-train*[90%:]")) == ROWS[27:30]
    mark = source.fingerprint()
    assert mark == json.loads(json.dumps(mark)) and len({file["sha256"] for file in mark["files"]}) == 3
    write(tmp_path / "x-train.array_record-00001-of-00003", [])
    with pytest.raises(UserError, match="x-train.array_record-00001-of-00003: no records for train"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"\xff\xfe", r"is not UTF-8 \(byte 0xff\)"),
        (b"plain", "is not JSON .*, like the first record"),
        (b"[1]", "is not a JSON object"),
        (b'{"text": "\\ud800"}', "has half of a surrogate pair"),
    ],
)
def test_a_bad_record_is_named(tmp_path, record, message):
    source = opened(write(tmp_path / "a.array_record", [*ROWS[:2], record]))
    with pytest.raises(UserError, match=f"a.array_record record 2: {message}") as caught:
        source[2]
    assert "\n" not in str(caught.value)


def test_objects_need_not_have_the_same_keys(tmp_path):
    source = opened(write(tmp_path / "a.array_record", [b'{"n": 1}', b"[1]", b'{"m": 2}']))
    assert source.columns == ("n", "m") and source[0] == {"n": 1, "m": None} and source[2] == {"n": None, "m": 2}


def test_what_tfds_stores_is_refused(tmp_path):
    example = b"\n\x14\n\x12\n\x04text\x12\n\n\x08\n\x05hello\x05"  # a tf.train.Example, which happens to be UTF-8
    with pytest.raises(UserError, match="record 0: is neither a JSON object nor text .*data.source=tfds"):
        opened(write(tmp_path / "a.array_record", [example]))


def test_no_file_that_is_cut_off_is_read(tmp_path):
    write(tmp_path / "whole.array_record", ROWS)
    whole = (tmp_path / "whole.array_record").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.array_record").write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"array_record: is not a complete ArrayRecord file \(.+\); fetch it again") as caught:
            opened(tmp_path / "a.array_record")
        assert "\n" not in str(caught.value)


def test_a_damaged_record_is_named(tmp_path):
    write(tmp_path / "a.array_record", ROWS)
    whole = bytearray((tmp_path / "a.array_record").read_bytes())
    place = whole.index(b"(\xb5/\xfd", 2000)  # a block that zstd packed
    whole[place + 12] ^= 255
    (tmp_path / "a.array_record").write_bytes(whole)
    source = opened(tmp_path / "a.array_record")
    bad = []
    for index in range(len(source)):
        try:
            assert source[index] == ROWS[index]
        except UserError as error:
            assert f"a.array_record record {index}: cannot be read" in str(error) and "\n" not in str(error)
            bad.append(index)
    assert len(bad) == 1
