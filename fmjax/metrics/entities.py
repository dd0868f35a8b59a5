"""Entities marked by tags: tagging schemes, and scores from seqeval.

A tag is `O` or a prefix, a hyphen or an underscore, and the kind of an entity. Prefixes of the
schemes: B and I (IOB2, where every entity begins with B; IOB1, where B only separates neighbors), I
and E (IOE1, IOE2), B, I, E, S (BIOES; also written B, M, E, S or with W for S), and B, I, L, U
(BILOU). Only sentences show which of two variants tags follow.

Entities are found leniently, as in conlleval (an inside tag without a begin tag starts an entity),
or strictly, by a scheme (then it marks none). Ramshaw and Marcus 1995; Tjong Kim Sang and Veenstra
1999; Ratinov and Roth 2009; github.com/chakki-works/seqeval.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from seqeval import metrics as seqeval
from seqeval import scheme as seqeval_schemes
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import Entities

from fmjax.errors import UserError

OUTSIDE = "O"
TAG = re.compile(r"([A-Z])[-_](.+)", re.DOTALL)
# Prefixes that occur together, and seqeval's names for them.
PREFIXES: tuple[dict[str, str], ...] = (
    {"B": "B", "I": "I"},
    {"I": "I", "E": "E"},
    {"B": "B", "I": "I", "E": "E", "S": "S"},
    {"B": "B", "M": "I", "E": "E", "S": "S"},
    {"B": "B", "M": "I", "E": "E", "W": "S"},
    {"B": "B", "I": "I", "E": "E", "W": "S"},
    {"B": "B", "I": "I", "L": "E", "U": "S"},
)
CALLED = {prefix: name for prefixes in PREFIXES for prefix, name in prefixes.items()}
SCHEMES = {
    "IOB2": seqeval_schemes.IOB2,
    "IOB1": seqeval_schemes.IOB1,
    "IOE2": seqeval_schemes.IOE2,
    "IOBES": seqeval_schemes.IOBES,
}
SCORES = {
    "precision": seqeval.precision_score,
    "recall": seqeval.recall_score,
    "f1": seqeval.f1_score,
}
Entity = tuple[str, int, int]  # its kind, first and one-past-last word


def prefixes_of(labels: Iterable[str]) -> set[str] | None:
    """Returns the prefixes of labels that are `O` or a prefix and a kind; None if one is
    neither.
    """
    found = [TAG.fullmatch(label) for label in labels if label != OUTSIDE]
    return None if None in found else {match[1] for match in found if match}


def mark_entities(labels: Sequence[str]) -> bool:
    """Returns whether labels are the tags of a known scheme.

    Raises UserError, naming the prefixes, for tags besides `O` that belong to no scheme.
    """
    prefixes = prefixes_of(labels)
    if prefixes is None:
        return False
    if any(prefixes <= set(known) for known in PREFIXES):
        return True
    if OUTSIDE in labels and prefixes <= set(CALLED):
        raise UserError(
            f"the tags begin with {', '.join(sorted(prefixes))}, which is not a known tagging "
            "scheme; convert them to BIO, BIOES (B, M, E, S too) or BILOU"
        )
    return False


def usual_scheme(labels: Sequence[str]) -> str:
    """Returns the name of the scheme of labels, judged by the labels alone."""
    prefixes = {CALLED[prefix] for prefix in prefixes_of(labels) or ()}
    if prefixes <= {"B", "I"}:
        return "IOB2"
    return "IOE2" if prefixes <= {"I", "E"} else "IOBES"


def find_scheme(labels: Sequence[str], sentences: Iterable[Sequence[str]]) -> str:
    """Returns the name of the scheme in which the most sentences are well-formed, so that strict
    and lenient reading agree on them.

    Raises UserError for IOE1, which seqeval does not support strictly.
    """
    usual = usual_scheme(labels)
    if usual == "IOBES":
        return usual
    right = dict.fromkeys((usual, "IOB1") if usual == "IOB2" else (usual,), 0)
    count = 0
    for tags in sentences:
        own = entities(tags)
        count += 1
        for name in right:
            right[name] += entities(tags, name) == own
    if usual == "IOE2" and right[usual] < count / 2:
        raise UserError(
            "task.mode=strict does not support the scheme IOE1, where E- only separates neighbors; "
            "set task.mode=default, or convert the tags to BIO"
        )
    return max(right, key=right.__getitem__)


def translated(tags: Iterable[str]) -> list[str]:
    """Returns tags in seqeval's form: "M_PER" becomes "I-PER"."""
    return [tag if tag == OUTSIDE else f"{CALLED[tag[0]]}-{tag[2:]}" for tag in tags]


def entities(tags: Sequence[str], scheme: str = "") -> list[Entity]:
    """Returns the entities of a sentence: leniently, or strictly by a scheme."""
    if scheme:
        found = Entities([translated(tags)], SCHEMES[scheme]).entities[0]
        return [(entity.tag, entity.start, entity.end) for entity in found]
    return [(kind, first, last + 1) for kind, first, last in get_entities(translated(tags))]


def scores(
    truth: Sequence[Sequence[str]], guess: Sequence[Sequence[str]], scheme: str = ""
) -> dict[str, float]:
    """Returns precision, recall and F1 over the entities of all sentences, 0 to 1: exact spans and
    kinds, micro-averaged; strictly if a scheme is named."""
    strictly = {"mode": "strict", "scheme": SCHEMES[scheme]} if scheme else {}
    both = [translated(tags) for tags in truth], [translated(tags) for tags in guess]
    return {name: score(*both, zero_division=0, **strictly) for name, score in SCORES.items()}
