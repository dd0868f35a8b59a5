"""The communication between devices in a compiled program, read from its text.

XLA counts the body of a loop once; here, each loop's instructions are multiplied by its trip count.
The CPU compiler notes it beside the loop; the TPU compiler leaves the number in the condition,
where a scan compares its index with it. Other loops count once."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

# What the TPU compiler turns a collective across slices into: hosts send parts of it to each other.
BETWEEN_SLICES = "between slices"
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*)$")
OPERATION = re.compile(rf"\s({'|'.join(KINDS)})(-start)?\(")
SEND = re.compile(r"\ssend\(")
ARRAY = re.compile(r"\b(pred|[suf]\d+|bf16|f8\w+|c\d+)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations)=\{?(%?[\w.\-]+(?:, %[\w.\-]+)*)\}?"
)
TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
BOUND = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
LESS = re.compile(r"ROOT .* compare\(.*direction=LT")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
# {{0,1},{2,3}}, [2,4]<=[8], or mesh['x'=4,'y'=2] {'x'}: the members, a group's size, the axes of a
# group
GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[([^\]]*)\] \{([^}]*)\})")


class Traffic(NamedTuple):
    """How often a kind of collective runs in a step, and how many bytes a device sends."""

    times: int
    sent: float


class Computation(NamedTuple):
    collectives: list[tuple[str, float]]  # kind, bytes sent
    called: list[
        tuple[str, int, str]
    ]  # name, count, and, for the callee of a loop, its condition if that determines the count
    bounds: list[int]  # the integer constants
    compares: list[bool]  # whether it ends in a comparison


def collectives(text: str, devices: int) -> dict[str, Traffic]:
    """Returns, by kind, the traffic of one run of a compiled program (`compiled.as_text()`) between
    `devices`.
    """
    parts, entry = computations(text, devices)
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for other, turns, condition in parts[name].called:
            if other in parts:
                visit(other, count * (turns_of(parts.get(condition)) if condition else turns))

    visit(entry, 1)
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for name, count in times.items():
        for kind, sent in parts[name].collectives:
            found[kind].append((count, sent))
    return {
        kind: Traffic(sum(count for count, _ in runs), sum(count * sent for count, sent in runs))
        for kind, runs in sorted(found.items())
    }


def turns_of(condition: Computation | None) -> int:
    """Returns the trip count of a loop that counts from 0 to the single constant in its condition;
    1 for any other loop.
    """
    return (
        condition.bounds[0]
        if condition and condition.compares and len(condition.bounds) == 1
        else 1
    )


def computations(text: str, devices: int) -> tuple[dict[str, Computation], str]:
    """Returns the own cost and the callees of each computation of a program, by name, and the
    entry's name.
    """
    parts: dict[str, Computation] = {}
    name = entry = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head[2]
            parts[name] = Computation([], [], [], [])
            entry = name if head[1] else entry
        elif name and (instruction := INSTRUCTION.match(line)):
            parts[name].collectives.extend(collective(instruction[1], devices))
            parts[name].bounds.extend(int(bound[1]) for bound in [BOUND.search(line)] if bound)
            parts[name].compares.extend([True] if LESS.search(line) else [])
            turns, condition = TURNS.search(line), CONDITION.search(line)
            alone = "" if turns or not condition else condition[1]
            for called in CALLED.finditer(instruction[1]):
                names = [one.strip().lstrip("%") for one in called[1].split(",")]
                parts[name].called.extend(
                    (one, int(turns[1]) if turns else 1, alone) for one in names if one
                )
    return parts, entry


def collective(instruction: str, devices: int) -> Iterator[tuple[str, float]]:
    """Yields the kind of an instruction and the bytes that a device sends in it, if it is a
    collective.

    Of n devices in a ring each sends (n - 1) / n of what is gathered or exchanged, and twice that
    of what is reduced for all."""
    if (send := SEND.search(instruction)) and "is_host_transfer=true" in instruction:
        yield BETWEEN_SLICES, max(sizes(instruction[: send.start()]), default=0.0)
        return
    operation = OPERATION.search(instruction)
    if not operation:
        return
    kind, arrays = operation[1], sizes(instruction[: operation.start()])
    # An asynchronous start has its operands and results as outputs, and the largest is the full
    # array.
    size = max(arrays, default=0) if operation[2] else sum(arrays)
    members = group_size(instruction, devices)
    share = (members - 1) / members
    if kind == "all-reduce":
        yield kind, 2 * share * size
    elif kind == "reduce-scatter" and not operation[2]:
        yield kind, share * size * members  # the result is one device's part
    elif kind == "collective-permute":
        yield kind, float(size)
    else:
        yield kind, share * size


def sizes(outputs: str) -> list[float]:
    """Returns the bytes of each array in the type of an instruction's outputs."""
    return [
        math.prod(int(size) for size in shape.split(",") if size) * item_size(dtype)
        for dtype, shape in ARRAY.findall(outputs)
    ]


def group_size(instruction: str, devices: int) -> int:
    """Returns the group size of a collective; all devices if it names no groups."""
    groups = GROUPS.search(instruction)
    if not groups:
        return devices
    listed, size, axes, chosen = groups.groups()
    if axes is not None:
        sizes = {
            axis: int(count) for axis, _, count in (part.partition("=") for part in axes.split(","))
        }
        return math.prod(sizes[axis] for axis in chosen.split(","))
    return int(size) if size else len(listed.split(","))


def item_size(dtype: str) -> float:
    """Returns the bytes of a number of an HLO type."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) / 8 if digits and not dtype.startswith("f8") else 1
