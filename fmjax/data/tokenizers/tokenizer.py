"""Tokenizers convert texts to ids and back. They come from Hugging Face folders or SentencePiece
models, or are trained on texts.

`load_tokenizer` and `train_tokenizer` return a `Tokenizer`. The layout of special tokens is derived
from the tokenizer's own post-processor, so the same code handles BERT's `[CLS] A [SEP] B [SEP]` and
RoBERTa's `<s> A </s></s> B </s>`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from fmjax.data.tokenizers import reading, training
from fmjax.data.tokenizers.assembling import Assembled, Part, assembled
from fmjax.data.tokenizers.marian import MarianPieces
from fmjax.data.tokenizers.reading import ENDS, ROLES, Pieces, Settings
from fmjax.data.tokenizers.sentencepieces import SentencePieces
from fmjax.errors import UserError


class Tokenizer:
    """Converts texts to ids and back. Picklable; the ids depend only on `sha256`.

    `pad_id`, `unk_id`, `cls_id`, `sep_id`, `mask_id` and `eos_id` raise UserError if the vocabulary
    has no such token.
    """

    def __init__(self, pieces: Pieces | SentencePieces | MarianPieces, settings: Settings):
        self.pieces, self.settings = pieces, settings
        # Without holes in the vocabulary, which are ids without a token.
        self._ids = {token: number for number, token in enumerate(pieces.tokens) if token}
        usual = ROLES | {"eos": ENDS}
        self.roles = {
            role: name
            for role, names in usual.items()
            if (name := self._name(role, names)) in self._ids
        }
        self.special_ids = frozenset(
            {self._ids[name] for name in self.roles.values()} | pieces.special()
        )

    @functools.cached_property
    def special_mask(self) -> np.ndarray:
        """Bool [vocab_size]: which ids are special tokens."""
        return np.isin(np.arange(self.vocab_size), list(self.special_ids))

    def _name(self, role: str, usual: Sequence[str]) -> str:
        """Returns the token of a role, from the settings or by its usual names."""
        given = self.settings.get(f"{role}_token")
        given = given.get("content") if isinstance(given, dict) else given
        return given or next((name for name in usual if name in self._ids), "")

    @property
    def vocab_size(self) -> int:
        """The number of embeddings that the ids need: the highest id plus one."""
        return len(self.pieces.tokens)

    @property
    def pad_id(self) -> int:
        return self._role("pad")

    @property
    def unk_id(self) -> int:
        return self._role("unk")

    @property
    def cls_id(self) -> int:
        return self._role("cls")

    @property
    def sep_id(self) -> int:
        return self._role("sep")

    @property
    def mask_id(self) -> int:
        return self._role("mask")

    @property
    def eos_id(self) -> int:
        return self._role("eos")

    @property
    def end_id(self) -> int | None:
        """The token that ends a document: eos, or else the separator;

        None if there is neither.
        """
        name = self.roles.get("eos") or self.roles.get("sep")
        return None if name is None else self._ids[name]

    @property
    def fill_id(self) -> int:
        """The id that pads masked parts of rows: the padding token, or 0 if there is none."""
        return self._ids[self.roles["pad"]] if "pad" in self.roles else 0

    @property
    def opening(self) -> np.ndarray:
        """The special tokens, int32, that `assemble` puts before a text."""
        return self._around[0]

    @property
    def closing(self) -> np.ndarray:
        """The special tokens, int32, that `assemble` puts after a text."""
        return self._around[1]

    @functools.cached_property
    def _around(self) -> tuple[np.ndarray, np.ndarray]:
        parts = self._layout(pair=False)
        at = [part.text for part in parts].index(0)
        before, after = (
            [number for part in side for number in part.ids] for side in (parts[:at], parts[at:])
        )
        return np.array(before, np.int32), np.array(after, np.int32)

    def _role(self, role: str) -> int:
        if role not in self.roles:
            there = ", ".join(f"{role} {name}" for role, name in self.roles.items()) or "none"
            raise UserError(
                f"the tokenizer has no {role} token (it has {there}); "
                "use another, or leave data.tokenizer out"
            )
        return self._ids[self.roles[role]]

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of the content, independent of its location."""
        return hashlib.sha256(
            self.pieces.content + json.dumps(self.roles, sort_keys=True).encode()
        ).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32, without surrounding special tokens. One inside it,
        such as [MASK], is one token.

        Raises UserError for a text that is not valid Unicode.
        """
        return self._encode_batch(self.pieces.encode_batch, texts)

    def encode_targets(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of target texts: like `encode_batch`, but with Marian's model of the
        target language."""
        encode = (
            self.pieces.encode_targets
            if isinstance(self.pieces, MarianPieces)
            else self.pieces.encode_batch
        )
        return self._encode_batch(encode, texts)

    def _encode_batch(
        self,
        encode: Callable[[Sequence[str]], Sequence[Sequence[int] | np.ndarray]],
        texts: Sequence[str],
    ) -> list[np.ndarray]:
        try:
            return [np.array(ids, np.int32) for ids in encode(texts)]
        except (TypeError, UnicodeEncodeError):
            for text in texts:
                if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
                    raise UserError(
                        f"{text[:60]!r} has half of a surrogate pair, which is not valid Unicode; "
                        "correct the text"
                    ) from None
            raise

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns a text's ids [N] int32, and [N, 2] int32: the begin and end of each, in
        characters of the text."""
        ids, offsets = self.pieces.encode(text)
        return np.array(ids, np.int32), np.array(offsets, np.int32).reshape(-1, 2)

    def encode_words(
        self, sentences: Sequence[Sequence[str]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns, for each text that is already split into words, the ids [N] int32 and the index
        of each word's first token [words] int64.

        Each word is encoded by itself, as after a space, and has at least one token: a word that
        becomes empty, such as a control character, is the unknown token, with a warning. Raises
        UserError if there is no such token.
        """
        unique = list(dict.fromkeys(word for words in sentences for word in words))
        encoded = dict(
            zip(
                unique,
                self.encode_batch([self._before_word + word for word in unique]),
                strict=True,
            )
        )
        lost = [word for word, ids in encoded.items() if not ids.size]
        if lost:
            unknown = np.array([self.unk_id], np.int32)
            encoded |= dict.fromkeys(lost, unknown)
            warnings.warn(
                f"{len(lost)} words, such as {lost[0]!r}, have no token; "
                "they become the unknown token",
                stacklevel=2,
            )
        rows = []
        for words in sentences:
            ids = [encoded[word] for word in words]
            begins = np.cumsum([0, *map(len, ids)], dtype=np.int64)[:-1]
            rows.append((np.concatenate([np.zeros(0, np.int32), *ids]), begins))
        return rows

    @functools.cached_property
    def _before_word(self) -> str:
        """Prefix that makes a word's first token one that begins a word: a space, unless that is
        implied."""
        opens = self.pieces.openings()
        starts = [opens[ids[0]] for ids in self.encode_batch(["a", " a"]) if ids.size]
        return " " if starts == [False, True] else ""

    def assemble(
        self, first: np.ndarray, second: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids and token types, int32, of one or two texts with the special tokens
        around them."""
        ids, types = [], []
        for part in self._layout(second is not None):
            piece = (
                np.array(part.ids, np.int32)
                if part.text is None
                else (first if part.text == 0 else second)
            )
            ids.append(piece)
            types.append(np.full(len(piece), part.type_id, np.int32))  # type: ignore[arg-type]
        return np.concatenate(ids).astype(np.int32), np.concatenate(types)  # type: ignore[arg-type]

    def assemble_batch(self, *texts: Sequence[np.ndarray], ending: Sequence[int] = ()) -> Assembled:
        """Returns the ids of many texts, or of pairs of a first and a second text, as `assemble`
        does, each followed by `ending`."""
        return assembled((*self._layout(len(texts) == 2), Part(tuple(ending), None, 0)), texts)

    def special_count(self, pair: bool = False) -> int:
        """Returns how many special tokens `assemble` adds to one text, or to two."""
        return sum(len(part.ids) for part in self._layout(pair))

    def _layout(self, pair: bool) -> tuple[Part, ...]:
        return self._layouts[pair]

    @functools.cached_property
    def _layouts(self) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        shell = self.pieces.template()
        return layout(shell, self.pieces.tokens, pair=False), layout(
            shell, self.pieces.tokens, pair=True
        )

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Returns [N] bool: true if a token begins a word, and at and after special tokens.

        White space separates words; with WordPiece, punctuation does, too. Raises UserError if the
        tokens do not mark where words begin.
        """
        opens, closes = self._bounds
        starts: np.ndarray = opens[ids]
        starts[1:] |= closes[ids[:-1]]
        starts[:1] = True
        return starts

    @functools.cached_property
    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """[vocabulary] bool each: whether a token begins a word, and whether the next one does."""
        opens, closes = self.pieces.openings(), self.pieces.closings()
        if not opens.any():
            raise UserError(
                "the tokenizer's tokens do not mark where words begin; set task.whole_word=false"
            )
        # An unknown piece is part of a word; the other special tokens are not.
        unknown = {self._ids[self.roles["unk"]]} if "unk" in self.roles else set()
        alone = np.isin(np.arange(self.vocab_size), sorted(self.special_ids - unknown))
        return opens | alone, closes | alone

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids."""
        return self.pieces.decode([int(number) for number in ids])

    def written(self, ids: np.ndarray) -> str:
        """Returns the text that a model wrote: its ordinary tokens, up to the end token."""
        ends = np.flatnonzero(ids == self.end_id) if self.end_id is not None else ids[:0]
        ids = ids[: ends[0]] if ends.size else ids
        # A model may have more embeddings than tokens; the extra ids are not text.
        ids = ids[ids < self.vocab_size]
        return self.decode(ids[~self.special_mask[ids]])

    def token(self, number: int) -> str:
        """Returns the token of an id. Raises UserError if it has none."""
        if not 0 <= number < self.vocab_size:
            raise UserError(
                f"token id {number} is out of range; the vocabulary has {self.vocab_size} tokens"
            )
        return self.pieces.tokens[number]

    def save(self, folder: str | Path) -> None:
        """Writes a folder that `load_tokenizer` and the reference's AutoTokenizer read.

        `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json`, and `vocab.txt` or
        `spiece.model`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        extra = self.pieces.save(folder)
        roles = {f"{role}_token": name for role, name in self.roles.items()}
        settings = self.settings | roles | extra
        if "tokenizer_class" not in settings:
            # Without this class, the reference would build its own tokenizer from the vocabulary;
            # with it, it returns token types only if told to.
            types = (
                ["token_type_ids"] if any(part.type_id for part in self._layout(pair=True)) else []
            )
            named = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_input_names": ["input_ids", *types, "attention_mask"],
            }
            settings = named | settings
        for name, values in (
            ("tokenizer_config.json", settings),
            ("special_tokens_map.json", roles),
        ):
            (folder / name).write_text(
                json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )


