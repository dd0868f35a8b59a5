"""Runs the parts one after the other, each in its own process with a limit on its time, and keeps
what they said."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from fmjax.bench.device import rows
from fmjax.bench.device.job import Job
from fmjax.bench.device.rows import ERROR, SKIPPED, Row
from fmjax.bench.workloads import Result
from fmjax.config.json_files import write_atomically, write_json
from fmjax.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
RESULTS, TABLE, LOG = "device_check.json", "device_check.md", "device_check.log"
# What a rehearsal computes takes less time than compiling it well.
REHEARSED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
DESCRIBING = 20.0  # seconds that the first part may take, however few there are
STARTING = 3.0  # seconds without which no process is started
CHECKS = ("kernels", "parity")  # what decides the exit code
# The parts, in order, and what each is given of nine minutes; what one leaves goes to the next.
PARTS: tuple[tuple[str, str, float], ...] = (
    ("environment", "", 20),
    ("kernels", "errors", 70),
    ("kernels", "times", 40),
    ("parity", "", 55),
    ("training", "bert", 62),
    ("training", "gpt", 62),
    ("training", "t5", 62),
    ("training", "vit", 62),
    ("lengths", "auto", 50),
    ("lengths", "xla", 35),
    ("profile", "", 22),
)
NAMES = tuple(dict.fromkeys(part for part, *_ in PARTS))
# What may be asked for alone: a part, or one of its processes.
CHOICES = (*NAMES, *(f"{part}:{argument}" for part, argument, _ in PARTS if argument))
WIDTH = 46  # of a cell in the terminal


@dataclasses.dataclass
class Check:
    """A run of the check: what it was asked, and what is known so far."""

    out: Path
    minutes: float
    rehearse: bool
    only: Sequence[str] = ()  # the parts to run; none: all
    begun: float = dataclasses.field(default_factory=time.monotonic)
    rows: list[Row] = dataclasses.field(default_factory=list)
    ends: list[Result] = dataclasses.field(default_factory=list)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begun

    @property
    def left(self) -> float:
        return 60 * self.minutes - self.spent

    @property
    def parts(self) -> list[tuple[str, str, float]]:
        """The parts to run; the first always does."""
        wanted = {"environment", *(self.only or NAMES)}
        return [part for part in PARTS if wanted & {part[0], f"{part[0]}:{part[1]}"}]

    @property
    def holds(self) -> bool:
        """Whether every check that ran holds; in a rehearsal, whether nothing failed."""
        return rows.holds(self.rows, NAMES if self.rehearse else CHECKS)

    @property
    def device(self) -> Result:
        """The facts of the environment's rows: the device, and which peers are there."""
        found = {row.what: row.facts for row in self.rows if row.part == "environment"}
        return found.get("device", {}) | {"peer": found.get("peer", {})}

    def say(self, text: str) -> None:
        """Prints a line with the time since the start."""
        print(f"[{self.spent:4.0f} s] {text}", file=sys.stderr, flush=True)

    def add(self, row: Row) -> None:
        """Keeps a row, says it, and writes all."""
        self.rows = rows.merged(self.rows, row)
        against = f" ({row.against})" if row.against else ""
        self.say(f"{row.part}: {row.what}: {row.result}{against}: {row.status}")
        self.write()

    def write(self) -> None:
        """Writes everything that is known."""
        write_json(
            self.out / RESULTS,
            {
                "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": " ".join(sys.argv),
                "rehearse": self.rehearse,
                "minutes": self.minutes,
                "seconds": round(self.spent, 1),
                "holds": self.holds,
                "parts": self.ends,
                "rows": [dataclasses.asdict(row) for row in self.rows],
            },
        )
        write_atomically(self.out / TABLE, rows.table(self.rows) + "\n")


def budget(left: float, shares: Sequence[float], least: float = 0.0) -> float:
    """Returns the seconds of the first of several parts: its share of what is left, or more."""
    return min(left, max(least, left * shares[0] / sum(shares)))


def slowest(found: Sequence[Row]) -> str:
    """Returns the training row that is farthest from its aim or, where no peak is known, takes
    longest; "" if there is none."""
    trained = [row for row in found if row.part == "training" and "step_seconds" in row.facts]
    if not trained:
        return ""

    def distance(row: Row) -> tuple[float, float]:
        return row.facts.get("of_aim") or 0.0, -row.facts["step_seconds"]

    return str(min(trained, key=distance).facts["name"])


