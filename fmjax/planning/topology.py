"""Hardware by name: slices of TPUs, GPUs, or this machine's CPU."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Sequence

from jax.experimental import topologies

from fmjax.config.numbers import is_positive
from fmjax.contracts import PyTree
from fmjax.errors import UserError, nearest, one_line
from fmjax.hardware import CHIPS, Chip

# Environment variables of libtpu, set if there is no TPU; without the last one, two processes could
# not compile at once.
DEVICELESS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one kind: a TPU slice of some shape, a number of GPUs, or this machine's CPU."""

    written: str
    chip: Chip | None  # None: a CPU, whose specifications are unknown
    count: int
    tpu: bool
    slices: int = 1  # of TPUs, each of this shape; `count` is the number of chips of all

    def devices(self) -> Sequence[PyTree]:
        """Returns the devices, which are not attached. Raises UserError if libtpu is not installed
        or does not know the slice.
        """
        if not self.tpu:
            platform = "gpu" if self.chip else "cpu"
            return [Absent(index, platform) for index in range(self.count)]
        os.environ.update({name: os.environ.get(name, value) for name, value in DEVICELESS.items()})
        kind, shape, *_ = self.written.split(":")
        chips = self.count // self.slices
        os.environ.setdefault(
            "TPU_ACCELERATOR_TYPE",
            f"v5litepod-{chips}" if kind == "v5e" else f"{kind}-{2 * chips}",
        )
        several = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            return topologies.get_topology_desc(
                platform="tpu", topology_name=f"{kind}:{shape}", **several
            ).devices
        except Exception as error:
            if "libtpu" in str(error) or isinstance(error, ImportError | NotImplementedError):
                raise UserError(
                    f"--topology={self.written}: needs libtpu to compile; pip install libtpu"
                ) from None
            reason = one_line(error, 200)
            raise UserError(
                f"--topology={self.written}: libtpu has no such slice ({reason}); name another"
            ) from None


@dataclasses.dataclass(frozen=True)
class Absent:
    """A placeholder for a device that is not attached, for the shape of a mesh."""

    id: int
    platform: str
    device_kind: str = "absent"
    process_index: int = 0
    slice_index: int = 0


def read_topology(text: str) -> Topology:
    """Parses "v5e:4x4", "v5e:4x4:2" (two slices), "gpu:h200", "gpu:h200:8", "cpu" or "cpu:8".
    Raises UserError for anything else.
    """
    kind, *rest = text.split(":")
    gpus = [name for name in CHIPS if not name.startswith("v")]
    tpus = [name for name in CHIPS if name.startswith("v")]
    form = "choose from v5e:4x4, v5p:4x4x8:2, gpu:h200, gpu:h200:8, cpu or cpu:8"
    if (
        kind == "gpu"
        and rest
        and rest[0] in gpus
        and len(rest) <= 2
        and all(map(is_positive, rest[1:]))
    ):
        return Topology(text, CHIPS[rest[0]], int(rest[1]) if rest[1:] else 1, False)
    if kind == "cpu" and len(rest) <= 1 and all(map(is_positive, rest)):
        return Topology(text, None, int(rest[0]) if rest else 1, False)
    shaped = rest and re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*){1,2}", rest[0])
    if kind in tpus and shaped and len(rest) <= 2 and all(map(is_positive, rest[1:])):
        slices = int(rest[1]) if rest[1:] else 1
        chips = math.prod(map(int, rest[0].split("x")))
        return Topology(text, CHIPS[kind], slices * chips, True, slices)
    known = gpus if kind == "gpu" else [*tpus, "gpu", "cpu"]
    asked = rest[0] if kind == "gpu" and rest else kind
    hint = "" if asked in known else nearest(asked, known)
    raise UserError(f'--topology="{text}" is not known{hint}; {form}')
