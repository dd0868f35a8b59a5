"""The contract of the batches: f(seed, step), whatever the number of threads, worker processes, hosts and restarts, with
packing, shuffling and mixing on; no example repeated or skipped; and data that changed under a run told apart."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import cloudpickle
import numpy as np
import pytest
from support.processors import using
from support.sources import Numbers

from fmjax.config import check_resumable, to_dict
from fmjax.data.sources.open import open_source
from fmjax.data.storage.fingerprints import data_differences
from fmjax.data.stream.batches import Reading, TrainBatches
from fmjax.data.stream.mixing import MixedExamples
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.defaults import experiment
from fmjax.errors import UserError
from fmjax.tasks.mlm import Task

SIZE, SEED = 8, 11


@pytest.fixture(autouse=True, scope="module")
def classes_for_workers() -> Iterator[None]:
    """Workers cannot import this module, so they are sent what is in it."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> MixedExamples:
    """Two sources of text, tokenised and packed into rows for masked language modelling, mixed with a curriculum."""
    rng = np.random.default_rng(0)
    words = ["lamp", "river", "stone", "apple", "window", "garden", "yellow", "quiet"]
    parts, folder, texts = {}, tmp_path_factory.mktemp("texts"), []
    for name, count in (("books", 60), ("wiki", 25)):
        lines = [" ".join(rng.choice(words, int(rng.integers(2, 9)))) for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
        parts[name] = open_source("text", str(folder / f"{name}.txt"), "train", record="line")
        texts += lines
    tokenizer = train_tokenizer(texts, "wordpiece", 60)
    rows = {name: Task().examples(part, using(tokenizer), 16, train=True) for name, part in parts.items()}
    data = {"mixture": {"books": {"weight": 0.75, "epochs": 3}, "wiki": {"weight": 0.25}}, "curriculum": {"4": {"wiki": 0.75}}}
    return MixedExamples(rows, data | {"batch_size": SIZE}, SEED)


def take(batches: TrainBatches, count: int) -> list[dict[str, np.ndarray]]:
    """Returns the next batches, and ends the reader."""
    taken = [{name: np.array(array) for name, array in next(batches).items()} for _ in range(count)]
    batches.close()
    return taken


def same(first: list[dict], second: list[dict]) -> bool:
    assert len(first) == len(second) and first
    return all(a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a) for a, b in zip(first, second, strict=True))


def train(examples, rows: np.ndarray | None = None, **options) -> TrainBatches:
    return TrainBatches(examples, batch_size=SIZE, seed=SEED, rows=rows, reading=Reading(**options))


@pytest.fixture(scope="module")
def batches(packed) -> list[dict[str, np.ndarray]]:
    return take(train(packed), 12)


def test_neither_threads_nor_reading_ahead_matter(packed, batches):
    assert {"input_ids", "segment_ids", "masked_positions"} <= batches[0].keys()
    for options in ({"threads": 0}, {"threads": 4, "prefetch": 9}, {"prefetch": 1}, {"prefetch": 0}):
        assert same(take(train(packed, **options), 12), batches), options
    assert not same(take(TrainBatches(packed, batch_size=SIZE, seed=SEED + 1), 12), batches)


@pytest.mark.parametrize("workers", [2, pytest.param(1, marks=pytest.mark.full), pytest.param(3, marks=pytest.mark.full)])
def test_worker_processes_do_not_matter(workers):
    parts = {"a": Numbers(30), "b": Numbers(12, begin=30)}
    examples = MixedExamples(parts, {"mixture": {"a": {"epochs": 2}, "b": {}}, "batch_size": SIZE}, SEED)
    expected = take(train(examples), 12)
    state = {"global_next_index": 5 * SIZE}
    resumed = train(examples, workers=workers)
    resumed.restore(state)
    assert same(take(resumed, 7), expected[5:])


def test_a_restart_at_any_step_goes_on_with_the_same_batches(packed, batches):
    for step in (1, 5, 11):
        stopped = train(packed)
        for _ in range(step):
            next(stopped)
        resumed = train(packed, threads=2)
        resumed.restore(stopped.state())
        stopped.close()
        assert same(take(resumed, 12 - step), batches[step:])


