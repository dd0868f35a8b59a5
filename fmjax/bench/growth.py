"""Growth of a training step's time and memory with batch, length, width and depth, each over a
factor of 8, and with devices.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from fmjax.bench import timing
from fmjax.bench.material import prepare
from fmjax.bench.measure import Options, machine
from fmjax.bench.table import markdown
from fmjax.bench.workloads import WORKLOADS, Facts, Result, Size
from fmjax.config.json_files import write_atomically

FACTORS = (1, 2, 4, 8)
BASE = {"batch": 4, "length": 64, "width": 64, "depth": 2}  # and 1 device
HEAD_WIDTH = 32
COLORS = ("#0b62c4", "#b4530a", "#1a7f37", "#8250df", "#bf3989")
WIDTH, HEIGHT, LEFT, BOTTOM = 420, 300, 60, 40


def size(axis: str, factor: int, tiny: bool = False) -> Size:
    """Returns the sizes of BERT in which one axis is multiplied."""
    chosen = {
        name: number * (factor if name == axis else 1) // (2 if tiny else 1)
        for name, number in BASE.items()
    }
    width = max(chosen["width"], HEAD_WIDTH)
    model = {
        "width": width,
        "layers": chosen["depth"],
        "attention_heads": width // HEAD_WIDTH,
        "mlp_width": 4 * width,
    }
    return Size({**model, "vocab_size": 8192}, chosen["batch"], chosen["length"])


def measure(options: Options) -> Result:
    """Returns, for each axis and factor, the median seconds of a step and its memory according to
    the compiler.
    """
    found: Result = {}
    one = {
        "factor": 1,
        **point(size("batch", 1, options.tiny), options),
    }  # the starting point of all axes
    for axis in BASE:
        more = FACTORS[1 : 2 if options.tiny else None]
        found[axis] = [
            one,
            *(
                {"factor": factor, **point(size(axis, factor, options.tiny), options)}
                for factor in more
            ),
        ]
    count = options.described["count"]
    found |= (
        {"devices": [scaled(number, options) for number in FACTORS if number <= count]}
        if count > 1
        else {}
    )
    exponents = {axis: bends(points) for axis, points in found.items()}
    return {"base": BASE, "axes": found, "bends": exponents, "machine": machine(options)}


def scaled(number: int, options: Options) -> Result:
    """Returns the cost of a step on that many devices, each with the rows of BASE; ideally it takes
    as long as on one device.
    """
    chosen = size("batch", number, options.tiny)
    return {"factor": number, **point(chosen, options, number)}


def point(chosen: Size, options: Options, devices: int = 1) -> Result:
    """Returns the time and memory of a training step of these sizes."""
    folder = options.workdir / "jobs" / "growth"
    folder.mkdir(parents=True, exist_ok=True)
    job = prepare(folder, WORKLOADS["bert_mlm"], chosen, options.device, devices=devices)
    with timing.ours(folder, options.threads) as side:
        side.ask("open", folder=str(folder), phase="timing")
        runs = timing.in_turn([side], job, options.rounds, options.seconds)["fmjax"]
        memory = side.ask("memory")
    seconds = [run["seconds"] / job["batches"] for run in runs]
    middle = statistics.median(seconds)
    return {
        "seconds": middle,
        "range": [min(seconds), max(seconds)],
        "per_second": job["useful_per_pass"] / job["batches"] / middle,
        "bytes": sum(memory.values()),
        "flops_per_second": job["flops_per_pass"] / job["batches"] / middle,
    }


def bends(points: Sequence[Facts]) -> list[float]:
    """Returns the exponent of time between neighboring points: 1 is linear, 2 quadratic; below 1, a
    fixed cost dominates.
    """
    return [
        math.log(after["seconds"] / before["seconds"])
        / math.log(after["factor"] / before["factor"])
        for before, after in itertools.pairwise(points)
    ]


def table(result: Facts) -> str:
    """Returns the table, with the exponents by which time grows."""
    rows: list[Sequence[str]] = []
    for axis, points in result["axes"].items():
        for point, bend in zip(points, [None, *result["bends"][axis]], strict=True):
            rows.append(
                (
                    axis,
                    f"{BASE.get(axis, 1) * point['factor']}",
                    f"{1e3 * point['seconds']:.3g}",
                    f"{point['bytes'] / 2**20:.3g}",
                    f"{point['per_second']:,.0f}",
                    f"{point['flops_per_second'] / 1e9:.3g}",
                    "" if bend is None else f"{bend:.2f}",
                )
            )
    head = ("axis", "size", "step (ms)", "memory (MiB)", "tokens/s", "GFLOP/s", "exponent of time")
    return markdown(head, rows) + (
        ""
        if "devices" in result["axes"]
        else "\ndevices: not measured, as this machine has only one"
    )


def plot(result: Facts) -> str:
    """Returns an SVG: step time and memory over the factor, both axes logarithmic."""
    panels = [
        panel(result, what, label, WIDTH * index) for index, (what, label) in enumerate(PANELS)
    ]
    width = WIDTH * len(PANELS)
    size = f'width="{width}" height="{HEIGHT}" viewBox="0 0 {width} {HEIGHT}"'
    style = (
        "text{font:12px system-ui,sans-serif;fill:#57606a}"
        ".grid{stroke:#d6d9de}polyline{fill:none;stroke-width:2}"
    )
    space = 'xmlns="http://www.w3.org/2000/svg"'
    return f"<svg {space} {size}><style>{style}</style>{''.join(panels)}</svg>\n"


PANELS = (("seconds", "seconds per step"), ("bytes", "bytes"))


def panel(result: Facts, what: str, label: str, left: int) -> str:
    """Returns one of the two figures."""
    values = [point[what] for points in result["axes"].values() for point in points]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(factor: float) -> float:
        return left + LEFT + (WIDTH - LEFT - 80) * math.log2(factor) / math.log2(FACTORS[-1])

    def y(value: float) -> float:
        return 20 + (HEIGHT - BOTTOM - 20) * (high - math.log10(value)) / (high - low)

    parts = [f'<text x="{left + LEFT}" y="14">{label}</text>']
    for power in range(low, high + 1):
        parts.append(
            f'<line class="grid" x1="{x(1)}" x2="{x(FACTORS[-1])}" y1="{y(10**power)}" '
            f'y2="{y(10**power)}"/>'
        )
        parts.append(
            f'<text x="{x(1) - 8}" y="{y(10**power) + 4}" text-anchor="end">1e{power}</text>'
        )
    parts += [
        f'<text x="{x(f)}" y="{HEIGHT - 16}" text-anchor="middle">x {f}</text>' for f in FACTORS
    ]
    for color, (axis, points) in zip(COLORS, result["axes"].items(), strict=False):
        line = " ".join(f"{x(point['factor']):.1f},{y(point[what]):.1f}" for point in points)
        end = points[-1]
        parts.append(f'<polyline points="{line}" stroke="{color}"/>')
        parts.append(
            f'<text x="{x(end["factor"]) + 6}" y="{y(end[what]) + 4}" '
            f'style="fill:{color}">{axis}</text>'
        )
    return "".join(parts)


def write_plot(result: Facts, folder: Path) -> Path:
    """Writes growth.svg."""
    path = folder / "bench" / "growth.svg"
    write_atomically(path, plot(result))
    return path
