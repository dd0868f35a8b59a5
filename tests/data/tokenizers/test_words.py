"""Cutting texts word by word, with what words were remembered: the same ids as the tokenizer gives for whole texts."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from fmjax.data.tokenizers import words
from fmjax.data.tokenizers.reading import Pieces, bert

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdeσςé中文.!#[]", "##a", "##b", "##c", "ab", "abc", "##σ", "sep"]
# What BERT's normaliser deletes, replaces by a blank, splits at, decomposes or lower-cases by context, and special tokens.
PARTS = [
    *"abcABC.!#[]Σéİß中文", " ", "\n", "\t", "\r", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "\u3000", "\u200b",
    "\x00", "\ufffd", "e\u0301", "\u0301", " \u0301", "[SEP]", "[sep]", " [MASK] ", "[UNK]", "[SEP", "sep", "abc ab", "x" * 101,
]  # fmt: skip
TEXTS = st.lists(st.lists(st.sampled_from(PARTS), max_size=12).map("".join), max_size=6)


def tokenizer(lowercase: bool = True) -> Tokenizer:
    return bert({token: number for number, token in enumerate(VOCABULARY)}, lowercase)


def plain(made: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [row.ids for row in made.encode_batch(texts, add_special_tokens=False)]


def remembered(pieces: Pieces) -> dict[str, bytes]:
    assert pieces.words is not None
    return pieces.words.known


@pytest.mark.parametrize("lowercase", [True, False])
@given(texts=TEXTS)
@settings(max_examples=400, deadline=None)
def test_same_ids(lowercase: bool, texts: list[str]) -> None:
    pieces = Pieces(tokenizer(lowercase))
    for _ in range(2):  # the second time from memory
        assert [list(ids) for ids in pieces.encode_batch(texts)] == plain(pieces.tokenizer, texts)


@given(texts=st.lists(st.text(max_size=40), max_size=4))
@settings(max_examples=300, deadline=None)
def test_same_ids_of_any_text(texts: list[str]) -> None:
    pieces = Pieces(tokenizer())
    assert [list(ids) for ids in pieces.encode_batch(texts)] == plain(pieces.tokenizer, texts)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "MOST", 8)
    pieces = Pieces(tokenizer())
    texts = [f"ab{number} abc a{'b' * number}" for number in range(60)]
    kept = []
    for text in texts:
        assert [list(ids) for ids in pieces.encode_batch([text])] == plain(pieces.tokenizer, [text])
        kept.append(len(remembered(pieces)))
    assert max(kept) <= 8 + 3
    assert min(kept[20:]) < 8  # begun anew


def test_texts_of_long_words_are_not_remembered() -> None:
    pieces = Pieces(tokenizer())
    long = "中文" * 40
    assert [list(ids) for ids in pieces.encode_batch([long, "ab abc"])] == plain(pieces.tokenizer, [long, "ab abc"])
    assert set(remembered(pieces)) == {"ab", "abc"}


def test_pickled_without_what_it_remembers() -> None:
    pieces = Pieces(tokenizer())
    pieces.encode_batch(["ab abc"])
    again = pickle.loads(pickle.dumps(pieces))
    assert remembered(again) == {} and remembered(pieces)
    assert list(again.encode_batch(["ab"])[0]) == list(pieces.encode_batch(["ab"])[0])


def changed(**attributes: object) -> Tokenizer:
    made = tokenizer()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def with_token(token: AddedToken) -> Tokenizer:
    made = tokenizer()
    made.add_tokens([token])
    return made


@pytest.mark.parametrize(
    "made",
    [
        Tokenizer(models.BPE()),
        changed(normalizer=normalizers.NFKC()),
        changed(pre_tokenizer=pre_tokenizers.ByteLevel()),
        with_token(AddedToken("a b", normalized=False)),
        with_token(AddedToken("<mask>", lstrip=True, normalized=False)),
        with_token(AddedToken("<x>", rstrip=True, normalized=False)),
        with_token(AddedToken("中文x", normalized=True)),
    ],
)
def test_others_are_cut_whole(made: Tokenizer) -> None:
    assert words.fits(made) == ""
    assert Pieces(made).words is None


def test_separator_is_not_the_unknown_token() -> None:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[UNK]"])
    assert words.fits(made) == ""
    made.add_special_tokens(["[SEP]"])
    assert words.fits(made) == "[SEP]"
    assert [ids.tolist() for ids in words.Words(made, "[SEP]").encode_batch(["a b a"])] == [[1, 0, 1]]
    assert np.array_equal(words.Words(made, "[SEP]").encode_batch(["b"])[0], [0])
