"""Facts about training data that tasks share: labels and their counts, and how many texts are
truncated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fmjax.contracts import Fact

LISTED = 8  # number of labels that are listed with their counts
RARELY = 0.01  # the fraction of texts that a proposed limit may truncate
MULTIPLE = 8  # proposed limits are multiples of this


def percent(share: float) -> str:
    """Returns a fraction in percent, with one decimal below 10 %, and "< 0.1 %" for small positive
    values."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{100 * share:.0f} %" if share >= 0.0995 or not share else f"{100 * share:.1f} %"


def counted(labels: Sequence[str], counts: np.ndarray, total: int) -> str:
    """Returns labels with their counts and percentages of `total`; if there are many, the most
    frequent ones."""
    many = len(labels) > LISTED
    shown = np.argsort(-counts, kind="stable")[:LISTED].tolist() if many else range(len(labels))
    listed = [f"{labels[i]} {counts[i]:,} ({percent(counts[i] / max(total, 1))})" for i in shown]
    more = [f"and {len(labels) - LISTED} more"] if many else []
    return f"{len(labels)}: {', '.join([*listed, *more])}"


def class_fact(labels: Sequence[str], classes: np.ndarray, name: str = "labels") -> Fact:
    """Returns the counts of the classes [N] of examples, and the accuracy of always predicting the
    most frequent one."""
    return count_fact(labels, np.bincount(classes, minlength=len(labels)), name)


def count_fact(labels: Sequence[str], counts: np.ndarray, name: str = "labels") -> Fact:
    """Returns the same for the counts [labels]."""
    top, total = int(counts.argmax()), int(counts.sum())
    baseline = counts[top] / max(total, 1)
    values = {
        "counts": by_label(labels, counts),
        "majority": labels[top],
        "majority_accuracy": float(baseline),
    }
    text = f"{counted(labels, counts, total)}; majority baseline: {percent(baseline)} accuracy"
    return Fact(name, text, values)


def several_fact(labels: Sequence[str], present: np.ndarray, layout: str) -> Fact:
    """Returns the counts of labels for examples that may have several, `present [N, C]`."""
    counts, total = (present > 0.5).sum(axis=0), len(present)
    none = float((present < 0.5).all(axis=1).mean())
    text = f"{counted(labels, counts, total)} of {total:,} records; {layout}"
    text += f"; {percent(none)} have none" if none else ""
    return Fact("labels", text, {"counts": by_label(labels, counts), "without": none})


def by_label(labels: Sequence[str], counts: np.ndarray) -> dict[str, int]:
    return {label: int(count) for label, count in zip(labels, counts, strict=True)}


def number_fact(numbers: np.ndarray) -> Fact:
    """Returns the range of a regression's targets [N], and the score of always predicting the
    mean.
    """
    low, high, mean, variance = (float(f(numbers)) for f in (np.min, np.max, np.mean, np.var))
    values = {"min": low, "max": high, "mean": mean, "mean_mse": variance}
    text = (
        f"numbers from {low:.4g} to {high:.4g}, mean {mean:.4g}; "
        f"baseline, the mean: mse {variance:.4g}"
    )
    return Fact("labels", text, values)


def length_fact(
    lengths: np.ndarray, most: int, setting: str = "data.max_length", name: str = "lengths"
) -> Fact:
    """Returns the fraction of texts with more than `most` tokens, and the limit that would truncate
    less than RARELY of them.

    Args:
      lengths: [N] tokens of each text of a sample, including special tokens, before truncation.
      most: the limit.
      setting: the key of the limit.
      name: the name of the fact.
    """
    cut, longest = float(np.mean(lengths > most)), int(lengths.max())
    fit = int(np.sort(lengths)[::-1][max(-(-lengths.size // round(1 / RARELY)) - 1, 0)])
    fit = -(-fit // MULTIPLE) * MULTIPLE
    values = {
        "sampled": int(lengths.size),
        "cut": cut,
        "limit": most,
        "longest": longest,
        "rarely_cut": fit,
    }
    middle = f"median {int(np.median(lengths))} tokens, longest {longest:,}"
    if not cut:
        return Fact(name, f"{middle}; none is cut at {setting}={most}", values)
    better = f"; {fit:,} would cut less than {100 * RARELY:.0f} %" if cut >= RARELY else ""
    return Fact(name, f"{percent(cut)} are cut at {setting}={most} ({middle}){better}", values)
