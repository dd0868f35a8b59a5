"""A tokenized corpus: a view on a token store, which is built once and then shared by all runs."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from fmjax.contracts import Example, Record, Source, Value
from fmjax.data.identity import identity, numbers
from fmjax.data.kinds.encoding import Encoder, encode, id_type
from fmjax.data.records import Selected
from fmjax.data.sources.array_records import ArrayRecords
from fmjax.data.storage import ranged_store, token_store
from fmjax.data.storage.ranged import RangedFile
from fmjax.data.storage.token_store import TokenStore, Writer
from fmjax.data.stream.tolerance import Watched, current_tolerance
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.distributed.hosts import say
from fmjax.distributed.progress import RecordProgress
from fmjax.errors import RecordError, UserError, one_line
from fmjax.tasks.token_rows import NOTHING

BLOCK = 2**18  # documents that are cut at a time


class Documents(Protocol):
    """Tokenized documents, one after the other: a `TokenStore`, or arrays."""

    @property
    def ends(self) -> np.ndarray:
        """[documents]: the end of each in tokens."""

    def read(self, begin: int, end: int) -> np.ndarray:
        """Returns the tokens from `begin` to before `end`, int32."""


class MemoryDocuments(NamedTuple):
    """Documents in memory: their tokens [T], and the end of each."""

    tokens: np.ndarray
    ends: np.ndarray

    def read(self, begin: int, end: int) -> np.ndarray:
        return self.tokens[begin:end].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The text that chosen documents form, each between special tokens. Only the ends of documents
    are in memory; places are counted in tokens of this text.

    Attributes:
      documents: all documents.
      chosen: the numbers of those in this text [D]; None: all.
      before: special tokens before each, int32.
      after: special tokens after each, int32.
      characters: characters of the text.
      bytes: UTF-8 bytes of the text.
    """

    documents: Documents
    chosen: np.ndarray | None = None
    before: np.ndarray = dataclasses.field(default_factory=lambda: NOTHING)
    after: np.ndarray = dataclasses.field(default_factory=lambda: NOTHING)
    characters: int = 0
    bytes: int = 0

    def __reduce__(self) -> tuple[type[Corpus], tuple[Value, ...]]:
        return Corpus, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def counts(self) -> np.ndarray:
        """[D]: the number of tokens of each document, without special ones."""
        ends = self.documents.ends
        if self.chosen is None:
            return np.diff(ends, prepend=0)
        first = self.chosen == 0
        begins: np.ndarray = np.where(first, 0, ends[self.chosen - ~first])
        counts: np.ndarray = ends[self.chosen] - begins
        return counts

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """[D]: the end of each document in this text."""
        special = self.before.size + self.after.size
        if self.chosen is None and not special:
            return self.documents.ends
        return np.cumsum(self.counts + special)

    @property
    def begins(self) -> np.ndarray:
        """[D]: the begin of each document in this text."""
        return np.concatenate([[0], self.bounds[:-1]])

    @property
    def size(self) -> int:
        """The number of tokens, special ones included."""
        return int(self.bounds[-1]) if len(self.bounds) else 0

    def read(self, begin: int, end: int) -> np.ndarray:
        """Returns the tokens from `begin` to before `end`, int32."""
        if self.bounds is self.documents.ends:
            return self.documents.read(begin, end)
        number = int(np.searchsorted(self.bounds, begin, side="right"))
        parts = [NOTHING]
        while begin < end:
            first = int(self.bounds[number - 1]) if number else 0
            stop = min(end, int(self.bounds[number]))
            parts.append(self.part(number, begin - first, stop - first))
            begin, number = stop, number + 1
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def part(self, number: int, begin: int, end: int) -> np.ndarray:
        """Returns some tokens of a document, special ones included."""
        stored = number if self.chosen is None else int(self.chosen[number])
        first = int(self.documents.ends[stored - 1]) if stored else 0
        count = int(self.documents.ends[stored]) - first
        opening = self.before[begin:end]
        begin, end = begin - self.before.size, end - self.before.size
        low, high = (min(max(place, 0), count) for place in (begin, end))
        inside = self.documents.read(first + low, first + high)
        closing = self.after[max(begin - count, 0) : max(end - count, 0)]
        if not opening.size and not closing.size:
            return inside
        return np.concatenate([opening, inside, closing])

    def side_by_side(self, pieces: np.ndarray) -> Example:
        """Returns the concatenated `tokens` of pieces [N,2], and the begins of all but the first
        (`begins`)."""
        parts = [self.read(begin, end) for begin, end in pieces.tolist()]
        return {
            "tokens": np.concatenate(parts),
            "begins": np.cumsum([part.size for part in parts])[:-1],
        }

    def pieces(self, most: int) -> np.ndarray:
        """Returns [pieces, 2]: begin and end of consecutive pieces of at most `most` tokens, none
        crossing a document.

        Raises UserError if `most` leaves no room for a token.
        """
        if most < 1:
            raise UserError(
                "data.max_length leaves no room for a token besides the special ones; raise it"
            )
        return cut(self.begins, self.bounds, most)

    def documents_of(self, pieces: np.ndarray) -> np.ndarray:
        """Returns the number of the document that each piece [N,2] is in, int32 or int64."""
        found = np.searchsorted(self.bounds, pieces[:, 0], side="right")
        return found.astype(np.int32) if len(self.bounds) < 2**31 else found

    def enclosed(self, before: np.ndarray, after: np.ndarray) -> Corpus:
        """Returns the non-empty documents, each between special tokens."""
        kept = np.flatnonzero(self.counts)
        chosen = kept if self.chosen is None else self.chosen[kept]
        return dataclasses.replace(
            self, chosen=narrow(chosen, self.documents), before=before, after=after
        )


