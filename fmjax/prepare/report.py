"""The output of preparing a corpus: the shards, their settings, and a report of what was dropped
and why.

Every task writes its counts to a small JSON file; `gather` adds them up. Nothing here needs
datatrove.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from array_record.python.array_record_module import ArrayRecordWriter

from fmjax.config import json_files
from fmjax.config.json_files import parse_json
from fmjax.contracts import Config, Value
from fmjax.errors import UserError, nearest

REPORT, SETTINGS, TALLIES, PARTS = "report.json", "settings.json", "tallies", "parts"
FIRST, LAST = "documents", "written"  # names of the tallies of read and of written documents
EXAMPLES = 3  # of each reason, in the report
LETTERS = 200  # of an example
Counts: TypeAlias = Config  # JSON values: numbers, names and lists of them


class Shards:
    """Writes documents in turn to the shards of a task: numbers `rank`, `rank + tasks`, ... below
    `shards`.

    A shard gets its final name when it is complete; a killed task writes its shards again.
    """

    def __init__(self, folder: Path, rank: int, tasks: int, shards: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.names = [
            folder / f"{number:05d}.array_record" for number in range(rank, shards, tasks)
        ]
        self.parts = [name.with_name(f".{name.name}.{os.getpid()}.part") for name in self.names]
        # Groups of one record, so that each can be read without its neighbors.
        self.writers = [ArrayRecordWriter(str(part), "group_size:1") for part in self.parts]
        self.counts = [0] * len(self.names)
        self.written = 0

    def write(self, record: Counts) -> None:
        place = self.written % len(self.names)
        line = json.dumps(json_files.without_nan(record), ensure_ascii=False, allow_nan=False)
        self.writers[place].write(line.encode())
        self.counts[place] += 1
        self.written += 1

    def close(self) -> dict[str, int]:
        """Gives the shards their final names. Returns the number of records in each."""
        for writer, part, name in zip(self.writers, self.parts, self.names, strict=True):
            writer.close()
            part.replace(name)
        return {name.name: count for name, count in zip(self.names, self.counts, strict=True)}

    def abandon(self) -> None:
        """Removes incomplete shards."""
        for writer, part in zip(self.writers, self.parts, strict=True):
            writer.close()
            part.unlink(missing_ok=True)


def write_json(path: Path, values: Counts) -> None:
    """Writes a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    json_files.write_json(path, values)


class Tally:
    """Counts what a task drops at one step: documents and characters by reason, with a few examples
    of each."""

    def __init__(self, folder: Path, step: str):
        self.path, self.step = folder / TALLIES, step
        self.begin()

    def begin(self) -> None:
        self.reasons: dict[str, Counts] = {}

    def note(self, reason: str, text: str, where: str, cluster: int = -1) -> None:
        """Counts a document that is dropped."""
        row = self.reasons.setdefault(reason, {"documents": 0, "characters": 0, "examples": []})
        row["documents"] += 1
        row["characters"] += len(text)
        if len(row["examples"]) < EXAMPLES:
            row["examples"].append({"where": where, "text": text[:LETTERS], "cluster": cluster})

    def end(self, rank: int) -> None:
        write_json(self.path / self.step / f"{rank:05d}.json", self.reasons)


def parse_steps(flag: str, text: str, known: Mapping[str, Sequence[str]]) -> dict[str, Counts]:
    """Returns the steps that a flag names, in order, with their options: "a,b", a JSON object {"a":
    {"option": 1}}, or "none".

    `known` are the options of each step. Raises UserError for unknown ones.
    """
    steps: dict[str, Counts] = {}
    if text.lstrip().startswith("{"):
        try:
            steps = parse_json(text)
        except ValueError as error:
            raise UserError(
                f'{flag}={text}: is not JSON ({error}); write a,b or {{"a": {{"option": 1}}}}'
            ) from error
    elif text.strip() not in ("", "none"):
        steps = {name.strip(): {} for name in text.split(",")}
    for name, options in steps.items():
        if name not in known:
            raise UserError(
                f'{flag}: "{name}" is not known{nearest(name, known)}; '
                f"choose from {', '.join(known)}, or none"
            )
        if not isinstance(options, dict):
            raise UserError(
                f'{flag}: the options of "{name}" are {options!r}, not an object; '
                f'write {{"{name}": {{}}}}'
            )
        for option in options:
            if option not in known[name]:
                hint = nearest(option, known[name])
                raise UserError(
                    f'{flag}: {name} has no "{option}"{hint}; '
                    f"it has {', '.join(known[name]) or 'no options'}"
                )
    return steps


def claim(output: Path, settings: Counts) -> None:
    """Writes the settings into the output folder.

    Raises UserError if it has different settings or other content.
    """
    path = output / SETTINGS
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: is a file, not a folder; name a new folder")
    if not path.is_file():
        if output.is_dir() and any(output.iterdir()):
            raise UserError(
                f"--output={output}: is not empty and was not written by this command; "
                "name a new folder"
            )
        write_json(path, settings)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); name a new --output") from error
    differing = [
        name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)
    ]
    if differing:
        changes = "; ".join(
            f"{name}: {difference(before.get(name), settings.get(name))}" for name in differing
        )
        raise UserError(
            f"--output={output}: was started with other settings or input ({changes}); "
            "name a new --output"
        )


