"""Bad records, dead workers, readers that hang, and validation that training has seen: all are said, and some left out."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from multiprocessing import resource_tracker, spawn
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from PIL import Image
from support.processors import images_of, using
from support.sources import MemoryRecords, Numbers

import fmjax
from fmjax.data.records import ConcatenatedSources, Record
from fmjax.data.sources.open import open_source
from fmjax.data.stream.batches import Reading, TrainBatches
from fmjax.data.stream.examples import make_examples
from fmjax.data.stream.handing import Handed
from fmjax.data.stream.overlap import find_overlap
from fmjax.data.stream.tolerance import Tolerance
from fmjax.data.stream.watch import Watchdog, starts_as_worker
from fmjax.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from fmjax.errors import UserError
from fmjax.tasks.classify import Task as Classify
from fmjax.tasks.image_classify import Task as ImageClassify

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {
    "data": {"max_length": 16, "batch_size": 2},
    "train": {"seed": 0},
    "mesh": {"axes": {"data": -1}, "rules": "dp"},
}


@pytest.fixture(autouse=True, scope="module")
def classes_for_workers() -> Iterator[None]:
    """Workers cannot import this module, so they are sent what is in it."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Records(MemoryRecords):
    place, first = "a.csv line", 2


def refuse(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise UserError(f"file.bin record {number}: cannot be read; fetch it again")

    return fail


def broken(*numbers: int) -> Numbers:
    return Numbers(12, bad={number: refuse(number) for number in numbers})


def read(examples: object, steps: int, **options) -> list[np.ndarray]:
    names = {field.name for field in dataclasses.fields(Reading)} & options.keys()
    reading = Reading(**{name: options.pop(name) for name in names})
    batches = TrainBatches(examples, batch_size=4, seed=0, reading=reading, **options)
    try:
        taken = []
        for _ in range(steps):
            batch = next(batches)
            assert set(batch) == {"number", "noise"}
            taken.append(np.array(batch["number"]))
        return taken
    finally:
        batches.close()


def test_a_bad_record_ends_the_run_with_its_place():
    with pytest.raises(UserError, match="^file.bin record 3: cannot be read; fetch it again"):
        read(broken(3), 3)


def test_another_error_says_what_was_being_read():
    def fail() -> None:
        raise ValueError("out of cheese")

    with pytest.raises(ValueError, match="out of cheese") as caught:
        read(Numbers(12, bad={7: fail}), 3)
    assert "while reading file.bin record 7" in caught.value.__notes__


def test_the_next_example_takes_the_place_of_a_bad_one():
    whole = np.concatenate(read(Numbers(12), 6))
    told: list[str] = []
    tolerance = Tolerance("skip:3", tell=told.append)
    found = np.concatenate(read(broken(3, 4, 11), 6, tolerance=tolerance))
    expected = np.select([np.isin(whole, (3, 4)), whole == 11], [5, 0], whole)
    assert np.array_equal(found, expected)
    assert sorted(tolerance.found) == [f"file.bin record {number}: cannot be read; fetch it again" for number in (11, 3, 4)]
    assert told == [f"warning: left out {message}" for message in tolerance.found]  # once each, though met twice
    # On other hosts, by other threads and after a restart the same.
    halves = []
    for rows in ([0, 1], [2, 3]):
        halves.append(read(broken(3, 4, 11), 6, tolerance=Tolerance("skip:3"), threads=3, rows=np.array(rows)))
    assert np.array_equal(np.concatenate([np.stack(half) for half in halves], axis=1).reshape(-1), expected)


def test_one_bad_record_too_many():
    with pytest.raises(UserError, match=r"cannot be read.*; 2 bad records were already left out \(data.on_error=skip:2\)"):
        read(broken(3, 4, 11), 6, tolerance=Tolerance("skip:2"))
    # Those that a run has met before a restart count.
    known = ("file.bin record 3: cannot be read; fetch it again", "another")
    with pytest.raises(UserError, match="record (4|11): cannot be read"):
        read(broken(3, 4, 11), 6, tolerance=Tolerance("skip:2", known))
    read(broken(3), 6, tolerance=Tolerance("skip:2", known))
    with pytest.raises(UserError, match="no training example can be read"):
        read(broken(*range(12)), 1, tolerance=Tolerance("skip:99"))


def test_numbers_that_are_not_finite_are_bad():
    class Noisy(Numbers):
        def draw(self, example: Record, rng: np.random.Generator) -> Record:
            return example | {"noise": np.array([1.0, np.nan if example["number"] == 5 else np.float32(3e38), 3e38], np.float32)}

    with pytest.raises(UserError, match="file.bin record 5: has a value in noise that is not finite"):
        read(Noisy(12), 3)
    tolerance = Tolerance("skip:1")
    numbers = np.concatenate(read(Noisy(12), 3, tolerance=tolerance))
    assert 5 not in numbers and len(tolerance.found) == 1


@pytest.mark.parametrize("setting", ["skip", "skip:-1", "ignore", "skip:all"])
def test_what_becomes_of_bad_records_is_said_clearly(setting):
    with pytest.raises(UserError, match=f'data.on_error="{setting}": write fail, or skip:N'):
        Tolerance(setting)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["good film bad film and more words"] * 3, "wordpiece", 60)