def narrow(chosen: np.ndarray | None, documents: Documents) -> np.ndarray | None:
    """Returns numbers of documents in a smaller type; None if they are all documents."""
    count = len(documents.ends)
    if chosen is None or (len(chosen) == count and (np.diff(chosen) > 0).all()):
        return None
    return chosen.astype(np.int32 if count < 2**31 else np.int64)


def cut(begins: np.ndarray, ends: np.ndarray, most: int) -> np.ndarray:
    """Returns [pieces, 2]: begin and end of consecutive pieces of at most `most`, none crossing the
    border of a span; uint32 if that is enough, otherwise int64."""
    counts = np.maximum(-((begins - ends) // most), 0)
    last = int(ends[-1]) if len(ends) else 0
    pieces = np.empty((int(counts.sum()), 2), np.uint32 if last < 2**32 else np.int64)
    done = 0
    for at in range(0, len(counts), BLOCK):
        span = slice(at, at + BLOCK)
        many = counts[span]
        number = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)  # in its span
        starts = np.repeat(begins[span], many) + most * number
        own = pieces[done : done + starts.size]
        own[:, 0] = starts
        own[:, 1] = np.minimum(starts + most, np.repeat(ends[span], many))
        done += starts.size
    return pieces


def tokenize(source: Source, column: str, tokenizer: Tokenizer) -> Corpus:
    """Returns the tokens of a column of every record, from a token store, which is built if there
    is none. Stored ids from the same tokenizer are read instead of the text.

    Some records of a source, such as those that are not held out, are a view on the store of the
    source, unless they are fewer than half of it and there is none.

    Raises UserError if a record's text is not a string or no record has a token.
    """
    store, chosen = Made(column, tokenizer).view(source)
    check_records(source, store.header["bad"], chosen)
    chosen = narrow(chosen, store)
    characters, size = store.header["characters"], store.header["bytes"]
    if chosen is not None:
        characters, size = store.sizes[chosen].sum(axis=0).tolist() if len(chosen) else (0, 0)
    corpus = Corpus(store, chosen, characters=characters, bytes=size)
    if not corpus.size:
        raise UserError(
            f'column "{column}" has no text in any of {len(source)} records; use data with text'
        )
    return corpus


def check_records(
    source: Source, bad: Sequence[tuple[int, str, str]], chosen: np.ndarray | None
) -> None:
    """Raises RecordError for the first of the records of a source, those `chosen` from a store,
    that could not be read. Its place is where it is now: files may have been renamed."""
    for stored, _, problem in bad:
        found = [stored] if chosen is None else np.flatnonzero(chosen == stored).tolist()
        if found:
            raise RecordError(source.where(found[0]), problem, found[0])


@dataclasses.dataclass(frozen=True)
class Made:
    """How stores are made: from a column, with a tokenizer."""

    column: str
    tokenizer: Tokenizer

    def key(self, source: Source) -> str:
        """Returns the name of the store of a source; another process has another one if the content
        is not known."""
        return token_store.key_of(identity(source, here=True), self.column, self.tokenizer.sha256)

    def find(self, source: Source) -> TokenStore | None:
        """Returns the store of a source: in `data.store` or the cache, or where
        `scripts/prepare_data.py` has written it; None if there is none."""
        key = self.key(source)
        found = token_store.find(key, [token_store.place(), *folders_of(source)])
        return found or self.find_remote(source, key)

    def find_remote(self, source: Source, key: str) -> TokenStore | None:
        """Returns the store of a source in a bucket: in `data.store`, or beside its files."""
        if place := token_store.remote_place():
            return ranged_store.find(place, lambda name, header: name == key)
        files = ranged_files_of(source)
        if not files or len({file.folder for file in files}) > 1:
            return None
        marks = [file.fingerprint() for file in files]
        return ranged_store.find(
            files[0].folder,
            lambda name, header: ranged_store.holds(
                header, self.column, self.tokenizer.sha256, marks
            ),
        )

    def view(self, source: Source) -> tuple[TokenStore, np.ndarray | None]:
        """Returns a store that has the records of a source, and which they are (None: all)."""
        found: list[tuple[Source, np.ndarray | None]] = [(source, None)]
        while isinstance(source, Selected):
            chosen = found[-1][1]
            chosen = numbers(source) if chosen is None else numbers(source)[chosen]
            source = source.source
            found.append((source, chosen))
        for base, chosen in found:
            if store := self.find(base):
                return store, chosen
        base, chosen = found[0]
        for larger, those in found[1:]:
            if not isinstance(base, Watched) and 2 * len(base) < len(larger):
                break
            base, chosen = larger, those
        return self.build(base, chosen), chosen

    def build(self, source: Source, chosen: np.ndarray | None) -> TokenStore:
        """Returns the store of a source, built by this process or another one. Only bad records
        among the `chosen` ones are an error."""
        tolerance = current_tolerance()
        most = 0 if tolerance is None else tolerance.most
        tolerant = most > 0 or chosen is not None
        encoder = Encoder(source, self.column, self.tokenizer, tolerant)
        inside = np.full(len(source), chosen is None)
        if chosen is not None:
            inside[chosen] = True

        def check(bad: Sequence[tuple[int, str, str]]) -> None:
            wrong = [one for one in bad if inside[one[0]]]
            if len(wrong) <= most:
                return
            if tolerance is not None and most:
                for _, place, problem in wrong:  # ends with an error
                    tolerance.add(one_line(RecordError(place, problem)))
            else:
                index, place, problem = wrong[0]
                own = index if chosen is None else int(np.flatnonzero(chosen == index)[0])
                raise RecordError(place, problem, own)

        def fill(writer: Writer) -> Record:
            bad: list[tuple[int, str, str]] = []
            with RecordProgress("tokenize", len(source)) as progress:
                for found in encode(encoder):
                    bad += found.bad
                    check(bad)
                    done = writer.documents + len(found.part.counts)
                    writer.add(found.part, done / len(source))
                    progress.advance(done, writer.tokens, "tokens")
            if progress.bar is not None:
                folder = writer.folder.parent
                say(f"tokenized {len(source):,} records: {writer.tokens:,} tokens in {folder}")
            return {"bad": bad, "column": self.column, "tokenizer": self.tokenizer.sha256}

        if place := token_store.remote_place():
            say(
                f"data.store={place} has no tokens of these data; they are stored in "
                f"{token_store.place() / self.key(source)}, which you may copy there"
            )
        store = token_store.get_or_build(
            token_store.place(), self.key(source), id_type(self.tokenizer), fill
        )
        if identity(source) is None:  # no other process finds it
            atexit.register(shutil.rmtree, store.folder, ignore_errors=True)
        return store


def folders_of(source: Source) -> list[Path]:
    """Returns the folders of prepared files, where their store is."""
    if not isinstance(source, ArrayRecords):
        return []
    paths = (file.path for file in source.files)
    return list(dict.fromkeys(path.parent for path in paths if isinstance(path, Path)))


def ranged_files_of(source: Source) -> list[RangedFile]:
    """Returns the prepared files of a source if they are read by range."""
    paths = [file.path for file in source.files] if isinstance(source, ArrayRecords) else []
    return [path for path in paths if isinstance(path, RangedFile)]
