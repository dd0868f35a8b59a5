"""How a text becomes words: no letter without its marks, and no other words than were learnt."""

from __future__ import annotations

import pytest

from fmjax.errors import UserError
from fmjax.tasks.words import check_split, join, word_spans


def words(text: str, split: str = "words") -> list[str]:
    return [text[begin:end] for begin, end in word_spans(text, split)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("العَرَبِيَّة لغة", ["العَرَبِيَّة", "لغة"]),
        ("สวัสดีครับ", ["สวัสดีครับ"]),
        ("Cafe\u0301 re\u0301sume\u0301.", ["Cafe\u0301", "re\u0301sume\u0301", "."]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("co\u00adoperate", ["co\u00adoperate"]),
        ("葛\U000e0100城 Ann在北京。", ["葛\U000e0100", "城", "Ann", "在", "北", "京", "。"]),
        ("Ann Lee, don't_1", ["Ann", "Lee", ",", "don", "'", "t_1"]),
        ("\u2764\ufe0f x", ["\u2764\ufe0f", "x"]),
        ("10\u00a0000", ["10", "000"]),
    ],
)
def test_words_keep_their_marks(text, found):
    assert words(text) == found


def test_characters_and_what_spaces_separate():
    assert words("हिन्दी é e\u0301", "characters") == ["हि", "न्", "दी", "é", "e\u0301"]
    assert words("10\u00a0000 don't\tgo", "spaces") == ["10\u00a0000", "don't", "go"]


@pytest.mark.parametrize("split", ["words", "characters", "spaces"])
def test_words_are_joined_to_a_text(split):
    given = ["北", "京"] if split == "characters" else ["Ann", "Lee"]
    text, spans = join(given, split)
    assert [text[begin:end] for begin, end in spans] == given
    assert text == ("北京" if split == "characters" else "Ann Lee") and join([], split) == ("", [])


ENGLISH = ["Angela", "Merkel", "visited", "Paris", "in", "July", "."] * 5
CHINESE = list("他在北京大学教书。2008年Ann") * 3
TWEETS = ["@ann", "#jax", "http://a.b", ":-)", "it's"] * 8


def test_what_is_split_must_be_what_was_learnt():
    with pytest.raises(UserError, match=r'task.split=characters: 85.7% .* "Angela"; set task.split=words \(bert_tag.py:words\)'):
        check_split("characters", [ENGLISH], refuse=True)
    with pytest.raises(UserError, match=r"task.split=spaces: .*; set task.split=characters"):
        check_split("spaces", [CHINESE], refuse=True)
    with pytest.raises(UserError, match=r'task.split=words: 100.0% .*, as "@ann"; set task.split=spaces'):
        check_split("words", [TWEETS], refuse=True)
    assert "set task.split=words" in check_split("characters", [ENGLISH], refuse=False)


def test_words_that_are_found_again_are_not_spoken_of():
    for split, sentence in (("words", ENGLISH), ("spaces", ENGLISH), ("characters", CHINESE), ("spaces", TWEETS)):
        assert check_split(split, [sentence], refuse=True) == ""
    assert check_split("characters", [ENGLISH[:3]], refuse=True) == ""  # too few to tell
    note = check_split("words", [[*ENGLISH, "U.S."]], refuse=True)
    assert note == 'task.split=words: 2.8% of the training words are not recovered in a text to predict on, as "U.S."'