def labelled() -> Records:
    """Eight labelled texts, three of them bad."""
    records = Records({"text": f"good film {number}", "label": "ab"[number % 2]} for number in range(8))
    records[2]["label"], records[4]["text"], records[5]["text"] = "c", " ", 7
    return records


def test_records_that_a_task_cannot_use_are_left_out(tokenizer):
    task, sources = Classify(labels=("a", "b")), {"train": labelled()}
    with pytest.raises(UserError, match='^a.csv line 4: label "c" is out of range'):
        make_examples(task, sources, using(tokenizer), CONFIG, Tolerance())
    tolerance = Tolerance("skip:3")
    examples = make_examples(task, sources, using(tokenizer), CONFIG, tolerance)["train"]
    assert len(examples) == 5
    places = [message.partition(":")[0] for message in tolerance.found]
    assert sorted(places) == ["a.csv line 4", "a.csv line 6", "a.csv line 7"]
    with pytest.raises(UserError, match="2 bad records were already left out"):
        make_examples(task, {"train": labelled()}, using(tokenizer), CONFIG, Tolerance("skip:2"))
    assert len(sources["train"]) == 5
    # Many bad records do not make for as many beginnings.
    many = Records(labelled() * 60)
    calls = []
    plain = Classify.rows
    tolerance = Tolerance("skip:999")

    class Counting(Classify):
        def rows(self, *arguments):
            calls.append(1)
            return plain(self, *arguments)

    examples = make_examples(Counting(labels=("a", "b")), {"train": many}, using(tokenizer), CONFIG, tolerance)
    assert len(examples["train"]) == 300
    assert len(tolerance.found) == 180


def test_what_is_found_in_the_data_is_found_in_the_good_ones(tokenizer):
    records = Records({"text": f"film {number}", "label": number % 3} for number in range(6))
    records[1]["label"] = ["no"]
    kept, found = Tolerance("skip:1").apply(records, Classify().resolve)
    assert found == {"labels": ("0", "1", "2")} and len(kept) == 5 and kept.fingerprint()["left_out"] == 1
    assert find_overlap(kept, kept, {"text": "text"}, using(tokenizer)).count == 5
    # One that cannot be read at all, and one that takes part in several sources.

    class Unreadable(Records):
        def __getitem__(self, index):
            if self.where(index) == "a.csv line 4":
                raise UserError("a.csv line 4: is not UTF-8")
            return super().__getitem__(index)

    two = ConcatenatedSources({"good": Records(records[2:]), "bad": Unreadable(records[2:])})
    kept, found = (tolerance := Tolerance("skip:1")).apply(two, Classify().resolve)
    assert [len(part) for part in kept.parts.values()] == [4, 3] and tolerance.found == ["a.csv line 4: is not UTF-8"]
    assert sorted(kept.fingerprint()) == ["bad", "good"] and found == {"labels": ("0", "1", "2")}
    # A mistake of no one record is one still.
    with pytest.raises(UserError, match='no column "label"'):
        Tolerance("skip:1").apply(Records([{"text": "a"}]), Classify().resolve)


def test_a_truncated_image_is_left_out(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for file in files:
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).save(file)
    files[3].write_bytes(files[3].read_bytes()[:90])
    records = Records({"image": str(file), "label": "ab"[number % 2]} for number, file in enumerate(files))
    task = ImageClassify(labels=("a", "b"), image_size=8, channels=3)
    sources = {"train": records, "validation": records}
    tolerance = Tolerance("skip:1")
    made = make_examples(task, sources, images_of(task), CONFIG, tolerance)
    # Of validation nothing can take its place, so it is read before; in training it is met when its turn comes.
    assert len(made["validation"]) == 5 and len(made["train"]) == 6 and len(tolerance.found) == 1
    batches = TrainBatches(made["train"], batch_size=6, seed=0, tolerance=tolerance)
    assert next(batches)["images"].shape == (6, 8, 8, 3)
    batches.close()
    [message] = tolerance.found
    assert message.startswith(f"{files[3]}: is not a complete image")
    with pytest.raises(UserError, match="3.png: is not a complete image"):
        next(TrainBatches(task.examples(records, images_of(task), 0, train=True), batch_size=6, seed=0))


