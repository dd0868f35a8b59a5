"""SentencePiece models (Kudo and Richardson 2018), read by the sentencepiece library, for
`tokenizers.Tokenizer`."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from fmjax.contracts import Value
from fmjax.errors import UserError

MODEL = "spiece.model"
SPACE = "▁"
MASKS = ("[MASK]", "<mask>")
SENTINEL = re.compile(r"<extra_id_(\d+)>")


def sentinel(number: int) -> str:
    """Returns the name of T5's token for the `number`th span removed from a text."""
    return f"<extra_id_{number}>"


class SentencePieces:
    """A SentencePiece model.

    Of the special tokens in a text, only masks and sentinels are recognized.
    """

    def __init__(self, proto: bytes):
        self.proto = proto
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.tokens = [
            self.processor.id_to_piece(number) for number in range(self.processor.get_piece_size())
        ]
        self.sentinels = [name for name in self.tokens if SENTINEL.fullmatch(name)]
        self.masks = [name for name in MASKS if name in self.tokens] + self.sentinels
        self.marks = re.compile(f"({'|'.join(map(re.escape, self.masks)) or '(?!)'})")
        self.unk = self.processor.id_to_piece(self.processor.unk_id())

    def __reduce__(self) -> tuple[type[SentencePieces], tuple[bytes]]:
        return SentencePieces, (self.proto,)

    @property
    def content(self) -> bytes:
        """Everything that determines the ids: the model's bytes."""
        return self.proto

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text."""
        plain = [index for index, text in enumerate(texts) if not self.marks.search(text)]
        rows: list[list[int]] = [[] for _ in texts]
        for index, ids in zip(
            plain, self.processor.encode([texts[index] for index in plain]), strict=True
        ):
            rows[index] = ids
        for index in set(range(len(texts))).difference(plain):
            rows[index] = self.encode(texts[index])[0]
        return rows

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and the offsets of each in characters."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        at = 0
        for part in self.marks.split(text):
            if part in self.masks:
                ids.append(self.tokens.index(part))
                offsets.append((at, at + len(part)))
            else:
                found = self.processor.encode(part, return_type="offset_mapping")
                ids.extend(found["ids"])
                offsets.extend((at + begin, at + end) for begin, end in found["offsets"])
            at += len(part)
        return ids, offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids; control tokens, such as [CLS], have no text."""
        return str(self.processor.decode(list(ids)))

    def special(self) -> set[int]:
        """Returns the ids of control tokens and sentinels."""
        control = {
            number for number in range(len(self.tokens)) if self.processor.is_control(number)
        }
        return control | {self.tokens.index(name) for name in self.sentinels}

    def openings(self) -> np.ndarray:
        """Returns [vocabulary] bool: whether a token begins a word."""
        return np.array([token.startswith(SPACE) for token in self.tokens])

    def closings(self) -> np.ndarray:
        """Returns [vocabulary] bool: whether a token ends a word by itself; none does."""
        return np.zeros(len(self.tokens), bool)

    def template(self) -> tokenizers.Tokenizer:
        """Returns a tokenizer that combines two texts like BERT (and ALBERT) if it has [CLS] and
        [SEP], or like T5, each followed by </s>, if it has sentinels."""
        shell = tokenizers.Tokenizer(
            models.WordLevel({token: n for n, token in enumerate(self.tokens)}, unk_token=self.unk)
        )
        if {"[CLS]", "[SEP]"} <= set(self.tokens):
            shell.post_processor = bert_template(
                self.tokens.index("[CLS]"), self.tokens.index("[SEP]")
            )
        if self.sentinels and "</s>" in self.tokens:
            end = ("</s>", self.tokens.index("</s>"))
            shell.post_processor = processors.TemplateProcessing(
                single="$A </s>", pair="$A </s> $B </s>", special_tokens=[end]
            )
        return shell

    def save(self, folder: Path) -> dict[str, Value]:
        """Writes `spiece.model`, and a `tokenizer.json` that the reference reads. Returns settings
        for the reader.

        The reference reads a unigram model with the same results, except for texts that join
        characters by U+200D and similar ones. No `tokenizer.json` is written for models of words
        and characters.
        """
        (folder / MODEL).write_bytes(self.proto)
        spec = self.specification
        if spec.trainer_spec.model_type in (spec.trainer_spec.UNIGRAM, spec.trainer_spec.BPE):
            self.convert().save(str(folder / "tokenizer.json"))
        return {"fmjax": MODEL}

    @functools.cached_property
    def specification(self) -> Any:
        # Imported here, because it needs protobuf, and only saving uses it.
        from sentencepiece import sentencepiece_model_pb2 as messages

        specification = messages.ModelProto()  # type: ignore[attr-defined]
        specification.ParseFromString(self.proto)
        return specification

    def convert(self) -> tokenizers.Tokenizer:
        """Returns the model as a tokenizer of the tokenizers library, like the reference's
        `convert_slow_tokenizer.py`."""
        spec, trainer = self.specification, self.specification.trainer_spec
        pieces = [(piece.piece, piece.score) for piece in spec.pieces]
        steps: list[normalizers.Normalizer] = []
        if spec.normalizer_spec.precompiled_charsmap:
            steps.append(normalizers.Precompiled(spec.normalizer_spec.precompiled_charsmap))
        if spec.normalizer_spec.remove_extra_whitespaces:
            steps += [normalizers.Replace(tokenizers.Regex(" {2,}"), " "), normalizers.Strip()]
        prefixed = spec.normalizer_spec.add_dummy_prefix
        if trainer.model_type == trainer.BPE:
            known = {piece: number for number, (piece, _) in enumerate(pieces)}
            settings = {
                "unk_token": self.unk,
                "fuse_unk": True,
                "byte_fallback": trainer.byte_fallback,
            }
            whole = tokenizers.Tokenizer(models.BPE(known, merges(pieces), **settings))
            # Pieces may contain several spaces, so text is not split at spaces.
            steps += [normalizers.Prepend(SPACE)] * prefixed + [normalizers.Replace(" ", SPACE)]
            shown = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
            whole.decoder = decoders.Sequence(shown + [decoders.Strip(" ", 1, 0)] * prefixed)
        else:
            settings = {"unk_id": self.processor.unk_id(), "byte_fallback": trainer.byte_fallback}
            whole = tokenizers.Tokenizer(models.Unigram(pieces, **settings))
            prepend = "always" if prefixed else "never"
            whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
            whole.decoder = decoders.Sequence(
                [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)]
            )
        whole.normalizer = normalizers.Sequence(steps)
        whole.add_special_tokens(
            [AddedToken(mask, lstrip=True, normalized=False) for mask in self.masks]
        )
        whole.post_processor = self.template().post_processor or processors.Sequence([])
        return whole


