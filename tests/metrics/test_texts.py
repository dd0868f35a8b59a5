"""Metrics of texts: what the libraries give, on which scale, and how it was computed."""

from __future__ import annotations

import pytest

from fmjax.errors import UserError
from fmjax.metrics import texts as text_metrics

TEXTS = ["the cat sat on the mat", "zwei Männer warten", " yes "]
TRUTHS = ["the cat sat on a mat", "zwei Männer warten", "yes"]


def test_perfect_and_empty_texts():
    perfect = text_metrics.texts(text_metrics.SCORES, TRUTHS, TRUTHS)
    assert perfect["bleu"] == pytest.approx(100) and perfect["chrf"] == pytest.approx(100)
    assert perfect["rouge1"] == perfect["rougeL"] == perfect["rougeLsum"] == perfect["exact_match"] == 1
    assert perfect["rouge2"] == pytest.approx(2 / 3)  # a single word has no pairs
    assert perfect["wer"] == perfect["cer"] == 0
    empty = text_metrics.texts(text_metrics.SCORES, [""] * 3, TRUTHS)
    assert empty["bleu"] == empty["chrf"] == empty["rouge1"] == empty["exact_match"] == 0 and empty["wer"] == empty["cer"] == 1


def test_by_hand():
    found = text_metrics.texts(text_metrics.SCORES, TEXTS, TRUTHS)
    assert set(found) == set(text_metrics.measures(text_metrics.SCORES))
    # Precisions of words, pairs, threes and fours; there are as many words as in the references, so no brevity penalty.
    assert found["bleu"] == pytest.approx(100 * (9 / 10 * 5 / 7 * 3 / 5 * 1 / 3) ** 0.25, abs=1e-6)
    assert found["rouge1"] == pytest.approx((5 / 6 + 1 + 1) / 3)
    assert found["wer"] == pytest.approx(1 / 10) and found["exact_match"] == pytest.approx(2 / 3)


def test_chinese_is_split_into_characters():
    text, truth = ["我喜欢这本书。"], ["我喜欢那本书。"]
    assert text_metrics.bleu(text, truth)["bleu"] < 10 < text_metrics.bleu(text, truth, "zh")["bleu"]
    assert text_metrics.chrf(text, truth)["chrf"] > 30
    with pytest.raises(UserError, match="only counts words of the letters a to z"):
        text_metrics.rouge(text, truth)


def test_signatures_say_how():
    found = text_metrics.signatures(text_metrics.SCORES, "zh")
    assert found["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:zh|smooth:exp|version:")
    assert found["chrf"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert "stemming" in found["rouge"] and "jiwer" in found["wer"]


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(UserError, match=r'"blue" is not known \(did you mean "bleu"\?\)'):
        text_metrics.measures(("blue",))
    with pytest.raises(UserError, match="0 texts and 0 references"):
        text_metrics.texts(("bleu",), [], [])
    with pytest.raises(UserError, match="2 texts and 3 references"):
        text_metrics.texts(("bleu",), TEXTS[:2], TRUTHS)
    with pytest.raises(UserError, match="reference 1 is blank"):
        text_metrics.error_rates(TEXTS, ["a", " ", "b"])