def check(out: Path, minutes: float, rehearse: bool, only: Sequence[str] = ()) -> bool:
    """Runs the parts, prints the table and returns whether every check that ran holds.

    Raises UserError if there is no device to check, or the folder has the results of another check.
    """
    prepare(out)
    state = Check(out.resolve(), minutes, rehearse, only)
    with tempfile.TemporaryDirectory(prefix="device_check_") as work:
        for index, (part, argument, _) in enumerate(state.parts):
            least = DESCRIBING if part == "environment" else 0.0
            seconds = budget(state.left, [share for *_, share in state.parts[index:]], least)
            asked = Job(
                part, argument, rehearse, seconds, Path(work), state.out, state.device,
                slowest(state.rows) if part == "profile" else "", platforms(rehearse),
            )  # fmt: skip
            run_part(state, asked)
            if part == "environment":
                check_device(state)
    state.write()
    print(rows.table(state.rows, WIDTH))
    held = state.holds
    note = "; a rehearsal on the CPU with tiny sizes: its times mean nothing" if rehearse else ""
    print(
        f"\n{rows.counts(state.rows)} in {state.spent:.0f} s: "
        f"{'every check that ran holds' if held else 'a check FAILED'}{note}\n"
        f"{state.out / RESULTS}"
    )
    return held


def prepare(out: Path) -> None:
    """Makes the folder of results. Raises UserError if it cannot, or if it has some already."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / LOG).touch()
    except OSError as error:
        raise UserError(
            f"--out={out}: cannot be written to ({error.strerror}); name another folder"
        ) from None
    if (out / RESULTS).exists():
        raise UserError(f"--out={out}: has the results of another check; name another folder")


def check_device(state: Check) -> None:
    """Raises UserError if JAX finds no device of the kind that is to be checked."""
    found = state.device.get("platform")
    if not found or (found == "cpu" and not state.rehearse):
        (state.out / RESULTS).unlink(missing_ok=True)  # the folder can be named again
    if not found:
        said = next((row.result for row in state.rows if row.status in (ERROR, SKIPPED)), "")
        raise UserError(
            f"JAX cannot be used here ({said}); see {state.out / LOG}, and install what is missing"
        )
    if found == "cpu" and not state.rehearse:
        raise UserError(
            "JAX finds no GPU or TPU here; add --rehearse to try the check on the CPU, or install "
            "JAX for the device: pip install 'jax[cuda13]' or 'jax[tpu]'"
        )


def run_part(state: Check, job: Job) -> None:
    """Runs one part and keeps its rows; ends it when its time is over."""
    name = job.name
    if job.seconds < STARTING:
        state.add(Row(name, "no time was left", status=SKIPPED, part=job.part))
        return
    state.say(f"{name}: {job.seconds:.0f} s at most")
    begun, before = time.monotonic(), len(state.rows)
    with open(state.out / LOG, "a", encoding="utf-8") as log:
        log.write(f"== {name}\n")
        log.flush()
        process = start(job, log)
        try:
            ended = "too late"
            for line in until(process.stdout, begun + job.seconds):
                if not (said := json.loads(line)):
                    ended = "in time"
                    break
                state.add(dataclasses.replace(Row(**said), part=job.part))
            else:
                ended = wait(process, begun + job.seconds)
        finally:
            kill(process)
    seconds = time.monotonic() - begun
    state.ends.append({"part": name, "seconds": round(seconds, 1), "ended": ended})
    if ended == "in time":
        return
    what = f"the rest of {name}" if len(state.rows) > before else name
    late = ended == "too late"
    said = f"not finished in {job.seconds:.0f} s" if late else f"its process {ended}; see {LOG}"
    state.add(Row(what, said, status=SKIPPED if late else ERROR, part=job.part))


def start(job: Job, log: IO[str]) -> subprocess.Popen[str]:
    """Starts the process of a part, in a group of its own, so that all it starts ends with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "fmjax.bench.device.child", job.text()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        encoding="utf-8",
        env=environment(job),
        start_new_session=True,
    )


def platforms(rehearse: bool) -> str:
    """Returns JAX_PLATFORMS of what computes on the device."""
    return "cpu" if rehearse else os.environ.get("JAX_PLATFORMS", "")


def environment(job: Job) -> Mapping[str, str]:
    """Returns the environment of a part. JAX takes memory as it needs it, since a peer is on the
    same device, and keeps what it compiles, since the profile runs a step again. The process that
    starts those of training leaves the device to them: a TPU serves one process."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {
        "PYTHONPATH": paths,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": str(job.work / "compiled"),
        "JAX_PLATFORMS": "cpu" if job.part == "training" else job.platforms,
        "HF_HUB_OFFLINE": "1",
    }
    return os.environ | own | (REHEARSED if job.rehearse else {})


def until(stream: IO[str] | None, end: float) -> Iterator[str]:
    """Yields the lines of a stream until it ends or the time is over."""
    assert stream is not None
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    threading.Thread(target=read, daemon=True).start()
    with contextlib.suppress(queue.Empty):
        while line := lines.get(timeout=max(0.0, end - time.monotonic())):
            yield line


def wait(process: subprocess.Popen[str], end: float) -> str:
    """Returns how a process ended that has not said that it is done."""
    try:
        code = process.wait(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return "too late"
    return f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a process with all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
