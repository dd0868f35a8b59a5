"""Arrow, Parquet and folders of `datasets`: read as they were written, in any order, and refused by name where damaged."""

from __future__ import annotations

import hashlib
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from fmjax.contracts import Column, Processors
from fmjax.data.kinds import image as image_kind
from fmjax.data.sources.open import check_columns, open_source
from fmjax.data.storage import arrow_files, cache
from fmjax.errors import UserError
from fmjax.tasks import image_classify
from fmjax.tasks.classify import Task

ROWS = [
    {
        "text": f"é {number}",
        "label": number % 3 - 1,
        "score": number / 2,
        "right": number % 2 == 0,
        "words": ["a", "ü"][: number % 3],
        "tags": [number % 2, 1],
        "answers": {"text": ["x"], "answer_start": [number]},
        "kind": "odd" if number % 2 else "even",
        "none": None,
    }
    for number in range(2500)
]
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "label": pa.int64(),
        "score": pa.float32(),
        "right": pa.bool_(),
        "words": pa.list_(pa.large_string()),
        "tags": pa.list_(pa.int32()),
        "answers": pa.struct({"text": pa.list_(pa.string()), "answer_start": pa.list_(pa.int32())}),
        "kind": pa.dictionary(pa.int8(), pa.string()),
        "none": pa.null(),
    }
)
FEATURES = {
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["O", "B-PER"], "_type": "ClassLabel"}, "length": -1, "_type": "Sequence"},
    "answers": {"feature": {"text": {"_type": "Value"}, "answer_start": {"_type": "Value"}}, "_type": "Sequence"},
}
NAMED = [
    row | {"label": [None, "bad", "good"][row["label"] + 1], "tags": [["O", "B-PER"][tag] for tag in row["tags"]]} for row in ROWS
]


def table(rows=ROWS, metadata=None) -> pa.Table:
    return pa.Table.from_pylist(rows, SCHEMA).replace_schema_metadata(metadata)


def write_arrow(path, content: pa.Table, form=pa.ipc.new_stream, compression=None) -> str:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as stream, form(stream, content.schema, options=options) as writer:
        writer.write_table(content, max_chunksize=1000)
    return str(path)


def write_parquet(path, content: pa.Table) -> str:
    parquet.write_table(content, path, row_group_size=900)
    return str(path)


