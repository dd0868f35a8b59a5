"""Metrics that compare generated texts with references, each from the standard library for it.

BLEU and chrF (sacreBLEU, Post 2018, arXiv:1804.08771) run from 0 to 100, as sacreBLEU prints them;
ROUGE (rouge-score, with stemming), word and character error rates (jiwer) and exact match are
fractions. Every text has one reference.

These libraries are imported where they are used, since importing them takes two seconds, and all
tasks are imported at the start of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from fmjax.contracts import Measures
from fmjax.errors import UserError, nearest

Texts = Sequence[str]
ROUGE: Measures = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), "max")
# BLEU's tokenizers: 13a is that of WMT, zh splits Chinese into characters.
TOKENIZERS = ("13a", "intl", "zh", "char", "none")


def bleu(hypotheses: Texts, references: Texts, tokenize: str = "13a") -> dict[str, float]:
    """Returns the corpus BLEU (Papineni et al. 2002), 0 to 100."""
    import sacrebleu

    return {"bleu": sacrebleu.BLEU(tokenize=tokenize).corpus_score(hypotheses, [references]).score}


def chrf(hypotheses: Texts, references: Texts) -> dict[str, float]:
    """Returns the corpus chrF2 (Popović 2015), 0 to 100. It uses character n-grams, so it works for
    any language."""
    import sacrebleu

    return {"chrf": sacrebleu.CHRF().corpus_score(hypotheses, [references]).score}


def rouge(hypotheses: Texts, references: Texts) -> dict[str, float]:
    """Returns the mean F1 of ROUGE-1, -2, -L and -Lsum (Lin 2004), with one sentence per line.

    Raises UserError if no reference has a word of Latin letters or digits; ROUGE counts no others.
    """
    from rouge_score import rouge_scorer

    if not any(letter.isascii() and letter.isalnum() for text in references for letter in text):
        raise UserError(
            "rouge only counts words of the letters a to z, and the references have none; use chrf"
        )
    scorer = rouge_scorer.RougeScorer(list(ROUGE), use_stemmer=True)
    rows = [scorer.score(truth, text) for text, truth in zip(hypotheses, references, strict=True)]
    return {name: float(np.mean([row[name].fmeasure for row in rows])) for name in ROUGE}


def error_rates(hypotheses: Texts, references: Texts) -> dict[str, float]:
    """Returns the word and character error rates, wer and cer: edits divided by the reference
    length, over the whole corpus.

    Raises UserError if a reference is blank, since the rates are then undefined.
    """
    import jiwer

    check_references("wer and cer", references)
    return {
        "wer": float(jiwer.wer(list(references), list(hypotheses))),
        "cer": float(jiwer.cer(list(references), list(hypotheses))),
    }


def exact_match(hypotheses: Texts, references: Texts) -> dict[str, float]:
    """Returns the fraction of texts that equal the reference, except for surrounding white
    space."""
    pairs = zip(hypotheses, references, strict=True)
    return {"exact_match": float(np.mean([text.strip() == truth.strip() for text, truth in pairs]))}


# The name of a score -> its metrics, which value is better, and the function.
SCORES: dict[str, tuple[Measures, Callable[..., dict[str, float]]]] = {
    "bleu": ({"bleu": "max"}, bleu),
    "chrf": ({"chrf": "max"}, chrf),
    "rouge": (ROUGE, rouge),
    "error_rates": ({"wer": "min", "cer": "min"}, error_rates),
    "exact_match": ({"exact_match": "max"}, exact_match),
}


def measures(names: Iterable[str]) -> Measures:
    """Returns the metrics of scores. Raises UserError for an unknown score."""
    names = tuple(names)
    for name in names:
        if name not in SCORES:
            raise UserError(
                f'task.scores: "{name}" is not known{nearest(name, SCORES)}; '
                f"choose from {', '.join(SCORES)}"
            )
    return {metric: best for name in names for metric, best in SCORES[name][0].items()}


def texts(
    names: Iterable[str], hypotheses: Texts, references: Texts, tokenize: str = "13a"
) -> dict[str, float]:
    """Returns the metrics of several scores;

    `tokenize` is BLEU's. Raises UserError if there is no text.
    """
    if not references or len(hypotheses) != len(references):
        raise UserError(
            f"evaluation: {len(hypotheses)} texts and {len(references)} references; pass the same "
            "number of both, at least one"
        )
    values: dict[str, float] = {}
    for name in names:
        options = {"tokenize": tokenize} if name == "bleu" else {}
        values |= SCORES[name][1](hypotheses, references, **options)
    return values


def signatures(names: Iterable[str], tokenize: str = "13a") -> dict[str, str]:
    """Returns how each score is computed, for reproducibility: sacreBLEU's signatures, versions,
    options."""
    import sacrebleu

    found = {}
    for name in names:
        if name in ("bleu", "chrf"):
            metric = sacrebleu.BLEU(tokenize=tokenize) if name == "bleu" else sacrebleu.CHRF()
            metric.corpus_score(["a"], [["a"]])  # then the number of references is known
            found[name] = str(metric.get_signature())
        elif name == "rouge":
            found[name] = "rouge-score, F1, with stemming"
        elif name == "error_rates":
            found["wer"] = found["cer"] = "jiwer, no normalisation"
    return found


def check_references(name: str, references: Texts) -> None:
    """Raises UserError if a reference is blank."""
    for number, text in enumerate(references):
        if not text.strip():
            raise UserError(
                f"{name}: reference {number} is blank, so the error rate is undefined; remove it"
            )