@pytest.mark.parametrize("kind", ["plain", "mixture"])
def test_a_restart_reads_nothing_of_what_was_before(kind):
    parts = {"a": Numbers(500), "b": Numbers(300, begin=500)}
    mixed = MixedExamples(parts, {"mixture": {"a": {"weight": 3}, "b": {"weight": 1}}, "batch_size": SIZE}, SEED)
    resumed = train(parts["a"] if kind == "plain" else mixed, prefetch=0)
    resumed.restore({"global_next_index": 1_000_000 * SIZE})
    take(resumed, 3)
    assert len(parts["a"].read) + len(parts["b"].read) == 3 * SIZE
    assert resumed.state() == {"global_next_index": 1_000_003 * SIZE}


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_the_same_batches_together(packed, batches, hosts):
    rows = np.split(np.arange(SIZE), hosts)
    shares = [take(train(packed, rows=own), 12) for own in rows]
    steps = zip(*shares, strict=True)
    assert same([{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in steps], batches)


@pytest.mark.parametrize("kind", ["plain", "mixture"])
def test_an_epoch_on_changing_numbers_of_hosts_has_every_example_once(kind):
    """Two hosts begin, four go on, then one, then two: over two epochs every example comes twice, over one once."""
    parts = {"a": Numbers(48), "b": Numbers(48, begin=48)}
    data = {"mixture": {"a": {"weight": 1}, "b": {"weight": 1}}, "batch_size": SIZE}
    seen: list[int] = []
    state = {"global_next_index": 0}
    for hosts, steps in ((2, 3), (4, 4), (1, 2), (2, 3), (4, 12)):
        ended = []
        for own in np.split(np.arange(SIZE), hosts):
            examples = Numbers(96) if kind == "plain" else MixedExamples(parts, data, SEED)
            reader = train(examples, rows=None if hosts == 1 else own)
            reader.restore(state)
            seen += [int(number) for batch in take(reader, steps) for number in batch["number"]]
            ended.append(reader.state())
        assert all(each == ended[0] for each in ended)
        state = ended[0]
        if len(seen) == 96:
            assert Counter(seen) == dict.fromkeys(range(96), 1)
    assert Counter(seen) == dict.fromkeys(range(96), 2) and state == {"global_next_index": 192}


def test_the_shuffle_is_global():
    numbers = np.concatenate([batch["number"] for batch in take(train(Numbers(4000)), 500)])
    assert sorted(numbers.tolist()) == list(range(4000))
    # Each tenth of an epoch comes from all over the data: of a buffer of 400 the first would end before 800.
    for tenth in np.split(numbers, 10):
        assert tenth.min() < 100 and tenth.max() > 3900 and abs(tenth.mean() - 2000) < 250


FILE = {"name": "a.txt", "size": 1234, "sha256": "1f" * 32}


def test_data_that_changed_are_told_by_file():
    old = {"train": {"source": "text", "split": "train", "files": [FILE, FILE | {"name": "b.txt"}]}, "tokenizer": "77" * 32}
    new = {
        "train": {"source": "text", "split": "train", "files": [FILE | {"size": 1240, "sha256": "9c" * 32}]},
        "tokenizer": "88" * 32,
    }
    assert data_differences(old, old) == []
    assert data_differences(old, new) == [
        "train: a.txt: 1,234 bytes, sha256 1f1f1f1f1f1f -> 1,240 bytes, sha256 9c9c9c9c9c9c",
        "train: b.txt: 1,234 bytes, sha256 1f1f1f1f1f1f -> (absent)",
        "tokenizer: sha256 777777777777 -> sha256 888888888888",
    ]
    nested = data_differences({"train": {"books": {"files": [FILE]}}}, {"train": {"books": {"files": [FILE], "record": "line"}}})
    assert nested == ["train: books: record: (absent) -> line"]
    many = [FILE | {"name": f"{number}.txt"} for number in range(9)]
    assert data_differences({"train": {"files": many}}, {"train": {"files": []}})[-1] == "and 4 more"


def test_data_are_known_by_their_content_not_by_their_names():
    other = {"name": "b.txt", "size": 9, "sha256": "9c" * 32}
    old = {"train": {"books": {"source": "text", "files": [FILE, other]}}}
    moved = {"train": {"books": {"source": "text", "files": [FILE | {"name": "c.txt"}, other]}}}
    assert data_differences(old, moved) == []
    swapped = {"train": {"books": {"source": "text", "files": [other, FILE]}}}
    assert data_differences(old, swapped) == ["the files come in another order: b.txt, a.txt"]


def test_how_data_are_read_may_change_at_a_restart_and_which_may_not():
    config = to_dict(experiment("bert", "mlm"))
    free = {"workers": 2, "prefetch": 9, "stall_seconds": 5.0, "on_error": "skip:3"}
    check_resumable(config, config | {"data": config["data"] | free})
    for section, key, value in (
        ("data", "batch_size", 64),
        ("train", "seed", 1),
        ("data", "mixture", {"a": {"weight": 1}}),
        ("data", "curriculum", {"5": {"a": 2}}),
        ("data", "temperature", 2.0),
    ):
        with pytest.raises(UserError, match=rf"started with another config: {section}.{key}.* -> "):
            check_resumable(config, config | {section: config[section] | {key: value}})