def write_saved(folder, parts: list[pa.Table], features=FEATURES) -> str:
    """Writes a folder as `Dataset.save_to_disk` of datasets 4 does."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(parts):05d}.arrow" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        write_arrow(folder / name, part)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"description": "", "features": features, "splits": None}))
    return str(folder)


def records(source) -> list:
    return [source[index] for index in range(len(source))]


def opened(path, columns=(), source: str = "auto", split: str = "train"):
    return open_source(source, str(path), split, columns=columns)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    write_arrow(folder / "stream.arrow", table())
    write_arrow(folder / "file.arrow", table(), pa.ipc.new_file)
    write_arrow(folder / "packed.arrow", table(), compression="zstd")
    write_parquet(folder / "table.parquet", table())
    return folder


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "packed.arrow", "table.parquet"])
def test_every_form_has_the_same_records(folder, name):
    source = opened(folder / name)
    assert source.columns == tuple(SCHEMA.names) and len(source) == len(ROWS)
    assert records(source) == ROWS and source[-1] == ROWS[-1]
    assert source.where(2345) == f"{name} record 2345"
    packed = pickle.dumps(source)
    assert len(packed) < 3000 and records(pickle.loads(packed)) == ROWS
    with pytest.raises(IndexError):
        source[len(ROWS)]


def test_what_is_mapped_and_what_is_rewritten(folder):
    """Nothing of a plain Arrow file is copied; the others are, once, into batches that are small enough to be mapped."""
    before = pa.total_allocated_bytes()
    sources = {path.name: opened(path) for path in sorted(folder.glob("*.*"))}
    assert pa.total_allocated_bytes() - before < 20_000  # dictionaries alone
    mapped = {name: source.files[0].local == folder / name for name, source in sources.items()}
    assert mapped == {"stream.arrow": True, "file.arrow": True, "packed.arrow": False, "table.parquet": False}
    assert max(batch.num_rows for batch in sources["table.parquet"].files[0].batches) <= arrow_files.BATCH
    changed = sources["table.parquet"].files[0].local.stat().st_mtime_ns
    assert opened(folder / "table.parquet").files[0].local.stat().st_mtime_ns == changed


@pytest.mark.parametrize("name", ["stream.arrow", "table.parquet"])
def test_columns_are_chosen(folder, name):
    source = opened(folder / name, ("score", "text"))
    assert source.columns == ("score", "text") and source[7] == {"score": 3.5, "text": "é 7"}
    assert source.fingerprint() != opened(folder / name).fingerprint()
    with pytest.raises(UserError, match=rf'{name} has no column "txt" \(did you mean "text"\?\); it has text, label'):
        opened(folder / name, ("txt",))
    with pytest.raises(UserError, match=rf'no column "sentense".*; {name} record 0 has score, text'):
        check_columns(source, ("sentense",))


def test_parts_and_several_files(folder, tmp_path):
    for number in range(3):
        write_parquet(tmp_path / f"train-{number:05d}-of-00003.parquet", table(ROWS[number * 100 : number * 100 + 100]))
    source = opened(tmp_path / "train-*.parquet")
    assert records(source) == ROWS[:300]
    assert source.where(250) == "train-00002-of-00003.parquet record 50"
    assert [mark["name"] for mark in source.fingerprint()["files"]] == [path.name for path in sorted(tmp_path.iterdir())]
    assert records(opened(f"{tmp_path}[50%:]")) == ROWS[150:300]
    write_parquet(tmp_path / "train-9.parquet", table().select(["text"]))
    with pytest.raises(UserError, match='train-9.parquet: column "label" is missing, but that of train-00000'):
        opened(tmp_path)
    write_parquet(tmp_path / "train-9.parquet", table([]))
    with pytest.raises(UserError, match="train-9.parquet: no records for train"):
        opened(tmp_path)


def test_folders_of_datasets(tmp_path):
    write_saved(tmp_path / "both" / "train", [table(ROWS[:10]), table(ROWS[10:25])])
    write_saved(tmp_path / "both" / "dev", [table(ROWS[25:30])])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["train", "dev"]}')
    source = opened(tmp_path / "both")
    assert records(source) == NAMED[:25]
    assert source.where(12) == "data-00001-of-00002.arrow record 2"
    assert records(pickle.loads(pickle.dumps(source))) == NAMED[:25]
    assert records(opened(tmp_path / "both[:4]", ("text", "label"))) == [
        {name: row[name] for name in ("text", "label")} for row in NAMED[:4]
    ]
    with pytest.raises(UserError, match=r'both: has no split "validation", only train, dev; name the folder of one'):
        opened(tmp_path / "both", split="validation")
    alone = opened(tmp_path / "both" / "dev", split="validation")
    assert records(alone) == NAMED[25:30] and alone.fingerprint()["source"] == "huggingface"
    mark = source.fingerprint()
    assert mark == json.loads(json.dumps(mark)) and str(tmp_path) not in json.dumps(mark)


def test_names_of_labels_change_the_fingerprint(tmp_path):
    renamed = FEATURES | {"label": {"names": ["good", "bad"], "_type": "ClassLabel"}}
    first, second = (
        opened(write_saved(tmp_path / name, [table(ROWS[:3])], features)) for name, features in (("a", FEATURES), ("b", renamed))
    )
    assert [record["label"] for record in records(second)] == [None, "good", "bad"]
    assert first.fingerprint()["files"] == second.fingerprint()["files"] and first.fingerprint() != second.fingerprint()


def test_labels_are_named_in_files_that_datasets_wrote(tmp_path):
    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    assert records(opened(write_parquet(tmp_path / "a.parquet", table(ROWS[:9], metadata)))) == NAMED[:9]
    assert records(opened(write_arrow(tmp_path / "a.arrow", table(ROWS[:9], metadata)))) == NAMED[:9]
    few = FEATURES | {"label": {"names": ["bad"], "_type": "ClassLabel"}}
    source = opened(write_saved(tmp_path / "few", [table(ROWS[:9])], few))
    with pytest.raises(UserError, match=r'record 2: column "label": label 1 is out of range; the 1 names from 0 on are bad'):
        source[2]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "data-00001-of-00002.arrow").unlink(), "00002.arrow: is named in state.json but missing"),
        (lambda folder: (folder / "state.json").unlink(), "has no state.json"),
        (lambda folder: (folder / "state.json").write_text('{"_data_files": []}'), "no records for train"),
        (
            lambda folder: (folder / "state.json").write_text('{"_data_files": [{"filename": "../a"}]}'),
            "is named in state.json but missing",
        ),
        (lambda folder: (folder / "state.json").write_text('{"_indices_data_files": [{}]}'), "it again with a newer version"),
        (lambda folder: (folder / "dataset_info.json").write_text("{"), "dataset_info.json: cannot be read as JSON"),
        (lambda folder: (folder / "dataset_info.json").unlink(), "dataset_info.json: cannot be read as JSON"),
    ],
)
def test_broken_folders_of_datasets(tmp_path, break_it, message):
    path = write_saved(tmp_path / "saved", [table(ROWS[:3]), table(ROWS[3:6])])
    break_it(tmp_path / "saved")
    with pytest.raises(UserError, match=message) as caught:
        opened(path, source="huggingface")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="reads one folder"):
        opened(f"{path}/absent", source="huggingface")


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow", "packed.arrow", "table.parquet"])
def test_no_file_that_is_cut_off_is_read(folder, tmp_path, name):
    whole = (folder / name).read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        (tmp_path / name).write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{name}: is not a complete (Arrow|Parquet) file") as caught:
            opened(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_damaged_row_group_is_named(folder, tmp_path):
    whole = bytearray((folder / "table.parquet").read_bytes())
    chunk = parquet.ParquetFile(folder / "table.parquet").metadata.row_group(1).column(0)
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    whole[begin + 60 : begin + 200] = bytes(140)
    (tmp_path / "a.parquet").write_bytes(whole)
    with pytest.raises(UserError, match="a.parquet row group 1: cannot be read") as caught:
        opened(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_text_that_is_not_utf8_is_named(tmp_path):
    offsets = pa.array([0, 1, 2, 4], pa.int32()).buffers()[1]
    bad = pa.table({"text": pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"ab\xff\xfe"))})
    good = pa.table({"text": ["x"] * 3})
    write_arrow(tmp_path / "a.arrow", pa.concat_tables([good, bad]))
    with pytest.raises(UserError, match='a.arrow record 5: column "text" is not UTF-8'):
        opened(tmp_path / "a.arrow")
    parquet.write_table(pa.concat_tables([good, bad]), tmp_path / "a.parquet", row_group_size=3)
    with pytest.raises(UserError, match='a.parquet row group 1 record 5: column "text" is not UTF-8'):
        opened(tmp_path / "a.parquet")


def test_numbers_that_are_none_are_named_where_they_are_read(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", pa.table({"text": ["x", "y", "z"], "label": [0.5, float("nan"), None]}))
    source, task = opened(path), Task(kind="regression")
    assert task.targets(source, [0])[0] == np.float32(0.5)
    for index, shown in ((1, "nan"), (2, "None")):
        with pytest.raises(UserError, match=f'a.parquet record {index}: column "label" holds {shown}, not a number'):
            task.targets(source, [index])


def test_columns_that_cannot_be_read_are_refused_unless_left_out(tmp_path):
    dates = pa.array([0], pa.date32())
    path = write_parquet(tmp_path / "a.parquet", pa.table({"day": dates, "text": ["x"], "label": [1]}))
    with pytest.raises(UserError, match=r'column "day" holds date32.*with --config.data.columns=text,label$'):
        opened(path)
    assert opened(path, ("text",))[0] == {"text": "x"}
    twice = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    with pytest.raises(UserError, match='two columns have the name "text"'):
        opened(write_arrow(tmp_path / "b.arrow", twice))


@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_embedded_files_are_their_bytes_or_else_their_path(tmp_path, name, binary):
    kind = pa.struct({"bytes": binary, "path": pa.string()})
    files = [{"bytes": b"\x89PNG\0", "path": "a.png"}, {"bytes": None, "path": "b.png"}, None, {"bytes": b"", "path": None}]
    content = pa.table({"image": pa.array(files, kind), "raw": pa.array([b"\xff", None, b"", b"a"], binary)})
    path = (write_parquet if name.endswith("parquet") else write_arrow)(tmp_path / name, content)
    expected = [(b"\x89PNG\0", b"\xff"), ("b.png", None), (None, b""), (b"", b"a")]
    assert [(record["image"], record["raw"]) for record in records(opened(path))] == expected


def test_images_of_parquet_reach_their_task(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3), np.uint8)
    files = []
    for image in drawn:
        Image.fromarray(image).save(stream := io.BytesIO(), "PNG")
        files.append({"bytes": stream.getvalue(), "path": None})
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    names = {"info": {"features": {"image": {"_type": "Image"}, "label": FEATURES["label"]}}}
    content = pa.table({"image": pa.array(files, kind), "label": [0, 1, 1, 0]})
    source = opened(write_parquet(tmp_path / "a.parquet", content.replace_schema_metadata({"huggingface": json.dumps(names)})))
    task = image_classify.Task()
    task = image_classify.Task(**task.resolve(source))
    assert task.labels == ("bad", "good")
    processors = Processors(image_kind.Processor.fit([Column(source, "image")], task.processing["image"]))
    examples = task.examples(source, processors, 0, train=False)
    for number, image in enumerate(drawn):
        np.testing.assert_array_equal(processors["image"].load(source[number]["image"], ""), image)
        np.testing.assert_array_equal(examples[number]["images"], image)


@pytest.fixture
def images(tmp_path):
    """Returns a function that writes a table of four images in a column, the last two of them damaged and absent."""

    def write(name: str, kind: pa.DataType):
        Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(stream := io.BytesIO(), "PNG")
        (tmp_path / "beside.png").write_bytes(stream.getvalue())
        files = [stream.getvalue(), stream.getvalue(), stream.getvalue()[:40], None]
        if pa.types.is_struct(kind):
            files = [{"bytes": data, "path": "beside.png"} for data in (files[0], None, files[2], None)]
            files[3]["path"] = "nowhere.png"
        content = pa.table({"image": pa.array(files, kind), "label": [0, 1, 1, 0]})
        return (write_parquet if name.endswith("parquet") else write_arrow)(tmp_path / name, content)

    return write


@pytest.mark.parametrize("kind", [pa.binary(), pa.struct({"bytes": pa.binary(), "path": pa.string()})], ids=str)
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_images_that_cannot_be_read_are_named_by_file_and_row(images, name, kind):
    source = opened(images(name, kind))
    reads = image_kind.Processor(image_size=(4, 4), mean=(0.5,) * 3, std=(0.5,) * 3)
    for index in (0, 1):  # the second by its path beside the file, if files are embedded
        assert (reads.resized(source[index]["image"], source.where(index)) == 7).all()
    for index in (2, 3):
        with pytest.raises(UserError, match=f"{name} record {index}: ") as caught:
            reads.resized(source[index]["image"], source.where(index))
        assert caught.value.place == f"{name} record {index}"
    with pytest.raises(UserError, match=f"{name} record 2: is not a complete image"):
        image_classify.Task().resolve(source)


def test_a_label_is_read_without_its_image(images, monkeypatch):
    source = opened(images("a.arrow", pa.binary()))
    monkeypatch.setattr(arrow_files.ArrowFile, "row", lambda *_: pytest.fail("a whole record is read"))
    assert [source.value(index, "label") for index in range(4)] == [0, 1, 1, 0]


def test_a_second_start_checks_no_values(tmp_path, monkeypatch):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    for name in ("SMALL", "SETTLED"):
        monkeypatch.setattr(cache, name, -(10**18))
    content = pa.table({"text": [f"text {number}" for number in range(10)]})
    paths = [write_arrow(tmp_path / "a.arrow", content), write_parquet(tmp_path / "a.parquet", content)]
    first = [records(opened(path)) for path in paths]
    monkeypatch.setattr(cache, "HASHES", {})
    monkeypatch.setattr(hashlib, "file_digest", lambda stream, name: pytest.fail(f"{stream.name} is read"))
    monkeypatch.setattr(arrow_files, "check_values", lambda *_: pytest.fail("values are checked"))
    assert [records(opened(path)) for path in paths] == first


def test_large_values_are_rewritten_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow_files, "BYTES", 4000)
    content = pa.table({"raw": [bytes([number]) * 1000 for number in range(20)]})
    parquet.write_table(content, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    source = opened(tmp_path / "a.parquet")
    assert max(batch.num_rows for batch in source.files[0].batches) <= 4 and records(source) == content.to_pylist()
