"""Tables of rows: one pass at the first start, none at the second, and the rows that there were in memory before."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.processors import images_of, using
from support.sources import MemoryRecords

from fmjax.data.records import ConcatenatedSources, Selected, hold_out
from fmjax.data.sources.open import open_source
from fmjax.data.stream.packing import pack_matched
from fmjax.data.stream.tolerance import Tolerance
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer
from fmjax.errors import RecordError, UserError
from fmjax.tasks import choice, classify, image_classify, qa, row_tables, seq2seq, tag
from fmjax.tasks.token_rows import packed_pairs, pair

LENGTH = 12
WORDS = [f"w{number}" for number in range(30)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    return load_tokenizer(folder)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch) -> Path:
    """A cache of its own, and small chunks, so that few records make a file. Returns the folder of tables."""
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_tables, "CHUNK", 4)
    return tmp_path / "cache" / "files"


def records(count: int = 15) -> list[dict]:
    rng = np.random.default_rng(0)
    texts = [rng.choice(WORDS, rng.integers(1, 6)).tolist() for _ in range(count)]
    return [
        {
            "text": " ".join(words),
            "other": str(rng.choice(WORDS)),
            "label": "ab"[number % 2],
            "endings": rng.choice(WORDS, 3).tolist(),
            "answers": {"text": [words[-1]], "answer_start": [len(" ".join(words)) - len(words[-1])]},
            "tags": ["ab"[len(word) % 2] for word in words],
        }
        for number, words in enumerate(texts)
    ]


class Unknown(MemoryRecords):
    def fingerprint(self) -> dict:
        return {"records": len(self)}


def opened(folder: Path, rows: list[dict], name: str = "a.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source("jsonl", str(folder / name), "train")


def mute(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("tokenized again")

    for name in ("encode_batch", "encode_targets", "encode_words", "encode_with_offsets"):
        monkeypatch.setattr(Tokenizer, name, refuse)


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        one[at].keys() == other[at].keys() and all(np.array_equal(one[at][name], other[at][name]) for name in one[at])
        for at in range(len(one))
    )


@pytest.mark.parametrize("settings", [{}, {"text_pair": "other"}, {"pool": "mean", "blank": "drop"}])
def test_classification_reads_the_rows_that_were_in_memory(tmp_path, tokenizer, monkeypatch, settings):
    rows, task = records(), classify.Task(labels=("a", "b"), **settings)
    if task.blank == "drop":
        rows[3]["text"] = rows[4]["text"] = rows[14]["text"] = " "
    source = opened(tmp_path, rows)
    examples = task.examples(source, using(tokenizer), LENGTH, train=True)
    kept = [row for row in rows if row["text"].strip()]
    assert len(examples) == len(kept)
    for at, row in enumerate(kept):
        ids, types = tokenizer.assemble(*(tokenizer.encode_batch([row[name]])[0] for name in task.texts))
        example, more = examples[at], np.zeros(LENGTH - ids.size, np.int32)
        assert np.array_equal(example["input_ids"], [*ids, *more]) and example["input_ids"].dtype == np.int32
        assert np.array_equal(example["token_type_ids"], [*types, *more]) and example["token_type_ids"].dtype == np.int32
        assert example["attention_mask"].tolist() == [1] * ids.size + [0] * more.size
        assert example["labels"] == "ab".index(row["label"]) and example["labels"].dtype == np.int32
        assert examples.lengths[at] == ids.size
        assert examples.text(at).split("[SEP]")[0].strip() == row["text"]
    mute(monkeypatch)
    assert same(examples, task.examples(source, using(tokenizer), LENGTH, train=True))
    assert same(examples, pickle.loads(pickle.dumps(examples)))


def test_examples_are_pickled_as_a_path(tmp_path, tokenizer):
    task = classify.Task(labels=("a", "b"))
    few, many = (
        len(pickle.dumps(task.examples(opened(tmp_path, records(count), name), using(tokenizer), LENGTH, train=True)))
        for count, name in ((10, "a.jsonl"), (1000, "b.jsonl"))
    )
    assert abs(few - many) < 20


def test_a_table_belongs_to_its_records_and_settings(tmp_path, tokenizer, files):
    rows = records()

    def tables(source=None, length=LENGTH, **settings) -> int:
        task = classify.Task(**{"labels": ("a", "b")} | settings)
        task.examples(source or opened(tmp_path, rows), using(tokenizer), length, train=True)
        return len(list(files.glob("rows/*")))

    assert tables() == tables() == tables(label_smoothing=0.1, token_dropout=0.5) == 1
    assert tables(length=LENGTH + 1) == 2
    assert tables(overlong="truncate") == 3
    assert tables(labels=("b", "a")) == 4
    rows[9]["label"] = "a"
    assert tables() == 5
    rest, held = hold_out(opened(tmp_path, rows), 0.4)
    assert tables(rest) == 6 and tables(held) == 7
    assert tables(Selected(opened(tmp_path, rows), np.arange(5), {})) == 8
    assert tables(Selected(opened(tmp_path, rows), np.arange(1, 6), {})) == 9
    assert tables(ConcatenatedSources({"one": rest, "two": held})) == 10
    # A source whose fingerprint has no digest does not say what it contains.
    assert tables(Unknown(rows)) == 10
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_labels_are_found_once(tmp_path, monkeypatch, files):
    source = opened(tmp_path, records())
    found = classify.Task(weighting="balanced").resolve(source)
    assert found["labels"] == ("a", "b") and len(list(files.glob("found/*"))) == 1
    monkeypatch.setattr(classify.Task, "find_labels", None)
    assert classify.Task(weighting="balanced").resolve(source) == found
    with pytest.raises(TypeError):
        classify.Task(label="other").resolve(source)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_pass_that_is_stopped_leaves_no_table(tmp_path, tokenizer, monkeypatch, files, error):
    source, task = opened(tmp_path, records()), classify.Task(labels=("a", "b"))
    plain, calls = Tokenizer.encode_batch, []

    def stop(self, texts):
        calls.append(texts)
        if len(calls) == 3:
            raise error
        return plain(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", stop)
    expected = (UserError, r"the cache cannot hold .*arrow \(No space") if isinstance(error, OSError) else (error, None)
    with pytest.raises(expected[0], match=expected[1]):
        task.examples(source, using(tokenizer), LENGTH, train=True)
    assert not list(files.rglob("*.*"))
    examples = task.examples(source, using(tokenizer), LENGTH, train=True)
    # What a kill or a full disk left of a table is made again.
    (table,) = files.glob("rows/*.arrow")
    table.write_bytes(table.read_bytes()[:-100])
    assert same(examples, task.examples(source, using(tokenizer), LENGTH, train=True))


def test_bad_records_of_later_chunks_are_named_and_may_be_skipped(tmp_path, tokenizer):
    rows, task = records(), classify.Task(labels=("a", "b"))
    rows[6]["label"], rows[9]["text"], rows[13]["text"] = "c", " ".join(WORDS[:20]), 7
    source = opened(tmp_path, rows)
    with pytest.raises(RecordError, match=r'^a.jsonl line 7: label "c" is out of range') as caught:
        task.examples(source, using(tokenizer), LENGTH, train=True)
    assert caught.value.index == 6
    tolerance = Tolerance("skip:3")
    kept, examples = tolerance.apply(source, lambda own: task.examples(own, using(tokenizer), LENGTH, train=True), 5)
    places = [message.partition(":")[0] for message in tolerance.found]
    assert sorted(places) == ["a.jsonl line 10", "a.jsonl line 14", "a.jsonl line 7"]
    good = Selected(source, np.array([0, 1, 2, 3, 4, 5, 7, 8, 10, 11, 12, 14]), {})
    assert len(kept) == len(examples) == 12 and same(examples, task.examples(good, using(tokenizer), LENGTH, train=True))


@pytest.mark.parametrize("packed", [False, True])
def test_text_to_text_reads_the_rows_that_were_in_memory(tmp_path, tokenizer, monkeypatch, packed):
    rows, task = records(), seq2seq.Task(source="text", target="other", target_length=4, prefix="w0 ", pack=packed)
    source = opened(tmp_path, rows)
    examples = task.examples(source, using(tokenizer), LENGTH, train=True)
    texts = [[f"w0 {row['text']}" for row in rows], [row["other"] for row in rows]]
    sides = [[tokenizer.assemble(ids)[0] for ids in tokenizer.encode_batch(side)] for side in texts]
    lengths, fill = (LENGTH, 4), tokenizer.fill_id
    sizes = np.array([[row.size for row in side] for side in sides]).T
    if packed:
        plan, target = pack_matched(sizes, LENGTH)
        expected = [
            packed_pairs(*([side[at] for at in plan.pieces(row)] for side in sides), (LENGTH, target), fill)
            for row in range(plan.rows)
        ]
        assert examples.fill == dict(zip(("input_ids", "labels"), plan.fill, strict=True))
    else:
        expected = [pair(*row, lengths, fill) for row in zip(*sides, strict=True)]
        assert examples.lengths.tolist() == sizes.max(axis=1).tolist()
        assert examples.references() == texts[1] and examples.references(14) == texts[1][14:]
    assert same(expected, examples)
    mute(monkeypatch)
    assert same(expected, task.examples(source, using(tokenizer), LENGTH, train=True))
    assert same(expected, pickle.loads(pickle.dumps(examples)))


@pytest.mark.parametrize(
    ("task", "length"),
    [
        (choice.Task(context="text", start="other", label="number", choices=3), LENGTH),
        (qa.Task(context="text", question="other"), LENGTH),
        (qa.Task(context="text", question="other", stride=1), 6),
        (tag.Task(tokens="text", labels=("a", "b")), LENGTH),
        (tag.Task(tokens="text", labels=("a", "b"), pieces="all", overlong="truncate"), 5),
        (tag.Task(tokens="text", labels=("a", "b"), overlong="split", stride=2), 5),
    ],
)
def test_chunks_do_not_matter(tmp_path, tokenizer, monkeypatch, files, task, length):
    rows = [row | {"number": number % 3} for number, row in enumerate(records())]
    rows[6]["text"], rows[6]["answers"], rows[6]["tags"] = (rows[5][name] for name in ("text", "answers", "tags"))
    source = opened(tmp_path, rows)
    examples = task.examples(source, using(tokenizer), length, train=True)
    assert len(list(files.glob("rows/*"))) == 1
    masks = np.stack([np.atleast_2d(examples[at]["attention_mask"]) for at in range(len(examples))])
    assert np.array_equal(examples.lengths, masks.sum(axis=2).max(axis=1))
    with monkeypatch.context() as together:
        together.setattr(row_tables, "CHUNK", 100)
        whole = task.examples(MemoryRecords(rows), using(tokenizer), length, train=True)
    assert same(whole, examples) and np.array_equal(whole.lengths, examples.lengths)
    mute(monkeypatch)
    assert same(whole, task.examples(source, using(tokenizer), length, train=True))
    assert same(whole, pickle.loads(pickle.dumps(examples)))


def test_classes_and_sizes_of_images_are_found_once(tmp_path, monkeypatch, files):
    for number in range(6):
        (tmp_path / "images" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.full((4, 4, 3), 9 * number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "ab"[number % 2] / f"{number}.png")
    source = open_source("class_folders", str(tmp_path / "images"), "train")
    found = image_classify.Task().resolve(source)
    task = image_classify.Task(**found)
    examples = task.examples(source, images_of(task), 0, train=False)
    assert found == {"image_size": 4, "channels": 3, "labels": ("a", "b")}
    assert examples.classes.tolist() == [0, 0, 0, 1, 1, 1] and len(list(files.glob("*/*"))) == 2
    for name in ("find_images", "find_labels", "targets"):
        monkeypatch.setattr(image_classify.Task, name, None)
    assert image_classify.Task().resolve(source) == found
    assert same(examples, task.examples(source, images_of(task), 0, train=False))
    assert same(examples, pickle.loads(pickle.dumps(examples)))


def test_images_that_records_name_are_read_again(tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(6)]
    source = opened(tmp_path, [{"image": path, "label": "ab"[at % 2]} for at, path in enumerate(paths)])
    for size in (4, 8):
        for path in paths:
            Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(path)
        assert image_classify.Task().resolve(source)["image_size"] == size


def test_without_a_cache_rows_are_made_at_each_start(tmp_path, tokenizer, monkeypatch, files):
    task, source = seq2seq.Task("text", "other", scores=()), opened(tmp_path, records())
    expected = task.examples(source, using(tokenizer), LENGTH, train=True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "file" / "cache"))  # cannot be created
    found = task.examples(source, using(tokenizer), LENGTH, train=True)
    assert same(found, expected) and found.table.content.parent != files / "rows"
    calls: list[int] = []
    for _ in range(2):
        assert row_tables.remembered(source, {}, lambda: {"labels": ("a",), "call": calls.append(1)})["labels"] == ("a",)
    assert calls == [1, 1]


def test_a_full_disk_is_named(monkeypatch, tmp_path):
    """Sources without a digest have their table in the folder for temporary files."""
    monkeypatch.setattr(row_tables, "name_of", lambda source, key: "")
    monkeypatch.setattr(row_tables.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    full = row_tables.cache.opened_to_write(Path("/dev/full"))
    monkeypatch.setattr(row_tables.cache, "opened_to_write", lambda path: full)
    source, columns = MemoryRecords({"n": number} for number in range(9)), {"n": row_tables.Column("int64", 4096)}
    make = lambda part: {"n": np.zeros((len(part), 4096))}  # noqa: E731
    message = r"the rows of 9 records cannot be stored \(No space left on device; .* bytes are free\)"
    with pytest.raises(UserError, match=message) as caught:
        row_tables.row_table(source, columns, {}, make)
    assert "\n" not in str(caught.value)