def difference(before: Value, now: Value) -> str:
    """Describes the difference of two values in a few words."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        parts = [
            f"{name} {json.dumps(before.get(name))} -> {json.dumps(now.get(name))}"
            for name in names[:3]
        ]
        return ", ".join(parts) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{json.dumps(before)} -> {json.dumps(now)}"


def read_tallies(folder: Path) -> list[Counts]:
    """Returns the output of a step's tasks, in their order."""
    return [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("[0-9]*.json"))
    ]


def gather(work: Path, settings: Counts, steps: Iterable[str]) -> Counts:
    """Returns the report, added up from the tallies of all tasks, in the order of the steps.

    Raises RuntimeError if documents are neither dropped nor written, which means that a task lost
    some.
    """
    first, last = (read_tallies(work / TALLIES / name) for name in (FIRST, LAST))
    twins = {int(number): twin for tally in last for number, twin in tally["clusters"].items()}
    dropped = [
        row for step in steps for row in added_up(step, read_tallies(work / TALLIES / step), twins)
    ]
    read = {unit: sum(tally[unit] for tally in first) for unit in ("documents", "characters")}
    kept = {unit: sum(tally[unit] for tally in last) for unit in ("documents", "characters")}
    lost = read["documents"] - kept["documents"] - sum(row["documents"] for row in dropped)
    if lost:
        raise RuntimeError(
            f"{lost} documents were neither written nor dropped; see the logs in {work / 'logs'}"
        )
    report: Counts = {"settings": settings, "read": read, "written": kept, "dropped": dropped}
    if settings.get("tokenizer"):
        report["tokens"] = sum(tally["tokens"] for tally in last)
    report["task_seconds"] = round(sum(tally["seconds"] for tally in first + last), 1)
    return report


def added_up(step: str, tallies: Iterable[Counts], twins: Mapping[int, Counts]) -> list[Counts]:
    """Returns the reasons of a step, most frequent first, with examples; for near-duplicates, also
    the similar document."""
    rows: dict[str, Counts] = {}
    for tally in tallies:
        for reason, part in tally.items():
            row = rows.setdefault(
                reason,
                {"step": step, "reason": reason, "documents": 0, "characters": 0, "examples": []},
            )
            row["documents"] += part["documents"]
            row["characters"] += part["characters"]
            for example in part["examples"][: EXAMPLES - len(row["examples"])]:
                shown = {"where": example["where"], "text": example["text"]}
                twin = twins.get(example["cluster"])
                row["examples"].append(shown | ({"like": twin} if twin else {}))
    return sorted(rows.values(), key=lambda row: (-row["documents"], row["reason"]))


def place_shards(work: Path, output: Path) -> list[Counts]:
    """Moves non-empty shards to the output folder and renumbers them. Returns their names, records
    and bytes, and their numbers before.

    It can be repeated after an interruption. Empty shards, which readers reject, are left out.
    """
    counts = {
        name: count
        for tally in read_tallies(work / TALLIES / LAST)
        for name, count in tally["files"].items()
    }
    full = [name for name in sorted(counts) if counts[name]]
    placed = []
    for number, name in enumerate(full):
        target = output / f"{output.name}.array_record-{number:05d}-of-{len(full):05d}"
        if (work / PARTS / name).exists():
            (work / PARTS / name).replace(target)
        placed.append(
            {
                "file": target.name,
                "records": counts[name],
                "bytes": target.stat().st_size,
                "number": int(Path(name).stem),
            }
        )
    return placed


def table(report: Counts) -> str:
    """Returns the report as lines of text: what was read, what was dropped at each step with an
    example, what was written."""
    read, written = report["read"], report["written"]
    width = max([7, *(len(f"{row['step']}: {row['reason']}") for row in report["dropped"])])
    lines = [f"{'':<{width}} {'documents':>13} {'characters':>17}", line("read", read, width)]
    for row in report["dropped"]:
        lines.append(line(f"{row['step']}: {row['reason']}", row, width, sign="-"))
        if row["examples"] and row["examples"][0]["text"].strip():
            example = row["examples"][0]
            like = f", like {example['like']['where']}" if "like" in example else ""
            lines.append(f"  {example['where']}{like}: {' '.join(example['text'].split())[:90]}")
    share = written["documents"] / read["documents"] if read["documents"] else 0.0
    lines.append(line("written", written, width) + f"  {share:.1%} of the documents")
    if "tokens" in report:
        lines.append(f"{report['tokens']:,} tokens of {report['settings']['tokenizer']['path']}")
    shards = report["shards"]
    size = sum(shard["bytes"] for shard in shards) / 1e6
    lines.append(f"{len(shards)} shard{'s' * (len(shards) > 1)} of ArrayRecord, {size:,.1f} MB")
    return "\n".join(lines)


def line(name: str, counts: Counts, width: int, sign: str = "") -> str:
    documents, characters = (f"{sign}{counts[unit]:,}" for unit in ("documents", "characters"))
    return f"{name:<{width}} {documents:>13} {characters:>17}"
