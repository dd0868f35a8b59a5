"""The tokenizers of Marian's translation models (opus-mt), for `tokenizers.Tokenizer`.

Two SentencePiece models, `source.spm` and `target.spm`, split texts; `vocab.json` has the ids of
the pieces of both. A source may begin with the target language, such as ">>fra<<". Follows Hugging
Face's `tokenization_marian.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import models, processors

from fmjax.config.json_files import parse_json
from fmjax.contracts import Value
from fmjax.data.tokenizers.sentencepieces import SPACE
from fmjax.errors import UserError

SOURCE, TARGET, VOCABULARY = "source.spm", "target.spm", "vocab.json"
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SPECIAL = re.compile(f"({'|'.join((PAD, END, UNKNOWN))})")
LANGUAGE = re.compile(r">>.*?<<", re.DOTALL)


class MarianPieces:
    """Two SentencePiece models over one vocabulary.

    Special tokens in a text are recognized.
    """

    def __init__(self, source: bytes, target: bytes, vocabulary: Mapping[str, int]):
        self.protos, self.vocabulary = (source, target), dict(vocabulary)
        self.source, self.target = (
            sentencepiece.SentencePieceProcessor(model_proto=proto) for proto in self.protos
        )
        self.tokens = [""] * (max(self.vocabulary.values()) + 1)
        for token, number in self.vocabulary.items():
            self.tokens[number] = token
        self.unk = self.vocabulary[UNKNOWN]

    def __reduce__(self) -> tuple[type[MarianPieces], tuple[bytes, bytes, dict[str, int]]]:
        return MarianPieces, (*self.protos, self.vocabulary)

    @property
    def content(self) -> bytes:
        """Everything that determines the ids: both models and the vocabulary."""
        return b"".join(self.protos) + json.dumps(self.vocabulary, sort_keys=True).encode()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text in the source language."""
        return [self.encode(text)[0] for text in texts]

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text in the target language."""
        return [self.cut(text, self.target)[0] for text in texts]

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text in the source language, and the offsets of each in
        characters."""
        return self.cut(text, self.source)

    def cut(
        self, text: str, processor: sentencepiece.SentencePieceProcessor
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns a text's ids and offsets according to one of the models."""
        pieces: list[str] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for part in SPECIAL.split(text):
            begin = 0
            language = None if SPECIAL.fullmatch(part) else LANGUAGE.match(part)
            if language or SPECIAL.fullmatch(part):
                begin = len(language[0]) if language else len(part)
                pieces.append(part[:begin])
                offsets.append((at, at + begin))
            found = processor.encode(part[begin:], return_type="offset_mapping")
            pieces += found["pieces"]
            offsets += [(at + begin + first, at + begin + last) for first, last in found["offsets"]]
            at += len(part)
        return [self.vocabulary.get(piece, self.unk) for piece in pieces], offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, including special tokens.

        The source model decodes, as in the reference; unknown pieces are written as they are.
        """
        text = ""
        plain: list[str] = []
        for token in (self.tokens[number] for number in ids):
            if SPECIAL.fullmatch(token):
                text += f"{self.source.decode_pieces(plain)}{token} "
                plain = []
            else:
                plain.append(token)
        text += str(self.source.decode_pieces(plain))
        return text.replace(SPACE, " ").strip()

    def special(self) -> set[int]:
        """Returns the ids of the special tokens and of the target languages."""
        return {
            number
            for token, number in self.vocabulary.items()
            if SPECIAL.fullmatch(token) or LANGUAGE.fullmatch(token)
        }

    def openings(self) -> np.ndarray:
        """Returns [vocabulary] bool: whether a token begins a word."""
        return np.array([token.startswith(SPACE) for token in self.tokens])

    def closings(self) -> np.ndarray:
        """Returns [vocabulary] bool: whether a token ends a word by itself; none does."""
        return np.zeros(len(self.tokens), bool)

    def template(self) -> tokenizers.Tokenizer:
        """Returns a tokenizer that appends the end token to a text or a pair."""
        shell = tokenizers.Tokenizer(models.WordLevel(self.vocabulary, unk_token=UNKNOWN))
        shell.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", pair=f"$A $B {END}", special_tokens=[(END, self.vocabulary[END])]
        )
        return shell

    def save(self, folder: Path) -> dict[str, Value]:
        """Writes the three files. Returns settings for the reader."""
        for name, proto in zip((SOURCE, TARGET), self.protos, strict=True):
            (folder / name).write_bytes(proto)
        (folder / VOCABULARY).write_text(
            json.dumps(self.vocabulary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        return {"tokenizer_class": "MarianTokenizer"}


def read(folder: Path, settings: Mapping[str, Value]) -> MarianPieces:
    """Returns the tokenizer of a Marian folder. Raises UserError if a file is missing or damaged,
    or source and target have separate vocabularies."""
    if settings.get("separate_vocabs"):
        raise UserError(
            f"{folder}: source and target have separate vocabularies, which is not supported; use "
            "a model that shares one"
        )
    try:
        vocabulary = parse_json((folder / VOCABULARY).read_text(encoding="utf-8-sig"))
        pieces = {
            token: number
            for token, number in vocabulary.items()
            if type(number) is int and number >= 0
        }
        if pieces != vocabulary or not {PAD, END, UNKNOWN} <= set(pieces):
            raise ValueError(
                f"{VOCABULARY} does not map tokens to numbers, including {PAD}, {END} and {UNKNOWN}"
            )
        return MarianPieces((folder / SOURCE).read_bytes(), (folder / TARGET).read_bytes(), pieces)
    except (OSError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{folder}: is not a complete Marian tokenizer ({error}); "
            f"get {SOURCE}, {TARGET} and {VOCABULARY}"
        ) from None
