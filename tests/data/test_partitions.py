"""Splits by time, by the last records of groups and in folds, and records of groups."""

from __future__ import annotations

import datetime
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.sources import MemoryRecords

from fmjax.data.groups import Groups, group_numbers, times_of
from fmjax.data.partitions import TEST, TRAIN, VALIDATION, Rules, divide
from fmjax.data.splits import PART_KEYS, has_split, open_sources, open_split, open_splits
from fmjax.data.stream.mixing import parts_of
from fmjax.errors import UserError

EVENTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=60)


def events(pairs: list[tuple[int, int]]) -> MemoryRecords:
    return MemoryRecords({"user": f"u{user}", "time": str(time), "item": number} for number, (user, time) in enumerate(pairs))


def parts(source: MemoryRecords, **rules) -> np.ndarray:
    return divide(source, Rules(**rules)).parts


@given(EVENTS, st.integers(1, 3), st.integers(0, 3))
def test_last_records_of_each_group(pairs, hold_out, hold_out_test):
    """Against the definition: sort each group's records, and cut from the end."""
    wanted = np.zeros(len(pairs), np.uint8)
    for user in {user for user, _ in pairs}:
        own = sorted((number for number, pair in enumerate(pairs) if pair[0] == user), key=lambda number: pairs[number][1])
        for number in own[1:][::-1][:hold_out_test]:
            wanted[number] = TEST
        for number in own[1:][::-1][hold_out_test : hold_out_test + hold_out]:
            wanted[number] = VALIDATION
    rules = {"hold_out": float(hold_out), "hold_out_test": float(hold_out_test), "hold_out_by": "user", "time": "time"}
    if (wanted == VALIDATION).any() and (not hold_out_test or (wanted == TEST).any()):
        assert parts(events(pairs), **rules).tolist() == wanted.tolist()
    else:
        with pytest.raises(UserError, match=r"leaves no (validation|test) data among"):
            parts(events(pairs), **rules)


@given(EVENTS, st.integers(2, 8), st.booleans())
def test_each_record_is_in_exactly_one_fold_and_groups_are_whole(pairs, folds, grouped):
    source, by = events(pairs), "user" if grouped else ""
    total = len({user for user, _ in pairs}) if grouped else len(pairs)
    if total < folds:
        with pytest.raises(UserError, match=rf"{folds} folds of {total} (values of user|records) leave some empty; use fewer"):
            parts(source, fold=f"0/{folds}", hold_out_by=by)
        return
    held = np.stack([parts(source, fold=f"{fold}/{folds}", hold_out_by=by) == VALIDATION for fold in range(folds)])
    assert (held.sum(0) == 1).all()
    sizes = held.sum(1)
    if grouped:
        for fold in held:
            assert not {pairs[i][0] for i in np.flatnonzero(fold)} & {pairs[i][0] for i in np.flatnonzero(~fold)}
    # No fold is larger than the smallest by more than the largest group.
    largest = max(Counter(user for user, _ in pairs).values()) if grouped else 1
    assert sizes.max() - sizes.min() <= largest


@given(EVENTS, st.floats(0.05, 0.6))
def test_the_last_fraction_in_time_order(pairs, share):
    held = round(share * len(pairs))
    if not 0 < held < len(pairs):
        return
    found = parts(events(pairs), hold_out=share, time="time")
    order = sorted(range(len(pairs)), key=lambda number: pairs[number][1])  # stable: the order of the file
    assert np.flatnonzero(found).tolist() == sorted(order[-held:])


@given(EVENTS)
def test_records_of_groups_are_the_history_and_what_is_held_out(pairs):
    source = events(pairs)
    rules = Rules(hold_out=1.0, hold_out_by="user", time="time", group_by="user")
    counts = Counter(user for user, _ in pairs)
    if max(counts.values()) < 2:
        return
    found = divide(source, rules)
    train, held = (
        Groups(source, "user", found.groups, found.times, found.parts, part, rules.mark) for part in (TRAIN, VALIDATION)
    )
    assert len(train) == len(counts) and len(held) == sum(count > 1 for count in counts.values())
    assert sum(len(train[index]["item"]) for index in range(len(train))) + len(held) == len(pairs)
    of = {train[index]["user"]: train[index]["item"] for index in range(len(train))}
    assert list(of) == list(dict.fromkeys(f"u{user}" for user, _ in pairs))  # in order of first occurrence
    for index in range(len(held)):
        record = held[index]
        times = [int(time) for time in record["time"]]
        assert times == sorted(times) and record["item"][:-1] == of[record["user"]]
        assert record["history"] == len(record["item"]) - 1
        assert all(held.value(index, name) == record[name] for name in held.columns)


