"""Reads tokenizers from folders in Hugging Face's format. No file is executed or unpickled.

`tokenizer.json` is self-contained. Older formats are `vocab.txt` (BERT's WordPiece), `vocab.json`
with `merges.txt` (byte-level BPE), both with `tokenizer_config.json`; `*.model`; and `*.tiktoken`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from fmjax.config.json_files import unique
from fmjax.contracts import Value
from fmjax.data.tokenizers import marian, tiktokens
from fmjax.data.tokenizers.marian import MarianPieces
from fmjax.data.tokenizers.sentencepieces import (
    MODEL,
    SPACE,
    SentencePieces,
    bert_template,
    read_model,
    with_sentinels,
)
from fmjax.data.tokenizers.words import Words, fits
from fmjax.errors import UserError, in_range

Settings = dict[str, Value]

# Names of a role's token if no file defines it.
ROLES: dict[str, tuple[str, ...]] = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}
ENDS = ("</s>", "<|endoftext|>")  # likewise for the token that ends a text
LOOKED_FOR = (
    "tokenizer.json, vocab.txt, vocab.json with merges.txt or source.spm, a SentencePiece *.model, "
    "or *.tiktoken"
)
# The byte-level letters for a space, a line feed, a tab and a carriage return.
BLANKS = ("Ġ", "Ċ", "ĉ", "č")

# Tokenizers with the same files that split text differently are rejected: only their tokenizer.json
# describes them.
WORDPIECES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer")
BYTE_LEVELS = ("RobertaTokenizer", "GPT2Tokenizer")
T5 = ("T5Tokenizer",)
T5_FIRST = ["<pad>", "</s>", "<unk>"]  # ids 0 to 2 of T5's models
SENTINELS = 100


class Pieces:
    """A tokenizer from the tokenizers library: WordPiece, BPE, unigram or words."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.tokens = [""] * (max(vocabulary.values(), default=-1) + 1)
        for token, number in vocabulary.items():
            self.tokens[number] = token
        separator = fits(tokenizer)
        self.words = Words(tokenizer, separator) if separator else None

    @property
    def content(self) -> bytes:
        """Everything that determines the ids: all of tokenizer.json."""
        return json.dumps(json.loads(self.tokenizer.to_str()), sort_keys=True).encode()

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int] | np.ndarray]:
        """Returns the ids of each text."""
        if self.words is not None:
            return self.words.encode_batch(texts)
        return [
            row.ids
            for row in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text, and the offsets of each in characters."""
        row = self.tokenizer.encode(text, add_special_tokens=False)
        return row.ids, row.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens included."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))

    def special(self) -> set[int]:
        """Returns the ids of the tokens that the file declares special."""
        return {
            number
            for number, token in self.tokenizer.get_added_tokens_decoder().items()
            if token.special
        }

    def openings(self) -> np.ndarray:
        """Returns [vocabulary] bool: whether a token begins a word."""
        model = self.tokenizer.model
        if isinstance(model, models.WordLevel):
            return np.ones(len(self.tokens), bool)
        if isinstance(model, models.WordPiece):
            prefix = model.continuing_subword_prefix
            return np.array([not token.startswith(prefix) for token in self.tokens])
        marks = BLANKS if self.byte_level else (SPACE,)
        return np.array([token.startswith(marks) for token in self.tokens])

    def closings(self) -> np.ndarray:
        """Returns [vocabulary] bool: whether a token by itself ends a word, like a line feed."""
        marks = BLANKS[1:] if self.byte_level else ()
        return np.array([token.endswith(marks) for token in self.tokens])

    @functools.cached_property
    def byte_level(self) -> bool:
        """Whether tokens are written byte by byte, as in GPT-2, with a different sign for a space
        than in SentencePiece."""
        return sum(token.startswith(BLANKS[0]) for token in self.tokens) > sum(
            token.startswith(SPACE) for token in self.tokens
        )

    def template(self) -> tokenizers.Tokenizer:
        """Returns the tokenizer whose post-processor adds special tokens."""
        return self.tokenizer

    def save(self, folder: Path) -> Settings:
        """Writes `tokenizer.json`, and WordPiece's `vocab.txt`; and returns settings for the
        reader."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        if isinstance(self.tokenizer.model, models.WordPiece):
            self.tokenizer.model.save(str(folder))
        return {}


def read(path: Path) -> tuple[Pieces | SentencePieces | MarianPieces, Settings]:
    """Returns the tokenizer in a folder or file, and the settings beside it.

    Raises UserError, listing the expected files, if there is none, or if it splits text in an
    unknown way.
    """
    if path.is_file():
        return read_file(path), {}
    if not path.is_dir():
        raise UserError(f"{path}: no such folder or file; a tokenizer is {LOOKED_FOR}")
    settings = read_json(path / "tokenizer_config.json") | {
        name: token
        for name, token in read_json(path / "special_tokens_map.json").items()
        if name.endswith("_token")
    }
    settings.pop("auto_map", None)  # it would name code to execute
    if settings.get("fmjax") == MODEL and (path / MODEL).is_file():
        return read_model(path / MODEL), settings
    if (path / marian.SOURCE).is_file():
        return marian.read(path, settings), settings
    if (path / "tokenizer.json").is_file():
        return Pieces(
            with_settings(read_tokenizer_json(path / "tokenizer.json"), settings)
        ), settings
    if (path / "vocab.txt").is_file():
        check_class(path, settings, WORDPIECES)
        return Pieces(wordpiece(path / "vocab.txt", settings)), settings
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        check_class(path, settings, BYTE_LEVELS)
        return Pieces(byte_level(path / "vocab.json", settings)), settings
    files = sorted(path.iterdir())
    found = [file for file in files if file.suffix.lower() == ".model"]
    found = found or [file for file in files if file.suffix.lower() == tiktokens.SUFFIX]
    if not found:
        raise UserError(f"{path}: no tokenizer; looked for {LOOKED_FOR}")
    if len(found) > 1:
        raise UserError(
            f"{path}: has {', '.join(file.name for file in found)}; name one of the files"
        )
    # With "legacy": false, T5's tokenizer treats the space after a sentinel differently.
    check_class(path, settings, T5 if settings.get("legacy", True) else ())
    whole = read_file(found[0], settings)
    # A loaded T5 tokenizer has its sentinels, and is saved as a self-contained tokenizer.json.
    told = ("tokenizer_class", "extra_ids", "legacy") if T5[0] in str(settings) else ()
    return whole, {name: value for name, value in settings.items() if name not in told}


def sentencepiece_model(path: Path, settings: Mapping[str, Value]) -> SentencePieces:
    """Returns the tokenizer of a SentencePiece model, with sentinels if it is a T5 model.

    T5's `spiece.model` begins with <pad>, </s> and <unk> and lacks the sentinels. The reference
    appends them to the pieces: 100 of them, unless the setting `extra_ids` differs (Raffel et al.
    2020).
    """
    pieces = read_model(path)
    by_name = path.name.lower() == MODEL and pieces.tokens[:3] == T5_FIRST
    complete = any(
        "<extra_id_" in token for token in pieces.tokens
    )  # mT5's own are "▁<extra_id_0>"
    if complete or not (by_name or T5[0] in str(settings.get("tokenizer_class"))):
        return pieces
    count = settings.get("extra_ids", SENTINELS)
    whole = count if type(count) is int else str(count)
    in_range(f"{path.parent}/tokenizer_config.json: extra_ids", whole, least=0, most=10_000)
    return with_sentinels(pieces, count)


def read_text(path: Path) -> str:
    """Returns a file's text unchanged, but without a byte order mark.

    Raises UserError if it cannot be read or is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        problem = f"is not UTF-8 (byte 0x{error.object[error.start]:02x})"
        fix = "fetch it again, or convert it, for example with iconv -t UTF-8"
        raise UserError(f"{path} line {line}: {problem}; {fix}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct the file") from None


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a file, one token per line; line numbers are token ids.

    Only the character that ends every line is a line break, so a carriage return in a file with
    line feeds is a token or part of one. Raises UserError like `read_text`.
    """
    text = read_text(path)
    if "\n" not in text:
        return text.removesuffix("\r").split("\r")
    if text.count("\r\n") == text.count("\n"):
        return text.removesuffix("\r\n").split("\r\n")
    lines = text.removesuffix("\n").split("\n")
    return [line if line == "\r" else line.removesuffix("\r") for line in lines]


def read_file(path: Path, settings: Mapping[str, Value] | None = None) -> Pieces | SentencePieces:
    """Returns the tokenizer in a single file, whose name determines the format."""
    if path.name == "sentencepiece.bpe.model":
        raise UserError(
            f"{path}: XLM-R and related models renumber these pieces; "
            "add their tokenizer.json, which has the new numbers"
        )
    ending = path.suffix.lower()
    if ending == ".model":
        return sentencepiece_model(path, settings or {})
    if ending == ".txt":
        return Pieces(wordpiece(path, {}))
    if ending == ".json":
        return Pieces(read_tokenizer_json(path))
    if ending == tiktokens.SUFFIX:
        return Pieces(tiktokens.read(path, settings or {}))
    raise UserError(
        f"{path}: is not a tokenizer; name one of these files, or a folder that has one: "
        f"{LOOKED_FOR}"
    )


def read_json(path: Path) -> Settings:
    """Returns a JSON object, empty if there is no such file.

    Raises UserError if it is malformed.
    """
    try:
        values = json.loads(read_text(path), object_pairs_hook=unique) if path.exists() else {}
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; fetch it again")
    return values


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a tokenizer.json. Raises UserError if it is malformed."""
    try:
        return tokenizers.Tokenizer.from_str(read_text(path))
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(
            f"{path}: is not a tokenizer.json that the tokenizers library reads ({error}); "
            "fetch it again"
        ) from error


def check_class(path: Path, settings: Settings, known: Sequence[str]) -> None:
    """Raises UserError if the settings name a tokenizer class that the vocabulary files do not
    fully describe."""
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if name and name not in known:
        raise UserError(
            f"{path}: a {name} splits text in its own way; add the tokenizer.json that its "
            "save_pretrained writes"
        )


def with_settings(tokenizer: tokenizers.Tokenizer, settings: Settings) -> tokenizers.Tokenizer:
    """Lets settings of BERT's normalization override those of tokenizer.json, as in the
    reference."""
    normalizer = tokenizer.normalizer
    names = {
        "do_lower_case": "lowercase",
        "strip_accents": "strip_accents",
        "tokenize_chinese_chars": "handle_chinese_chars",
    }
    if isinstance(normalizer, normalizers.BertNormalizer):
        for name, attribute in names.items():
            if name in settings:
                setattr(normalizer, attribute, settings[name])
        tokenizer.normalizer = normalizer
    return tokenizer


def wordpiece(path: Path, settings: Settings) -> tokenizers.Tokenizer:
    """Returns BERT's tokenizer over a vocabulary file. Raises UserError if that lacks [UNK].

    Without the setting `do_lower_case`, it lowercases unless more than one token in a hundred has a
    capital letter.
    """
    tokens = read_lines(path)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    if "[UNK]" not in vocabulary:
        raise UserError(
            f"{path}: has no [UNK] among its {len(tokens)} tokens; use a WordPiece vocabulary, one "
            "token per line"
        )
    capitals = sum(token != token.lower() for token in tokens if not token.startswith("["))
    return bert(
        vocabulary,
        lowercase=settings.get("do_lower_case", capitals <= 0.01 * len(tokens)),
        strip_accents=settings.get("strip_accents"),
        chinese=settings.get("tokenize_chinese_chars", True),
    )


def bert(
    vocabulary: Mapping[str, int],
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese: bool = True,
) -> tokenizers.Tokenizer:
    """Returns BERT's tokenizer over a vocabulary (google-research/bert, tokenization.py)."""
    tokenizer = tokenizers.Tokenizer(
        models.WordPiece(dict(vocabulary), unk_token="[UNK]", max_input_chars_per_word=100)
    )
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=chinese,
        strip_accents=strip_accents,
        lowercase=lowercase,
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens([names[0] for names in ROLES.values() if names[0] in vocabulary])
    if {"[CLS]", "[SEP]"} <= set(vocabulary):
        tokenizer.post_processor = bert_template(vocabulary["[CLS]"], vocabulary["[SEP]"])
    return tokenizer


def byte_level(path: Path, settings: Settings) -> tokenizers.Tokenizer:
    """Returns the tokenizer of RoBERTa, or of GPT-2 if there is no <s>, over vocab.json and
    merges.txt."""
    vocabulary, lines = read_json(path), read_lines(path.with_name("merges.txt"))
    try:
        pairs = [line.split(" ") for line in lines if line and line[:8] != "#version"]
        merges = [(first, second) for first, second in pairs]
        model = models.BPE(vocabulary, merges)
    except Exception as error:  # the library raises plain Exceptions
        raise UserError(
            f"{path} and merges.txt are not a BPE vocabulary ({error}); fetch them again"
        ) from error
    return roberta(tokenizers.Tokenizer(model), bool(settings.get("add_prefix_space", False)))


def roberta(tokenizer: tokenizers.Tokenizer, prefix_space: bool = False) -> tokenizers.Tokenizer:
    """Completes a byte-level BPE to RoBERTa's tokenizer, or to GPT-2's if it has no <s>."""
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    special = [names[1] for names in ROLES.values()] + [ENDS[1]]
    # As in the reference, a mask includes the space before it, since the masked token begins with
    # that space.
    tokenizer.add_special_tokens(
        [
            AddedToken(name, lstrip=name == "<mask>", normalized=False)
            for name in special
            if name in vocabulary
        ]
    )
    if {"<s>", "</s>"} <= set(vocabulary):
        ends = ("</s>", vocabulary["</s>"]), ("<s>", vocabulary["<s>"])
        tokenizer.post_processor = processors.RobertaProcessing(
            *ends, trim_offsets=True, add_prefix_space=prefix_space
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer
