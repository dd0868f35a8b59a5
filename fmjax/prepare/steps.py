"""Pipeline steps that datatrove lacks: a reader that names unreadable records, words without models
to download, counts of dropped documents, and a writer for ArrayRecord."""

from __future__ import annotations

import csv
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.base import BaseDiskReader
from datatrove.utils.word_tokenizers import WordTokenizer, simple_span_tokenize

from fmjax.contracts import Record
from fmjax.data.characters import is_blank, numbered_lines
from fmjax.data.records import json_object
from fmjax.data.sources.open import open_source
from fmjax.errors import RecordError, UserError
from fmjax.prepare import report as reports
from fmjax.prepare.report import FIRST, LAST, PARTS, TALLIES, Shards, Tally, write_json
from fmjax.prepare.tokens import FOLDER, TaskTokens, place_tokens

SHOWN = 1000  # number of near-duplicate clusters whose remaining document is stored for the report
# Scripts without spaces between words: each letter counts as a word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
)
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
SENTENCE = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")


class Words(WordTokenizer):
    """Splits texts into words at white space, as the rules of the Gopher paper count them, and into
    sentences, in any language.

    Those of datatrove are models that need packages and downloads.
    """

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [part.strip() for part in SENTENCE.split(text) if part.strip()]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return list(simple_span_tokenize(text, self.sent_tokenize(text)))


class Dropped(Tally):
    """Counts the documents that a datatrove filter drops: its exclusion writer."""

    rank = 0

    def __enter__(self) -> Dropped:
        self.begin()
        return self

    def write(self, document: Document, rank: int = 0) -> None:
        self.rank = rank
        reason = document.metadata.get("filter_reason", "duplicate")
        cluster = document.metadata.get("minhash_cluster_id", -1)
        self.note(reason, document.text, document.metadata["where"], cluster)

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.reasons:  # a failed task is run again
            self.end(self.rank)


