"""What a part's process is told."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from fmjax.bench.workloads import Result
from fmjax.hardware import Chip, chip_of

SPARE = 0.93  # of its time, after which a part begins nothing new


@dataclasses.dataclass(frozen=True)
class Job:
    """One part, its share of the time and the machine. Paths are absolute."""

    part: str
    argument: str  # which of its rows, for a part that has several processes
    rehearse: bool
    seconds: float  # after which the process is ended
    work: Path  # for files that are not kept
    out: Path  # for files that are
    device: Result = dataclasses.field(default_factory=dict)  # from the part `environment`
    slowest: str = ""  # the row to profile
    platforms: str = ""  # JAX_PLATFORMS of what computes on the device
    begun: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        """The part and its argument."""
        return f"{self.part} {self.argument}".strip()

    @property
    def left(self) -> float:
        """The seconds left."""
        return self.begun + SPARE * self.seconds - time.monotonic()

    @property
    def platform(self) -> str:
        """cpu, gpu or tpu."""
        return "cpu" if self.rehearse else str(self.device.get("platform", "gpu"))

    @property
    def sizes(self) -> str:
        """The device whose sizes and type of numbers a workload takes: cpu or gpu."""
        return "cpu" if self.platform == "cpu" else "gpu"

    @property
    def chip(self) -> Chip | None:
        """The chip's specifications, None if it is not known."""
        return chip_of(str(self.device.get("kind", "")))

    def text(self) -> str:
        """Returns the job as one word of a command."""
        kept = dataclasses.asdict(self) | {"work": str(self.work), "out": str(self.out)}
        return json.dumps({name: value for name, value in kept.items() if name != "begun"})


def read(text: str) -> Job:
    """Returns the job that `Job.text` wrote; its time begins now."""
    values = json.loads(text)
    return Job(**values | {"work": Path(values["work"]), "out": Path(values["out"])})
