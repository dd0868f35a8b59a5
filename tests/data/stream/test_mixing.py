"""Mixtures of sources: proportions, limits, temperature and curriculum, all of them arithmetic in an example's number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sources import Numbers

from fmjax.config import apply_overrides, to_dict
from fmjax.data.records import ConcatenatedSources, Selected
from fmjax.data.splits import PART_KEYS, open_sources, open_split
from fmjax.data.stream.batches import Reading, TrainBatches
from fmjax.data.stream.mixing import ENDLESS, MixedExamples, Schedule, parts_of, shares, stages
from fmjax.defaults import experiment
from fmjax.errors import UserError


def mixed(sizes: dict[str, int], batch_size: int = 10, seed: int = 0, **data) -> MixedExamples:
    parts = {name: Numbers(size, source=number) for number, (name, size) in enumerate(sizes.items())}
    own = {"mixture": {name: {} for name in sizes}, "batch_size": batch_size} | data
    return MixedExamples(parts, own, seed)


def read(examples: MixedExamples, batches: int, batch_size: int = 10, seed: int = 0) -> np.ndarray:
    """Returns [examples, 2]: source and number of the first examples of the stream."""
    stream = TrainBatches(examples, batch_size=batch_size, seed=seed)
    taken = [next(stream) for _ in range(batches)]
    stream.close()
    return np.concatenate([np.stack([batch["source"], batch["number"]], axis=1) for batch in taken])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=6), st.integers(1, 250_000))
def test_any_beginning_of_the_stream_has_each_sources_share(weights, at):
    names = [str(index) for index in range(len(weights))]
    schedule = Schedule(dict.fromkeys(names, ENDLESS), [(0, dict(zip(names, weights, strict=True)))], 8)
    found, wanted = schedule.segments[0].used(at), np.array(weights) / sum(weights)
    assert found.sum() == at and schedule.total == ENDLESS
    # What is promised, and what rounding shares to 1 of 100,000 adds.
    assert (np.abs(found - wanted * at) <= 0.5 + wanted * len(weights) / 2 + at * 1e-5 + 1e-6).all()
    source, count = schedule[at - 1]
    assert count + 1 == found[source]


def test_shares_are_exact_and_each_source_has_its_own_epochs():
    examples = mixed({"books": 7, "wiki": 30}, mixture={"books": {"weight": "0.7"}, "wiki": {"weight": 0.3}})
    rows = read(examples, 10)
    for begin in range(0, 100, 10):
        assert Counter(rows[begin : begin + 10, 0].tolist()) == {0: 7, 1: 3}
    books, wiki = (rows[rows[:, 0] == source, 1] for source in (0, 1))
    # Seven books an epoch, each epoch all of them in another order; the wiki is gone through once.
    epochs = books.reshape(10, 7)
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs.tolist()) and len({tuple(e) for e in epochs.tolist()}) > 5
    assert sorted(wiki.tolist()) == list(range(30)) and wiki.tolist() != sorted(wiki.tolist())
    assert not np.array_equal(read(examples, 10, seed=1), rows)


def test_without_weights_shares_follow_sizes_caps_and_temperature():
    counts = Counter(read(mixed({"a": 90, "b": 10}), 10)[:, 0].tolist())
    assert counts == {0: 90, 1: 10}
    capped = mixed({"a": 90, "b": 10}, mixture={"a": {"cap": 30}, "b": {}})
    rows = read(capped, 8)
    assert Counter(rows[:, 0].tolist()) == {0: 60, 1: 20} and len(capped) == 40
    used = Counter(rows[rows[:, 0] == 0, 1].tolist())
    assert len(used) == 30 and set(used.values()) == {2} and max(used) >= 30  # some thirty of the ninety
    flat = Counter(read(mixed({"a": 90, "b": 10}, temperature=2.0), 40)[:, 0].tolist())
    assert flat == {0: 300, 1: 100}  # 3 to 1, the root of 9 to 1


def test_a_source_that_is_used_up_leaves_its_place_to_the_others():
    data = {"mixture": {"a": {"weight": 1, "epochs": 1.5}, "b": {"weight": 1}, "c": {"weight": 2, "epochs": 1}}}
    examples = mixed({"a": 10, "b": 4, "c": 40}, **data)
    rows = read(examples, 12)
    assert Counter(rows[:, 0].tolist()) == {0: 15, 1: 65, 2: 40}
    last = int(np.flatnonzero(rows[:, 0] == 0)[-1])
    after = rows[last + 1 :, 0]
    assert after.size and 0 not in after
    ends = int(np.flatnonzero(after == 2)[-1])
    assert abs(Counter(after[:ends].tolist())[1] - ends / 3) <= 1  # 1 to 2 while both are there
    assert examples.schedule.total == ENDLESS
    every = mixed({"a": 10, "b": 5}, mixture={"a": {"epochs": 1}, "b": {"epochs": 2}})
    assert every.schedule.total == 20
    assert Counter(map(tuple, read(every, 2).tolist())) == {(0, n): 1 for n in range(10)} | {(1, n): 2 for n in range(5)}
    every.check_steps(2, 10)
    with pytest.raises(UserError, match="end after 20 examples, but 3 steps of 10 need 30; raise"):
        every.check_steps(3, 10)


def test_a_curriculum_changes_the_shares_after_its_steps():
    data = {"mixture": {"a": {"weight": 1}, "b": {"weight": 0}, "c": {"weight": 1}}}
    data["curriculum"] = {"4": {"a": 0, "b": "3"}, "2": {"b": 2}}
    rows = read(mixed({"a": 6, "b": 100, "c": 50}, **data), 6)
    batches = [Counter(rows[begin : begin + 20, 0].tolist()) for begin in (0, 20, 40)]
    assert batches == [{0: 10, 2: 10}, {0: 5, 1: 10, 2: 5}, {1: 15, 2: 5}]
    own = rows[rows[:, 0] == 2, 1]
    assert len(set(own.tolist())) == own.size == 20  # going on where it was


def test_resuming_reads_no_more_than_what_comes_next():
    data = {"mixture": {"a": {"weight": 2, "epochs": 3}, "b": {"weight": 1}}, "curriculum": {"5": {"b": 2}}}
    whole = TrainBatches(mixed({"a": 50, "b": 9}, **data), batch_size=10, seed=0)
    batches = [next(whole) for _ in range(30)]
    state = {"global_next_index": 260}
    examples = mixed({"a": 50, "b": 9}, **data)
    resumed = TrainBatches(examples, batch_size=10, seed=0, reading=Reading(prefetch=0))
    resumed.restore(state)
    for expected in batches[26:]:
        found = next(resumed)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert sum(len(part.read) for part in examples.parts.values()) == 40 and resumed.state() == {"global_next_index": 300}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"mixture": {"a": {"weight": 1}, "b": {}}}, "data.mixture: b has no weight, but a has one"),
        ({"mixture": {"a": {"weight": -1}, "b": {"weight": 1}}}, "data.mixture.a.weight=-1: must be a number, 0 or more"),
        ({"mixture": {"a": {"cap": 1.5}, "b": {}}}, "data.mixture.a.cap=1.5: must be above 0 and whole"),
        ({"mixture": {"a": {"epochs": 0}, "b": {}}}, "data.mixture.a.epochs=0: must be above 0"),
        ({"temperature": 0}, "data.temperature=0.0: must be above 0; 1 leaves the weights unchanged"),
        ({"curriculum": {"soon": {"a": 1}}}, 'data.curriculum.soon: write {"STEP": {"SOURCE": WEIGHT}}'),
        ({"curriculum": {"5": {"a": 1}, "05": {"b": 1}}}, "data.curriculum.05: step 5 occurs twice"),
        ({"curriculum": {"5": {"bb": 1}}}, r'5.bb \(did you mean "b"\?\): is not a source of data.mixture, which has a, b'),
        ({"curriculum": {"5": {"a": 0, "b": 0}}}, "all weights are 0 from step 5 on"),
        ({"mixture": {"a": {"weight": 1e-9}, "b": {"weight": 1}}}, "data.mixture.a: its share is below 1 of 100,000"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(data, message):
    with pytest.raises(UserError, match=message):
        mixed({"a": 5, "b": 5}, **data)


def test_settings_of_shares_are_read_as_given():
    data = {"mixture": {"a": {"weight": "2", "cap": "7"}, "b": {"weight": 1.0, "epochs": 3}}, "temperature": 1.0}
    found = shares(data)
    assert (found["a"].weight, found["a"].cap, found["b"].epochs) == (2.0, 7, 3.0)
    assert stages(data, {"a": 2.0, "b": 1.0}) == [(0, {"a": 1.0, "b": 0.5})]


@pytest.fixture
def data(tmp_path) -> dict:
    """The section `data` of a mixture of two files, of which one has a part of its own for validation."""
    for name, count in (("books", 12), ("wiki", 6), ("held", 3)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} {number}\n" for number in range(count)))
    (tmp_path / "more.csv").write_text("text,other\ncomma,1\n")
    config = experiment("bert", "mlm")
    wiki = '{"files": {"train": "DIR/wiki.txt", "validation": "DIR/held.txt"}}'
    mixture = '{"books": {"files": "DIR/books.txt", "weight": 0.7}, "wiki": WIKI}'.replace("WIKI", wiki)
    words = [("data.mixture", mixture.replace("DIR", str(tmp_path))), ("data.mixture.wiki.weight", "0.3")]
    words.append(("data.record", "line"))
    apply_overrides(config, words)
    return to_dict(config)["data"]


def test_sources_of_a_mixture_open_as_one(data, tmp_path):
    sources = open_sources(data, {})
    train, held = sources["train"], sources["validation"]
    assert isinstance(train, ConcatenatedSources) and len(train) == 18 and train.columns == ("text",)
    assert [train[11]["text"], train[12]["text"]] == ["books 11", "wiki 0"] and train.where(13) == "wiki.txt line 2"
    assert list(held.parts) == ["wiki"] and len(held) == 3 and set(train.fingerprint()) == {"books", "wiki"}
    with pytest.raises(IndexError):
        train[18]
    kept = train.take(np.array([1, 12, 17]), {"left_out": 15})
    assert [kept[index]["text"] for index in range(3)] == ["books 1", "wiki 0", "wiki 5"]
    assert isinstance(kept.parts["books"], Selected)
    # Where there is no validation, each source gives its share; a file for all of them takes its place.
    out = open_sources(data | {"hold_out": 0.5}, {})
    assert {name: len(part) for name, part in out["train"].parts.items()} == {"books": 6, "wiki": 6}
    assert {name: len(part) for name, part in out["validation"].parts.items()} == {"books": 6, "wiki": 3}
    whole = open_sources(data | {"hold_out": 0.5, "files": {"validation": str(tmp_path / "held.txt")}}, {})
    assert len(whole["train"]) == 18 and len(whole["validation"]) == 3 and not hasattr(whole["validation"], "parts")
    data["mixture"]["more"] = {"files": str(tmp_path / "more.csv"), "source": "csv", "record": None}
    assert open_split(data, "train")[18] == {"text": "comma"}


@pytest.mark.parametrize(("key", "value"), [("fold", "0/2"), ("hold_out_from", ("5",))])
def test_what_divides_a_mixture_beside_files_of_that_split_is_refused(data, tmp_path, key, value):
    files = {"validation": str(tmp_path / "held.txt")}
    with pytest.raises(UserError, match=rf"data\.{key} divides the training data, but data\.files\.validation is set"):
        parts_of(data | {key: value, "files": files}, PART_KEYS)
    assert parts_of(data | {"fold": "0/2", "files": {"test": "held.txt"}}, PART_KEYS)


def test_mistakes_in_the_sources_of_a_mixture(data, tmp_path):
    books = {"files": str(tmp_path / "books.txt")}
    for mixture, message in (
        ({"books": books}, "data.mixture has only one source, books; add another"),
        ({"a": books, "b": books | {"wieght": 1}}, r'data.mixture.b.wieght \(did you mean "weight"\?\): no such key'),
        ({"a": books, "b": "books.txt"}, r'data.mixture.b=books.txt: is not a group of keys; write {"files"'),
    ):
        with pytest.raises(UserError, match=message):
            parts_of(data | {"mixture": mixture}, PART_KEYS)
    with pytest.raises(UserError, match="names the training data, but so does data.files.train="):
        open_sources(data | {"files": {"train": "x.txt"}}, {})
    with pytest.raises(UserError, match="but so does a mixture of tasks"):
        open_sources(data, {"mlm": "train"})
    with pytest.raises(UserError, match="no source has test files; set --config.data.files.test=FILE"):
        open_split(data, "test")