def with_sentinels(pieces: SentencePieces, count: int) -> SentencePieces:
    """Returns a model with T5's sentinels appended to its pieces in reverse order, as in the
    reference: <extra_id_0> has the highest id."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    specification = messages.ModelProto()  # type: ignore[attr-defined]
    specification.ParseFromString(pieces.proto)
    for number in reversed(range(count)):
        kind = messages.ModelProto.SentencePiece.USER_DEFINED  # type: ignore[attr-defined]
        specification.pieces.add(piece=sentinel(number), score=0.0, type=kind)
    return SentencePieces(specification.SerializeToString())


def merges(pieces: Sequence[tuple[str, float]]) -> list[tuple[str, str]]:
    """Returns the merges of a BPE model, best score first: every division of a piece into two other
    pieces."""
    known = {piece: number for number, (piece, _) in enumerate(pieces)}
    found = [
        (-score, known[piece[:at]], known[piece[at:]], (piece[:at], piece[at:]))
        for piece, score in pieces
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
    return [pair for *_, pair in sorted(found)]


def bert_template(cls_id: int, sep_id: int) -> processors.PostProcessor:
    """Returns BERT's template: [CLS] A [SEP], [CLS] A [SEP] B [SEP]."""
    return processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)],
    )


def read_model(path: Path) -> SentencePieces:
    """Reads a SentencePiece model file. Raises UserError if it is not one."""
    try:
        return SentencePieces(path.read_bytes())
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path}: is not a SentencePiece model; fetch it again") from error