def write_events(folder: Path) -> dict:
    lines = ["user,item,time", *(f"u{number % 3},i{number},2013-03-{number + 1:02}" for number in range(9))]
    (folder / "events.csv").write_text("\n".join(lines) + "\n")
    return {"source": "auto", "files": {"train": str(folder / "events.csv")}}


def items(source) -> list[str]:
    return [source[index]["item"] for index in range(len(source))]


def test_splits_of_a_config(tmp_path, capsys):
    data = write_events(tmp_path)
    last = data | {"time": "time", "hold_out_by": "user", "hold_out": 1.0, "hold_out_test": 1.0}
    splits = open_splits(last, ("train", "validation", "test"))
    assert [items(source) for source in splits.values()] == [["i0", "i1", "i2"], ["i3", "i4", "i5"], ["i6", "i7", "i8"]]
    assert list(open_sources(last, {})) == ["train", "validation"] and has_split(last, "test")
    assert not has_split(data | {"hold_out": 0.5}, "test")
    assert items(open_split(last, "test")) == ["i6", "i7", "i8"]
    marks = [source.fingerprint() for source in splits.values()]
    assert marks[0] != marks[1] and marks[1]["hold_out_by"] == "user" and marks[1]["part"] == "validation"
    since = data | {"time": "time", "hold_out_from": ("2013-03-05", "2013-03-07T00:00:00+00:00")}
    assert [len(source) for source in open_splits(since, ("train", "validation", "test")).values()] == [4, 2, 3]
    assert items(open_split(since, "validation")) == ["i4", "i5"]
    both = open_splits(since | {"hold_out_test": 0.1}, ("train", "test"))
    assert len(both["test"]) == 3 and "data.hold_out_test=0.1 has no effect beside" in capsys.readouterr().err
    mixture = {"a": {"files": data["files"]}, "b": since | {"weight": 1.0}}
    mixture["b"].pop("source")
    own = parts_of(data | {"files": {}, "hold_out_test": 0.5, "mixture": mixture}, PART_KEYS)
    assert own["a"]["hold_out_test"] == 0.5 and own["b"]["hold_out_test"] is None
    # A fold takes the place of the fraction that a config sets.
    fold = open_splits(data | {"fold": "2/3", "hold_out": 0.1, "hold_out_by": "user"}, ("train", "validation"))
    assert len(fold["validation"]) == 3 and len(set(items(fold["validation"])) | set(items(fold["train"]))) == 9
    views = open_splits(last | {"group_by": "user"}, ("train", "validation", "test"))
    assert pickle.loads(pickle.dumps(views["test"]))[0] == {
        "user": "u0", "item": ["i0", "i3", "i6"], "time": ["2013-03-01", "2013-03-04", "2013-03-07"], "history": 2,
    }  # fmt: skip
    assert views["validation"].where(1) == "events.csv line 3 (the first of 2 with the same user)"
    own = open_split({"source": "auto", "files": {"validation": data["files"]["train"]}, "group_by": "user"}, "validation")
    assert len(own) == 3 and own[0]["history"] == 0 and own[0]["item"] == ["i0", "i3", "i6"]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"time": "tim", "hold_out": 0.5}, r'no column "tim" \(did you mean "time"\?\)'),
        ({"time": "item", "hold_out": 0.5}, r"line 2: has 'i0' in column \"item\", but data.time needs a number, or a date"),
        ({"fold": "0/4", "hold_out_by": "user"}, r"data\.fold=0/4: 4 folds of 3 values of user leave some empty"),
        ({"fold": "3/3"}, r'data\.fold="3/3": write FOLD/FOLDS, such as 0/5 to 4/5'),
        ({"fold": "0/3", "files": {"validation": "x.csv"}}, r"data\.fold divides .*, but data\.files\.validation is set too"),
        ({"hold_out": 2.0}, r"data\.hold_out=2: must be a fraction between 0 and 1, or with data\.time a whole number"),
        ({"hold_out": 2.0, "files": {"validation": "x.csv"}}, r"data\.hold_out=2: must be a fraction between 0 and 1"),
        ({"time": "time"}, r"data\.time=time has no effect, since nothing divides the data; set data\.hold_out or"),
        ({"time": "time", "fold": "0/3"}, r"data\.time=time has no effect, since data\.fold divides at random"),
        ({"hold_out": 1.5, "time": "time"}, r"data\.hold_out=1\.5: must be a fraction between"),
        ({"hold_out_from": ("2013-03-05",)}, r"data\.hold_out_from needs the column of the times; set data\.time"),
        ({"hold_out_from": ("2013-03-05",), "time": "time", "hold_out_by": "user"}, r"data\.hold_out_by=user in several splits"),
        ({"hold_out_from": ("5",), "time": "time"}, r"data\.hold_out_from=5: must be a date such as .*, as in the column"),
        ({"hold_out_from": ("2013-03-05", "2013-03-04"), "time": "time"}, r"name the time at which the validation data begin"),
        ({"hold_out_from": ["2014-03-05"], "time": "time"}, r"data\.hold_out_from=2014-03-05, data\.time=time: leaves no val"),
        ({"hold_out": 9.0, "time": "time"}, r"data\.hold_out=9\.0, data\.time=time: leaves no train data among 9 records"),
        ({"hold_out": 0.6, "hold_out_test": 0.5}, r"data\.hold_out_test=0\.5: leaves no train data among 9 records"),
    ],
)  # fmt: skip
def test_splits_that_cannot_be(tmp_path, rules, message):
    data = write_events(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_sources(data | rules | {"files": data["files"] | rules.get("files", {})}, {})
    assert "\n" not in str(caught.value)


def test_times_and_groups_are_read_strictly():
    def of(*times: object) -> np.ndarray:
        return times_of(MemoryRecords({"time": time} for time in times), "time")

    assert of("5", 7, "-3").tolist() == [5, 7, -3] and of(2**60 + 1, 2**60).tolist() == [2**60 + 1, 2**60]
    assert of("1.5", 1).tolist() == [1.5, 1.0] and of(1, 2.5).dtype == np.float64
    assert of(datetime.date(1970, 1, 2), "1970-01-02T00:00:01Z").tolist() == [86_400_000_000, 86_401_000_000]
    for times in ((1, None), (1, ""), (1, "2013-03-01"), ("2013-03-01", 5), (1, True), (1, "nan"), (1, 2**63), (1, "inf")):
        with pytest.raises(UserError, match=r'line 2: has .* in column "time", but data\.time needs (a number|a date)'):
            of(*times)
    source = MemoryRecords({"by": value} for value in ("b", "a", "b", 3))
    assert group_numbers(source, "by").tolist() == [0, 1, 0, 2] and group_numbers(source, "by").dtype == np.uint8
    with pytest.raises(UserError, match=r'line 2: has no value in column "by"; fill it in'):
        group_numbers(MemoryRecords({"by": value} for value in ("b", None)), "by", required=True)


def test_real_events_and_speakers(shared_data):
    data = {"source": "auto", "files": {"train": str(shared_data / "rec_movietweetings/ratings.csv")}}
    data |= {"time": "timestamp", "hold_out_by": "user", "hold_out": 1.0, "hold_out_test": 1.0, "group_by": "user"}
    views = open_splits(data, ("train", "validation", "test"))
    assert sum(len(views["train"].value(i, "item")) for i in range(200)) > 200
    users = len({views["train"].value(i, "user") for i in range(len(views["train"]))})
    assert users == len(views["train"]) >= len(views["validation"]) and len(views["test"]) >= len(views["validation"])


@pytest.mark.parametrize(
    ("rules", "mixed"),
    [
        ({"hold_out": 0.5, "group_by": "user"}, True),
        ({"fold": "0/2", "time": "time", "group_by": "user"}, True),
        ({"hold_out": 0.5, "group_by": "user", "time": "time"}, False),
        ({"hold_out": 0.5, "group_by": "user", "hold_out_by": "user"}, False),
        ({"hold_out": 0.5}, False),
    ],
)
def test_histories_with_later_records_are_announced(rules, mixed):
    assert Rules(**rules).mixes_times == mixed