FILES = {
    "a.jsonl": (
        b'{"text": "one"}\n{"text": \n{"text": "\xff"}\n{"text": "two"}\n',
        ("line 2: ", "line 3: is not UTF-8 (byte 0xff)"),
    ),
    "a.csv": (b"text,label\none,x\ntwo\nthree,\xff\ntwo,y\n", ("line 3: has 1 fields", "line 4: is not UTF-8")),
    "a.tsv": (b"text\tlabel\none\tx\ntwo\ty\tz\ntwo\tx\n", ("line 3: has 3 fields",)),
    "a.txt": (b"one\n\ntwo \xff\nthree\n\ntwo\n", ("line 3: is not UTF-8 (byte 0xff)",)),
    "a.conll": (b"one\tO\n\ntwo\tO\nthree\n\ntwo\tO\n", ("line 3: has one field",)),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_records_that_a_file_is_opened_with_are_left_out(name, tmp_path):
    content, messages = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} line"):
        open_source("auto", str(tmp_path / name), "train")

    def values(source: Any) -> list[Any]:
        return [next(iter(source[index].values())) for index in range(len(source))]

    for most in (len(messages), len(messages) - 1):
        tolerance = Tolerance(f"skip:{most}" if most else "fail", tell=lambda text: None)
        refused = pytest.raises(UserError, match=f"{name} line") if most < len(messages) else nullcontext()
        with refused, tolerance.active():
            kept, found = tolerance.apply(open_source("auto", str(tmp_path / name), "train"), values)
            assert found == values(kept) == ([["one"], ["two"]] if name == "a.conll" else ["one", "two"])
            assert all(f"{name} {message}" in error for message, error in zip(messages, tolerance.found, strict=True))


HEAD, TAIL = "text,label\n1,a\n", '"two\nlines",b\n"th""ree",c\n'
# CSV with a mistake in its quotes -> the bad lines' numbers, and the first column of what is left of it; or what is said.
QUOTES = {
    "a quote inside": (f'{HEAD}"5" disk",b\n{TAIL}', (3,), ["1", "two\nlines", 'th"ree']),
    "text behind the quote": (f'{HEAD}"5"disk,b\n\n{TAIL}', (3,), ["1", "two\nlines", 'th"ree']),
    "never closed, quotes after it": (f'{HEAD}"5 disk,b\n2,a\n3,b\n{TAIL}', (3,), ["1", "2", "3", "two\nlines", 'th"ree']),
    "never closed, no quotes after it": (f'{HEAD}"5 disk,b\n2,a\n\n3,b\n', (3,), ["1", "2", "3"]),
    "the last": (f'{HEAD}{TAIL}"5 disk,b', (6,), ["1", "two\nlines", 'th"ree']),
    "several": (f'{HEAD}"5 disk,b\n"6 disk,b\n2,a\n{TAIL}"7"x,b\n', (3, 4, 9), ["1", "2", "two\nlines", 'th"ree']),
    "in the header": (f'"text,label\n1,a\n{TAIL}', "a.csv line 1: is not CSV"),
    "in a text of lines": (f'{HEAD}"he said "no\nand "yes" then",b\n', "a.csv line 3: is not CSV .* is unclear from line 4$"),
    "never closed, of lines": (f'{HEAD}"one\ntwo\nthree, four\n', "a.csv line 3: is not CSV .* is unclear from line 4$"),
    "one column": ('text\n1\n"5" disk"\n2\n', "a.csv line 3: is not CSV .*; it cannot be skipped, because its end"),
}


@pytest.mark.parametrize("case", QUOTES)
def test_rows_with_a_mistake_in_their_quotes(case, tmp_path):
    """They are left out, and no others with them, where those after them are sound; else the error stays."""
    content, *expected = QUOTES[case]
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=r"a.csv line \d: is not CSV .*; quote fields as in RFC 4180, or use tsv$"):
        open_source("auto", str(tmp_path / "a.csv"), "train")
    tolerance = Tolerance("skip:3")
    with tolerance.active():
        if isinstance(expected[0], str):
            with pytest.raises(UserError, match=expected[0]):
                open_source("auto", str(tmp_path / "a.csv"), "train")
            return
        numbers, texts = expected
        kept, found = tolerance.apply(
            open_source("auto", str(tmp_path / "a.csv"), "train"),
            lambda source: [source[index]["text"] for index in range(len(source))],
        )
    assert found == texts and len(kept) == len(texts)
    assert [message.split(": is not CSV")[0] for message in tolerance.found] == [f"a.csv line {number}" for number in numbers]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_named_with_what_it_read():
    with pytest.raises(UserError, match=r"workers=2: worker [01], reading file.bin record 9, was ended by SIGKILL; check that"):
        read(Numbers(12, bad={9: die}), 4, workers=2)


