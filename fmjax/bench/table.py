"""Results as a Markdown table, readable in a terminal and in a README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fmjax.bench import timing
from fmjax.bench.workloads import Facts

HEAD = ("workload", "fmjax", "peer's best", "times faster", "bar", "met")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table with aligned columns."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    shown = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    return "\n".join(
        [shown[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *shown[1:]]
    )


def milliseconds(side: Facts) -> str:
    """Returns "103 ms (99-120)": a median and its range."""
    low, high = (1e3 * value for value in side["step_seconds_range"])
    return f"{1e3 * side['step_seconds']:.3g} ms ({low:.3g}-{high:.3g})"


def row(result: Facts) -> list[str]:
    """Returns a line of the table of WORKLOADS."""
    own, unit = result["sides"]["fmjax"], result["unit"]
    cells = [result["title"], f"{milliseconds(own)}, {own['per_second']:,.0f} {unit}/s"]
    bar = result["bar"]
    shown = f">= {bar}" if bar else "none"
    if result["peer"] is None:
        return [*cells, "not measured", "not measured", shown, "not measured"]
    peer = f"{milliseconds(result['sides'][result['peer']])} {result['peer']}"
    if result["ratio"] is None:
        return [*cells, peer, "not compared: results differ", shown, "no"]
    low, high = result["ratio_range"]
    met = "" if not bar else "yes" if result["ratio"] >= bar else "no"
    return [*cells, peer, f"{result['ratio']:.2f} ({low:.2f}-{high:.2f})", shown, met]


def side_by_side(results: Sequence[Facts]) -> str:
    """Returns the table of WORKLOADS, followed by the failures and the compared losses."""
    lines = [markdown(HEAD, map(row, results))]
    for result in results:
        for difference in [result["parity"].get("difference", {})]:
            if difference:
                what = (
                    "fraction of tokens that differ"
                    if result["job"]["kind"] == "generate"
                    else "largest relative difference"
                )
                said = ", ".join(f"{name} {value:.1e}" for name, value in difference.items())
                lines.append(
                    f"parity of {result['workload']} over {result['parity']['steps']} steps, "
                    f"{what}: {said}"
                )
        if timing.SECOND in result["sides"]:
            lines.append(beside_second(result))
        lines += [
            f"failed in {result['workload']}: {message}" for message in result["failed"].values()
        ]
    return "\n".join(lines)


def beside_second(result: Facts) -> str:
    """Returns a line that compares a workload with the second peer."""
    took = milliseconds(result["sides"][timing.SECOND])
    said = f"{result['workload']} beside {timing.SECOND} (fp32), {took}"
    if "second" not in result:
        return f"{said}: not compared, since the tokens differ"
    low, high = result["second"]["ratio_range"]
    return f"{said}: {result['second']['ratio']:.2f} times as fast ({low:.2f}-{high:.2f})"


def where(machine: Facts) -> str:
    """Returns one line about the machine, the versions and the command."""
    versions = ", ".join(
        f"{name} {number}" for name, number in machine["versions"].items() if number
    )
    notes = ["TINY SIZES: these numbers are not meaningful"] * machine["tiny"]
    notes += ["without torch.compile: the peer is not at its fastest"] * (
        not machine["torch.compile"]
    )
    return "; ".join(
        (
            f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, "
            f"{machine['devices']}",
            f"Python {machine['python']}, {versions}",
            f"commit {machine['commit'][:12]}",
            f"load {machine['load']:.1f}",
            machine["command"],
            *notes,
        )
    )
