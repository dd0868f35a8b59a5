"""JSON files with lists of objects that refer to each other by ids, such as COCO's annotations of
images (Lin et al. 2014, arXiv:1405.0312).

In `{"images": [{"id": 7, ...}], "annotations": [{"image_id": 7, "category_id": 1, ...}],
"categories": [{"id": 1, ...}]}`, a key such as `image_id` refers to the list `images`. A record is
an object of one list that others refer to, with all objects that refer to it:
`{"id": 7, ..., "annotations": [{"category": {"id": 1, ...}, ...}]}`. `data.record` names this list;
otherwise it is one of MAIN, or the largest. A file may also be one list of objects, or have one
list only.

A file is memory-mapped and parsed one object at a time. An index (`index.py`) holds the begin and
end of each.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from fmjax.config.json_files import parse_json
from fmjax.contracts import Record, Value
from fmjax.data.records import RecordSource, fill_columns, locate
from fmjax.data.sources.kinds import SourceKind
from fmjax.data.storage.index import Index
from fmjax.data.storage.mapped import File, open_files
from fmjax.errors import RecordError, UserError, one_line, one_of

TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
MAIN = ("images", "videos")  # lists of records, even if a subset has more categories
MOST_SHARED = 100_000  # objects of a list like COCO's categories, which are kept in memory


class Objects:
    """The objects of a list: their begins and ends, hashes of their ids, and of the ids that they
    refer to, by key."""

    def __init__(self) -> None:
        self.begins, self.ends, self.ids = array("Q"), array("Q"), array("q")
        self.refers: dict[str, array[int]] = {}

    def add(self, begin: int, end: int, found: Record) -> None:
        self.begins.append(begin)
        self.ends.append(end)
        self.ids.append(hash(json.dumps(found.get("id"))))
        for key in found:
            if key.endswith("_id") and key not in self.refers:
                self.refers[key] = array("q", [0] * (len(self) - 1))
        for key, hashes in self.refers.items():
            hashes.append(hash(json.dumps(found.get(key))))

    def __len__(self) -> int:
        return len(self.begins)


class JsonLists(RecordSource):
    """Objects of JSON files, with the objects that refer to them.

    Raises UserError, naming the file and the place, for files that are not JSON, for ids that occur
    twice or not at all, and for lists that no ids join.
    """

    def __init__(self, paths: Sequence[Path], split: str, record: str = ""):
        self.split, self.files, self.record = split, open_files(paths), record
        self.places: list[Index] = []
        for file in self.files:
            found = file.index(
                __name__, {"version": 3, "record": record}, 4, partial(self.scan, file)
            )
            if not found.facts["count"]:
                raise UserError(
                    f"{file.path}: no records for {split}: has no list of objects; use a file with "
                    "one, or, if each line is an object, --config.data.source=jsonl"
                )
            self.places.append(found)
        others = self.places[0].facts["others"]
        if others and not record:
            from fmjax.distributed.hosts import say  # imported here because it imports jax

            say(
                f"{self.files[0].path.name}: each of {self.places[0].facts['main']} is a record; "
                f"data.record={others[0]} would make one of each of {others[0]}"
            )
        # The number of records before each file, [files + 1].
        self.bounds = np.cumsum([0, *(place.facts["count"] for place in self.places)])
        self.columns = tuple(
            dict.fromkeys(name for place in self.places for name in place.facts["columns"])
        )
        self.fingerprint()  # computed now, before the files can change

    def scan(self, file: File, facts: Record) -> Iterator[tuple[int, int, int, int]]:
        """Yields a row for each record: its begin and end, and the first and one-past-last row of
        the objects that refer to it; then a row for each of these: its begin and end, and the
        number of its list."""
        lists, columns = dict[str, Objects](), dict[str, dict[str, None]]()
        named = dict[str, None]()  # all lists
        for name, begin, end in objects(file, named):
            found = parsed(file, name, len(lists.get(name, ())), begin, end)
            lists.setdefault(name, Objects()).add(begin, end, found)
            columns.setdefault(name, {}).update(dict.fromkeys(found))
        if lists and self.record not in lists and self.record in named:
            raise UserError(
                f"{file.path}: data.record={self.record}: this list has no objects; name another "
                f"one ({', '.join(lists)}), or add some"
            )
        main, gathered, shared, largest = joined(file, lists, self.record)
        records = lists.get(main, Objects())
        order, owners, joins = gather(file, lists, main, gathered)
        for key, name in shared.items():
            check_shared(file, lists, key, name)
        facts |= {"count": len(records), "main": main, "gathered": list(gathered)}
        facts["others"] = [name for name in largest if name != main]
        facts["largest"] = next(iter(largest), main)
        facts["columns"] = [*columns.get(main, ()), *gathered]
        facts["shared"] = {
            key: {
                json.dumps(found.get("id")): found
                for found in (
                    parsed(file, name, number, *span)
                    for number, span in enumerate(
                        zip(lists[name].begins, lists[name].ends, strict=True)
                    )
                )
            }
            for key, name in shared.items()
        }
        bounds = len(records) + np.searchsorted(owners, np.arange(len(records) + 1))
        for number in range(len(records)):
            span = int(bounds[number]), int(bounds[number + 1])
            yield records.begins[number], records.ends[number], *span
        names = list(gathered)
        for number, own in zip(order.tolist(), joins.tolist(), strict=True):
            of = lists[names[own]]
            yield of.begins[number], of.ends[number], own, 0

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: int) -> Record:
        number, row = locate(self.bounds, index)
        file, place = self.files[number], self.places[number]
        names, shared = place.facts["gathered"], place.facts["shared"]
        begin, end, first, last = place.rows[row].tolist()
        record: Record = with_shared(self.parse(file, begin, end, index), shared)
        record |= {name: [] for name in names}
        for begin, end, own, _ in place.rows[first:last].tolist():
            record[names[own]].append(with_shared(self.parse(file, begin, end, index), shared))
        return fill_columns(record, self.columns)

    def parse(self, file: File, begin: int, end: int, index: int) -> Record:
        try:
            found: Record = parse_json(file.read(begin, end))
        except ValueError as error:
            raise RecordError(
                self.where(index), f"is not JSON ({error}); correct it", index
            ) from None
        return found

    def where(self, index: int) -> str:
        number, row = locate(self.bounds, index)
        return f"{self.files[number].path.name}: {self.places[number].facts['main']}[{row}]"

    def fingerprint(self) -> Record:
        files = [file.fingerprint for file in self.files]
        # Earlier versions took the largest list.
        facts = [place.facts for place in self.places]
        chosen = dict.fromkeys(own["main"] for own in facts if own["main"] != own["largest"])
        record = self.record or ",".join(chosen)
        options = {"record": record} if record else {}
        return {"source": "json", "split": self.split, **options, "files": files}


def with_shared(found: Record, shared: Mapping[str, Mapping[str, Value]]) -> Record:
    """Returns an object with what its keys such as `category_id` refer to, as `category`."""
    for key, known in shared.items():
        if key in found:
            found[key.removesuffix("_id")] = known.get(json.dumps(found[key]))
    return found


def objects(file: File, names: dict[str, None]) -> Iterator[tuple[str, int, int]]:
    """Yields the list, begin and end of each object in the lists of a file, in order, and adds the
    names of all lists to `names`. If the file is a list, its name is "".

    Raises UserError if brackets do not match.
    """
    opened: list[bytes] = []
    key, begin = "", 0
    for match in TOKEN.finditer(file.data):
        token = match[0]
        if token in (b"{", b"["):
            opened.append(token)
            if token == b"{" and opened[:-1] in ([b"["], [b"{", b"["]):
                begin = match.start()
            elif opened == [b"{", b"["]:
                names[key] = None
        elif token in (b"}", b"]"):
            if not opened or opened.pop() != (b"{" if token == b"}" else b"["):
                raise UserError(
                    f"{file.path}: is not JSON (unexpected {token.decode()} at byte "
                    f"{match.start():,}); fetch it again"
                )
            if token == b"}" and opened in ([b"["], [b"{", b"["]):
                yield ("" if len(opened) == 1 else key), begin, match.end()
        elif len(opened) == 1:
            key = token[1:-1].decode("utf-8", "replace")
    if opened or not TOKEN.search(file.data):
        raise UserError(f"{file.path}: is not a complete JSON file; fetch it again")


def parsed(file: File, name: str, number: int, begin: int, end: int) -> Record:
    """Returns an object of a list. Raises UserError, naming the place, if it is malformed."""
    try:
        found: Record = parse_json(file.read(begin, end))
    except ValueError as error:
        raise UserError(
            f"{file.path}: {name}[{number}] is not JSON ({one_line(error, 200)}); correct it"
        ) from None
    return found


def singulars(name: str) -> tuple[str, ...]:
    """Returns what a key may call an object of a list: "images" has `image_id`."""
    return name, name.removesuffix("s"), name.removesuffix("ies") + "y"


def joined(
    file: File, lists: Mapping[str, Objects], record: str
) -> tuple[str, dict[str, str], dict[str, str], list[str]]:
    """Returns the list of the records, `record` if it is set; the lists that refer to it, each with
    the key; by key, the lists that objects refer to otherwise; and the lists that could be those
    of the records, the largest first.

    Raises UserError if several lists are not joined, or there is no list `record`.
    """
    if record and "" in lists:
        raise UserError(f"{file.path}: is one list, which has no name; unset data.record")
    if record and lists:
        one_of("data.record", record, lists)
    links = {
        (name, key): other
        for name, own in lists.items()
        for key in own.refers
        for other in lists
        if other != name and key.removesuffix("_id") in singulars(other)
    }
    if not links:
        if record or len(lists) < 2:
            return record or next(iter(lists), ""), {}, {}, []
        raise UserError(
            f"{file.path}: has the lists {', '.join(lists)}, but no ids that join them, such as "
            "image_id for images; name one with --config.data.record, or convert the file to JSON "
            "lines"
        )
    largest = sorted(dict.fromkeys(links.values()), key=lambda name: -len(lists[name]))
    usual = next((name for name in MAIN if name in largest), largest[0])
    main = record or usual
    gathered = {name: key for (name, key), other in links.items() if other == main}
    shared = {key: other for (_, key), other in links.items() if other != main}
    for key, name in shared.items():
        if len(lists[name]) > MOST_SHARED:
            raise UserError(
                f"{file.path}: {key} refers to {len(lists[name]):,} {name}, more than "
                f"{MOST_SHARED:,}; convert the file to JSON lines"
            )
    return main, gathered, shared, largest


def gather(
    file: File, lists: Mapping[str, Objects], main: str, gathered: Mapping[str, str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the objects that refer to the records, sorted by record: the number of each in its
    list, the record's number, and the number of the list.

    Raises UserError for an id that two records have, and for one that none has.
    """
    none = np.zeros(0, np.int64)
    if not gathered:
        return none, none, none
    ids = np.frombuffer(lists[main].ids, np.int64)
    by_id = np.argsort(ids, kind="stable")
    twice = np.flatnonzero(np.diff(ids[by_id]) == 0)
    if len(twice):
        first, second = by_id[twice[0]], by_id[twice[0] + 1]
        raise UserError(
            f"{file.path}: {main}[{first}] and {main}[{second}] have the same id; correct one"
        )
    numbers, owners, joins = [none], [none], [none]
    for own, (name, key) in enumerate(gathered.items()):
        refers = np.frombuffer(lists[name].refers[key], np.int64)
        at = np.minimum(np.searchsorted(ids[by_id], refers), len(ids) - 1)
        lost = np.flatnonzero(ids[by_id[at]] != refers)
        if len(lost):
            raise UserError(
                f"{file.path}: {name}[{lost[0]}] has the {key} of none of {main}; correct it"
            )
        numbers.append(np.arange(len(refers)))
        owners.append(by_id[at])
        joins.append(np.full(len(refers), own))
    all_owners = np.concatenate(owners)
    order = np.argsort(all_owners, kind="stable")
    return np.concatenate(numbers)[order], all_owners[order], np.concatenate(joins)[order]


def check_shared(file: File, lists: Mapping[str, Objects], key: str, name: str) -> None:
    """Raises UserError for an id that two objects of the list `name` have, and for a `key` that
    none has; a key may be null, or left out."""
    ids = np.frombuffer(lists[name].ids, np.int64)
    _, first = np.unique(ids, return_index=True)
    if len(first) < len(ids):
        again = np.setdiff1d(np.arange(len(ids)), first)[0]
        raise UserError(
            f"{file.path}: {name}[{again}] has the id of an earlier one of {name}; correct one"
        )
    known = np.append(ids, [0, hash(json.dumps(None))])
    for other, own in lists.items():
        lost = np.flatnonzero(~np.isin(np.array(own.refers.get(key, ()), np.int64), known))
        if len(lost):
            raise UserError(
                f"{file.path}: {other}[{lost[0]}] has the {key} of none of {name}; correct it"
            )


SOURCES = (SourceKind("json", JsonLists, options=("record",)),)