def test_a_bad_record_in_a_worker_is_as_bad_as_elsewhere():
    tolerance = Tolerance("skip:1")
    found = read(broken(3), 3, workers=1, tolerance=tolerance)
    assert np.array_equal(found, read(broken(3), 3, tolerance=Tolerance("skip:1"))) and len(tolerance.found) == 1


ORPHANS = """
import os, sys, time
from absl import flags
from fmjax.data.stream.batches import Reading, TrainBatches
import numpy as np
from tests.support.sources import Numbers

batches = TrainBatches(Numbers(9), batch_size=2, seed=0, reading=Reading(workers=2))
next(batches), next(batches)
print(*batches._slots.table[:, 0].tolist(), flush=True)
time.sleep(600)
"""


def test_workers_end_with_a_parent_that_was_killed():
    process = subprocess.Popen([sys.executable, "-c", ORPHANS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        workers = [int(word) for word in process.stdout.readline().split()]
        assert len(workers) == 2 and all(Path(f"/proc/{pid}").exists() for pid in workers)
    finally:
        process.kill()
    # Its output ends when nobody holds it any more.
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_a_reader_that_hangs_is_told():
    told: list[str] = []
    twice = threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        if sum("record 9" in line for line in told) == 2:
            twice.set()

    def hang() -> None:
        assert twice.wait(300)

    numbers = read(Numbers(12, bad={9: hang}), 3, stall_seconds=0.1, tell=tell)
    assert sorted(np.concatenate(numbers).tolist()) == list(range(12))
    pattern = r"warning: no batch for \d+ s \(data.stall_seconds\); being read: .*file.bin record 9.*"
    assert sum(re.fullmatch(pattern, text) is not None for text in told) >= 2


def test_a_wait_is_told_again_each_time_as_long():
    told: list[float] = []
    thrice = threading.Event()

    def tell(waited: float) -> None:
        told.append(waited)
        if len(told) == 3:
            thrice.set()

    dog = Watchdog(0.05, tell)
    with dog.waiting():
        assert thrice.wait(300)
    dog.close()
    assert all(waited >= 0.05 * number for number, waited in enumerate(told, 1))


@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_a_reader_that_does_not_hang_is_not_told(seconds):
    read(Numbers(12), 3, stall_seconds=seconds, tell=pytest.fail)


def test_validation_that_is_in_the_training_data_is_counted(monkeypatch, tokenizer):
    train = Records({"text": f"text {number}", "label": "a"} for number in range(50))
    held = Records([{"text": "Text  7", "label": "b"}, {"text": "new", "label": "a"}, {"text": "text 49", "label": "a"}])
    task = Classify(labels=("a", "b"))
    reads, processors = task.reads, using(tokenizer)
    found = find_overlap(train, held, reads, processors)
    assert (found.count, found.held, found.trained, found.whole, found.first) == (2, 3, 50, True, "a.csv line 2")
    assert found.warning().startswith(
        "warning: 2 of 3 validation records also occur in training, the first is a.csv line 2; metrics will be too good"
    )
    assert find_overlap(train, Records([{"text": 3, "label": "a"}]), reads, processors) is None
    # Lists of words are compared as texts.
    words = Records([{"text": ["TEXT", "49"], "label": "a"}])
    assert find_overlap(train, words, reads, processors).count == 1
    # Of large data a sample is compared, and that is said.
    monkeypatch.setattr("fmjax.data.stream.overlap.MOST_TRAINED", 10)
    sampled = find_overlap(train, held, reads, processors)
    assert (sampled.trained, sampled.whole) == (10, False) and "in training (compared with a sample of 10)" in sampled.warning()


@pytest.mark.parametrize(("python", "code"), [(b"/bin/false", 1), (b"/bin/true", 0)])
def test_a_worker_that_dies_before_it_reads_ends_the_run(monkeypatch, python, code):
    """As one does that imports a script without a main guard: what it is sent must fit into the pipe to it."""
    large = Numbers(9, classes=np.zeros(100_000))
    handed = Handed(large)
    sent = pickle.dumps(handed)
    assert len(sent) < 1000 and len(pickle.loads(sent)) == 9
    path = Path(handed.path)
    assert path.exists()
    handed.close()
    assert not path.exists()
    # A Python that is no Python is a worker that dies at once.
    resource_tracker.ensure_running()
    monkeypatch.setattr(spawn, "get_executable", lambda: python)
    with pytest.raises(UserError, match=rf"workers=2: a worker process ended with exit code {code} before it read .*__main__"):
        read(large, 4, workers=2)


def test_a_script_that_workers_import_may_not_train(monkeypatch):
    assert not starts_as_worker()
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(SystemExit, match="put the call under if __name__"):
        fmjax.fit("no such config", "nowhere")
