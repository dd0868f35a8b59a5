"""Turns raw text into a training corpus: filtered and deduplicated, in shards of ArrayRecord, with
their tokens in a store.

The engine is datatrove (Penedo et al. 2024), which produced FineWeb: its quality filters, exact and
MinHash deduplication, and its executors, local, Slurm or Ray. The stages follow its
examples/fineweb.py: read and filter; hash, find exact duplicates; MinHash signatures, buckets,
clusters; write; report. Each stage is split into tasks. A finished task leaves a marker file and is
not repeated.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils import logging

from fmjax.config.json_files import parse_json
from fmjax.data.sources.kinds import AUTO, find_kind
from fmjax.data.sources.lines import RECORDS
from fmjax.data.sources.open import downloaded, kind_of_files, named_files
from fmjax.data.tokenizers.tokenizer import load_tokenizer
from fmjax.errors import UserError, in_range, one_of
from fmjax.prepare import report as reports
from fmjax.prepare.guards import only_one, stoppable
from fmjax.prepare.report import TALLIES
from fmjax.prepare.steps import (
    ArrayRecords,
    Documents,
    Dropped,
    MarkKept,
    NotBlank,
    Report,
    Words,
)

FILTERS = {
    "gopher_repetition": GopherRepetitionFilter,
    "gopher_quality": GopherQualityFilter,
    "fineweb_quality": FineWebQualityFilter,
    "c4_quality": C4QualityFilter,
    "c4_paragraph": C4ParagraphFilter,
}
# Thresholds of the Gopher paper that only apply to English.
ENGLISH = {"gopher_quality": ("min_stop_words", "min_avg_word_length", "max_avg_word_length")}
DEDUPS = {"exact": (), "minhash": ("n_grams", "num_buckets", "hashes_per_bucket", "seed")}
EXECUTORS = {
    "local": LocalPipelineExecutor,
    "ray": RayPipelineExecutor,
    "slurm": SlurmPipelineExecutor,
}
MOST = 1000  # default number of shards
Settings: TypeAlias = dict[str, Any]  # JSON values, or arguments of datatrove


class Stage(NamedTuple):
    """A pipeline of datatrove and the number of tasks that it is split into."""

    name: str
    steps: list[PipelineStep]
    tasks: int


def content(document: Document) -> str:
    """Returns the key that duplicates share: the text without differences in white space."""
    return " ".join(document.text.split())


def options_of(kind: type) -> tuple[str, ...]:
    """Returns the options of a datatrove filter."""
    return tuple(
        name
        for name in inspect.signature(kind).parameters
        if name not in ("exclusion_writer", "language")
    )


def check_steps(filters: str, dedup: str) -> tuple[Settings, Settings]:
    """Returns the filters and kinds of deduplication that the flags name, with their options.

    Raises UserError.
    """
    known = {name: options_of(kind) for name, kind in FILTERS.items()}
    return reports.parse_steps("--filters", filters, known), reports.parse_steps(
        "--dedup", dedup, DEDUPS
    )


def stages(output: Path, work: Path, root: str, settings: Settings) -> list[Stage]:
    """Returns the stages in order; each reads the output of earlier ones."""
    tasks, dedup = settings["tasks"], settings["dedup"]
    reader = Documents(
        settings["kind"],
        root,
        str(work / "files.txt"),
        settings["column"],
        settings["record"],
        work,
    )
    filters = [
        make_filter(name, options, settings["language"], work)
        for name, options in settings["filters"].items()
    ]
    filters.append(NotBlank(Dropped(work, "c4_blank")))
    kept = str(work / "kept")
    found = [Stage("filter", [reader, *filters, JsonlWriter(kept)], tasks)]
    leave_out: list[PipelineStep] = []
    if "exact" in dedup:
        more, leave_out = exact_stages(work, kept, tasks)
        found += more
    if "minhash" in dedup:
        more, without = minhash_stages(
            work, [JsonlReader(kept), *leave_out], dedup["minhash"], tasks
        )
        found, leave_out = [*found, *more], [*leave_out, without]
    tokenizer = settings["tokenizer"].get("path", "")
    found.append(
        Stage(
            "write",
            [JsonlReader(kept), *leave_out, ArrayRecords(work, settings["shards"], tokenizer)],
            tasks,
        )
    )
    return [*found, Stage("report", [Report(output, work, settings)], 1)]


def exact_stages(work: Path, kept: str, tasks: int) -> tuple[list[Stage], list[PipelineStep]]:
    """Returns the stages that find exact duplicates, and the step that removes them."""
    exact, config = work / "exact", ExactDedupConfig(content_getter=content)
    hashes, duplicates = str(exact / "hashes"), str(exact / "found")
    stages = [
        Stage("exact-hashes", [JsonlReader(kept), ExactDedupSignature(hashes, config)], tasks),
        Stage("exact-find", [ExactFindDedups(hashes, duplicates, config)], 1),
    ]
    return stages, [ExactDedupFilter(duplicates, config, Dropped(work, "exact"))]


def minhash_stages(
    work: Path, read: list[PipelineStep], options: Settings, tasks: int
) -> tuple[list[Stage], PipelineStep]:
    """Returns the stages that find near-duplicates in what `read` reads, and the step that leaves
    them out."""
    minhash, config = work / "minhash", MinhashConfig(**options)
    hashes, pairs, clusters = (str(minhash / name) for name in ("hashes", "pairs", "clusters"))
    sign = MinhashDedupSignature(hashes, config=config, language=Words())
    buckets = MinhashDedupBuckets(hashes, pairs, config=config)
    cluster = MinhashDedupCluster(pairs, clusters, config=config, save_cluster_id=True)
    stages = [
        Stage("minhash-signatures", [*read, sign], tasks),
        Stage("minhash-buckets", [buckets], config.num_buckets),
        Stage("minhash-clusters", [cluster, MarkKept(clusters)], 1),
    ]
    return stages, MinhashDedupFilter(clusters, Dropped(work, "minhash"), load_cluster_ids=True)


def make_filter(name: str, options: Settings, language: str, work: Path) -> PipelineStep:
    """Returns a datatrove filter that reports what it drops."""
    given = dict(options)
    if name != "c4_paragraph":
        given["language"] = Words()
    if language != "en":
        given = dict.fromkeys(ENGLISH.get(name, ())) | given
    return FILTERS[name](exclusion_writer=Dropped(work, name), **given)


def executors(
    found: list[Stage], work: Path, kind: str, workers: int, slurm: Settings
) -> list[PipelineExecutor]:
    """Returns one executor per stage; those of Slurm wait for each other."""
    made: list[PipelineExecutor] = []
    for stage in found:
        options: Settings = {
            "pipeline": stage.steps,
            "tasks": stage.tasks,
            "workers": min(workers, stage.tasks),
        }
        options["logging_dir"] = str(work / "logs" / stage.name)
        if kind == "slurm":
            binaries, packages = Path(sys.executable).parent, Path(__file__).parents[2]
            environment = f"export PATH={binaries}:$PATH PYTHONPATH={packages}:$PYTHONPATH"
            logs = str(work / "logs" / "slurm" / stage.name)
            options |= {
                "job_name": f"prepare-{stage.name}",
                "slurm_logs_folder": logs,
                "env_command": environment,
            } | slurm
            options["depends"] = made[-1] if made else None
        made.append(EXECUTORS[kind](**options))
    return made


def check_executor(kind: str) -> None:
    """Raises UserError if the command or package that an executor needs is missing."""
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise UserError(
            "--executor=slurm: sbatch was not found; run this on a login node of the cluster"
        )
    if kind == "ray" and importlib.util.find_spec("ray") is None:
        raise UserError("--executor=ray: ray is not installed; pip install 'ray[default]'")


def slurm_options(text: str) -> Settings:
    """Returns the options of Slurm's executor.

    Raises UserError for an unknown one, or if partition or time is missing.
    """
    try:
        options = parse_json(text)
    except ValueError as error:
        raise UserError(f"--slurm={text}: is not JSON ({error}); correct it") from error
    known = [
        name
        for name in inspect.signature(SlurmPipelineExecutor).parameters
        if name not in ("pipeline", "tasks")
    ]
    options = reports.parse_steps("--slurm", json.dumps({"slurm": options}), {"slurm": known})[
        "slurm"
    ]
    for name in ("partition", "time"):
        if name not in options:
            raise UserError(
                f"--executor=slurm: needs the {name}; set "
                f'--slurm=\'{{"partition": "cpu", "time": "10:00:00"}}\''
            )
    return options


def find_input(text: str, source: str, executor: str) -> tuple[str, list[str], str, Settings]:
    """Returns the folder that contains all files, their names below it, their kind, and their sizes
    and times of modification.

    Raises UserError if there are none, or their kind is not supported.
    """
    chosen = None if source == AUTO else find_kind(source)
    if chosen is not None and chosen.reads != "files":
        raise UserError(f"--source={source}: reads no files of texts; name the files' kind")
    if "://" in text and executor != "local":
        raise UserError(
            f"--input={text}: remote files are fetched into the cache of this machine, which "
            f"--executor={executor} may not reach; copy them to a shared file system"
        )
    paths = [path.absolute() for path in named_files(downloaded(text, chosen), chosen)]
    kind = (chosen or kind_of_files(paths)).name
    root = os.path.commonpath([path.parent for path in paths])
    names = [os.path.relpath(path, root) for path in paths]
    states = {
        name: [path.stat().st_size, int(path.stat().st_mtime)]
        for name, path in zip(names, paths, strict=True)
    }
    return root, names, kind, states


def settle(args: Namespace) -> tuple[str, Settings]:
    """Returns the input folder, and all settings that affect the result.

    Raises UserError.
    """
    root, names, kind, states = find_input(args.input, args.source, args.executor)
    in_range("--shards", args.shards, least=0, hint="0 means one per input file")
    in_range("--workers", args.workers, least=1)
    one_of("--record", args.record, RECORDS)
    shards = args.shards or min(len(names), MOST)
    filters, dedup = check_steps(args.filters, args.dedup)
    tokenizer = (
        {"path": str(args.tokenizer), "sha256": load_tokenizer(args.tokenizer).sha256}
        if args.tokenizer
        else {}
    )
    settings: Settings = {
        "kind": kind,
        "column": args.column,
        "record": args.record,
        "language": args.language,
    }
    settings |= {"filters": filters, "dedup": dedup, "tokenizer": tokenizer, "shards": shards}
    return root, settings | {
        "tasks": min(shards, len(names)),
        "datatrove": version("datatrove"),
        "files": states,
    }


def prepare(args: Namespace, say: Callable[[str], None]) -> Settings | None:
    """Prepares a corpus, or continues an interrupted preparation. Returns the report, or None if
    Slurm jobs will write it.

    Raises UserError for mistakes in the flags, the input or the output folder.
    """
    check_executor(args.executor)
    root, settings = settle(args)
    slurm = slurm_options(args.slurm) if args.executor == "slurm" else {}
    output, work = args.output.absolute(), args.output.absolute() / "work"
    reports.claim(output, settings)
    if not (output / reports.REPORT).is_file():
        work.mkdir(exist_ok=True)
        (work / "files.txt").write_text(
            "".join(f"{name}\n" for name in settings["files"]), encoding="utf-8"
        )
        with only_one(output, work), stoppable():
            run_stages(stages(output, work, root, settings), work, args, slurm, say)
    if not (output / reports.REPORT).is_file():
        return None
    report: Settings = json.loads((output / reports.REPORT).read_text(encoding="utf-8"))
    return report


def run_stages(
    found: list[Stage], work: Path, args: Namespace, slurm: Settings, say: Callable[[str], None]
) -> None:
    """Runs the stages one after another, or submits them.

    Raises UserError if no document is left.
    """
    log = work / "logs" / "console.log"
    with console(log):
        made = executors(found, work, args.executor, args.workers, slurm)
    if args.executor == "slurm":
        with console(log):
            made[-1].run()
        return
    for number, (stage, executor) in enumerate(zip(found, made, strict=True), start=1):
        began, left = time.monotonic(), len(executor.get_incomplete_ranks())
        if left:
            with console(log):
                executor.run()
        took = (
            f"{left} of {stage.tasks} tasks, {time.monotonic() - began:.1f} s"
            if left
            else "done before"
        )
        say(f"{number}/{len(found)} {stage.name}: {took}")
        if number == 1 and not list((work / "kept").glob("*.jsonl.gz")):
            raise UserError(
                f"--filters={args.filters}: they drop every document; {work / TALLIES} says why. "
                "Choose others"
            )


@contextlib.contextmanager
def console(path: Path) -> Iterator[None]:
    """Redirects the stderr of datatrove and its workers into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with path.open("a", encoding="utf-8") as stream, contextlib.redirect_stderr(stream):
            os.dup2(stream.fileno(), 2)
            logging.setup_default_logger()
            yield
    finally:
        logging.logger.remove()  # otherwise it would write to the closed file
        os.dup2(before, 2)
        os.close(before)