class Documents(BaseDiskReader):
    """Reads documents from files of texts, JSON lines, tables or Parquet, also compressed, and
    names each by its file and location.

    Raises RecordError for a record that cannot be read; datatrove's own readers skip it.
    """

    name = "documents"

    def __init__(self, kind: str, root: str, paths_file: str, column: str, record: str, work: Path):
        super().__init__(root, paths_file=paths_file, text_key=column)
        self.kind, self.record, self.work = kind, record, work

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[Document]:
        """Yields the task's documents. Those without text count as dropped."""
        blank = Tally(self.work, "blank")
        counts = {"documents": 0, "characters": 0}
        began = time.monotonic()
        for document in super().run(data, rank, world_size):
            counts["documents"] += 1
            counts["characters"] += len(document.text)
            if document.text.strip():
                yield document
            else:
                blank.note("no text", document.text, document.metadata["where"])
        blank.end(rank)
        write_json(
            self.work / TALLIES / FIRST / f"{rank:05d}.json",
            counts | {"seconds": time.monotonic() - began},
        )

    def read_file(self, filepath: str) -> Iterator[Document]:
        place = ""
        try:
            for place, text in READERS.get(self.kind, Documents.read_source)(self, filepath):
                yield Document(text, place, metadata={"where": place})
        except (EOFError, OSError, UnicodeDecodeError, csv.Error) as error:
            after = f" (after {place})" if place else ""
            raise UserError(f"{filepath}: cannot be read{after}: {error}; fix the file") from error

    def lines(self, filepath: str) -> Iterator[tuple[int, str]]:
        with self.data_folder.open(
            filepath, "rt", compression="infer", encoding="utf-8-sig", newline="\n"
        ) as stream:
            yield from numbered_lines(stream)

    def read_text(self, filepath: str) -> Iterator[tuple[str, str]]:
        """Yields the same records as `data.source=text` reads."""
        gathered: list[str] = []
        begin = 1
        for number, text in self.lines(filepath):
            if self.record == "file":
                gathered.append(text)
            elif self.record == "line":
                if text.strip():
                    yield f"{filepath} line {number}", text.strip()
            elif text.strip():
                begin = begin if gathered else number
                gathered.append(text.strip())
            elif gathered:
                yield f"{filepath} line {begin}", " ".join(gathered)
                gathered = []
        if gathered and self.record == "file":
            yield filepath, "".join(gathered).replace("\r\n", "\n")
        elif gathered:
            yield f"{filepath} line {begin}", " ".join(gathered)

    def read_jsonl(self, filepath: str) -> Iterator[tuple[str, str]]:
        for number, text in self.lines(filepath):
            if not is_blank(text):
                try:
                    yield self.column(json_object(text), f"{filepath} line {number}")
                except ValueError as error:
                    raise RecordError(
                        f"{filepath} line {number}", f"{error}; write one record per line"
                    ) from error

    def read_csv(self, filepath: str) -> Iterator[tuple[str, str]]:
        csv.field_size_limit(2**31 - 1)
        texts = (text for _, text in self.lines(filepath))
        options: dict[str, Any] = (
            {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
            if self.kind == "tsv"
            else {"strict": True}
        )
        for number, record in enumerate(csv.DictReader(texts, **options), start=1):
            yield self.column(record, f"{filepath} record {number}")

    def read_parquet(self, filepath: str) -> Iterator[tuple[str, str]]:
        import pyarrow.parquet

        number = 0
        with (
            self.data_folder.open(filepath, "rb") as stream,
            pyarrow.parquet.ParquetFile(stream) as file,
        ):
            if self.text_key not in file.schema_arrow.names:
                self.column(dict.fromkeys(file.schema_arrow.names), filepath)
            for batch in file.iter_batches(columns=[self.text_key]):
                for record in batch.to_pylist():
                    number += 1
                    yield self.column(record, f"{filepath} record {number}")

    def read_source(self, filepath: str) -> Iterator[tuple[str, str]]:
        """Yields what `data.source` reads from files of other kinds."""
        source = open_source(self.kind, [str(Path(self.data_folder.path, filepath))], "train")
        folder = filepath[: len(filepath) - len(Path(filepath).name)]
        for index in range(len(source)):
            yield self.column(source[index], f"{folder}{source.where(index)}")

    def column(self, record: Record, place: str) -> tuple[str, str]:
        """Returns the place and the text. Raises UserError if the record has none."""
        if self.text_key not in record:
            raise RecordError(
                place,
                f'has no "{self.text_key}"; it has {", ".join(map(str, record))}; '
                "name the right --column",
            )
        text = record[self.text_key]
        if text is not None and not isinstance(text, str):
            raise RecordError(place, f'"{self.text_key}" is {text!r:.60}, not text; fix the record')
        return place, text or ""


# Readers that need no index of their files, which are read once and in order.
READERS: dict[str, Callable[[Documents, str], Iterator[tuple[str, str]]]] = {
    "text": Documents.read_text,
    "jsonl": Documents.read_jsonl,
    "csv": Documents.read_csv,
    "tsv": Documents.read_csv,
    "parquet": Documents.read_parquet,
}


class NotBlank(BaseFilter):
    """Drops documents that earlier filters, such as C4's, have left empty."""

    name = "not blank"

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        return bool(doc.text.strip()) or (False, "no line left")


class ArrayRecords(PipelineStep):
    """Writes documents as JSON objects {"text": ...} to the task's shards; with a tokenizer, also
    their ids to the task's token store."""

    name, type = "array_record", "writer"

    def __init__(self, work: Path, shards: int, tokenizer: str):
        super().__init__()
        self.work, self.shards, self.tokenizer = work, shards, tokenizer

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        counts: Record = {"documents": 0, "characters": 0, "clusters": {}}
        began = time.monotonic()
        shards = Shards(self.work / PARTS, rank, world_size, self.shards)
        tokens = TaskTokens(self.work, rank, self.tokenizer) if self.tokenizer else None
        try:
            for document in data if tokens is None else stored(data, tokens):
                counts["documents"] += 1
                counts["characters"] += len(document.text)
                if 0 <= (cluster := document.metadata.get("minhash_cluster_id", -1)) < SHOWN:
                    shown = document.text[: reports.LETTERS]
                    counts["clusters"][cluster] = {
                        "where": document.metadata["where"],
                        "text": shown,
                    }
                shards.write({"text": document.text})
        except BaseException:
            shards.abandon()
            if tokens is not None:
                tokens.abandon()
            raise
        counts["tokens"] = 0 if tokens is None else tokens.close()
        counts |= {"files": shards.close(), "seconds": time.monotonic() - began}
        write_json(self.work / TALLIES / LAST / f"{rank:05d}.json", counts)


class MarkKept(PipelineStep):
    """Also gives kept documents the number of their cluster, for the report.

    datatrove's filter only does so for tasks that drop a document, which it detects by a file. This
    creates that file for all tasks.
    """

    name, type = "mark kept", "dedup"

    def __init__(self, clusters: str):
        super().__init__()
        self.clusters = Path(clusters)

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        for path in self.clusters.glob("*.clusters"):
            path.with_suffix(".remove").touch()


class Report(PipelineStep):
    """Moves the shards to the output folder, writes the report and removes intermediate files."""

    name, type = "report", "writer"

    def __init__(self, output: Path, work: Path, settings: Record):
        super().__init__()
        self.output, self.work, self.settings = output, work, settings

    def run(
        self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1
    ) -> None:
        steps = ["blank", *self.settings["filters"], "c4_blank", *self.settings["dedup"]]
        report = reports.gather(self.work, self.settings, steps)
        report["shards"] = reports.place_shards(self.work, self.output)
        if self.settings["tokenizer"]:
            place_tokens(self.work, self.output, self.settings, report["shards"])
        write_json(self.output / reports.REPORT, report)
        for name in ("kept", "exact", "minhash", PARTS, FOLDER):
            shutil.rmtree(self.work / name, ignore_errors=True)


def stored(data: Iterable[Document], tokens: TaskTokens) -> Iterator[Document]:
    """Yields documents after storing their tokens."""
    for documents in batches(data, 256):
        tokens.add([document.text for document in documents])
        yield from documents


def batches(data: Iterable[Document], size: int) -> Iterator[list[Document]]:
    held: list[Document] = []
    for document in data:
        held.append(document)
        if len(held) == size:
            yield held
            held = []
    if held:
        yield held