def layout(shell: tokenizers.Tokenizer, tokens: Sequence[str], pair: bool) -> tuple[Part, ...]:
    """Returns the layout of a post-processor, derived from its result for single tokens."""
    for word in ("a", "A", ".", *tokens):
        row = shell.encode(word, add_special_tokens=False)
        if row.ids:
            break
    other = shell.encode(word, add_special_tokens=False) if pair else None
    whole = shell.post_process(row, other, add_special_tokens=True)
    parts: list[Part] = []
    seen = 0  # tokens of the texts
    for number, special, type_id in zip(
        whole.ids, whole.special_tokens_mask, whole.type_ids, strict=True
    ):
        if special:
            parts.append(Part((number,), None, type_id))
            continue
        if seen % len(row.ids) == 0:
            parts.append(Part((), seen // len(row.ids), type_id))
        seen += 1
    return tuple(parts)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Returns the tokenizer in a Hugging Face folder, or in a file.

    Reads tokenizer.json; vocab.txt; vocab.json with merges.txt; a SentencePiece *.model. Raises
    UserError if there is none, or if only a tokenizer.json could describe how it splits text.
    """
    return Tokenizer(*reading.read(Path(path).expanduser()))


def train_tokenizer(
    texts: Iterable[str],
    kind: str,
    vocab_size: int,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
) -> Tokenizer:
    """Returns a tokenizer trained on texts. The result is deterministic.

    `kind` is wordpiece (BERT's), bpe (byte-level, RoBERTa's special tokens), unigram
    (SentencePiece), t5 (SentencePiece with T5's special tokens and sentinels), word (white space
    and punctuation), char (every character that occurs) or byte (ByT5's ids); the last two preserve
    case and white space. The vocabulary is smaller than `vocab_size` if the texts do not have
    enough pieces that occur `min_frequency` times. Raises UserError for an unknown kind, too small
    a vocabulary, and texts without a word.
    """
    return Tokenizer(training.train(texts, kind, vocab_size, lowercase, min_frequency), {})
