"""Word-by-word tokenization with a cache. If a tokenizer splits at white space first, the tokens of
a word do not depend on its context, so each word is tokenized once. A text then costs one
dictionary lookup per word, a fourth of the time.

BERT's tokenizer is an example: its normalizer looks at single characters, and its pre-tokenizer
splits at white space and punctuation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

MOST = 2**17  # number of cached words
# Mean characters per word above which the words of a text, such as a Chinese one, rarely recur.
LONG = 16
GROUP = 128  # words tokenized in one call


class Words:
    """Tokenizes texts with a tokenizer (tokenizers.Tokenizer), and caches words.

    `fits` tells for which tokenizers this is exact.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str):
        """
        Args:
          separator: a token that only stands for itself, to put between words.
        """
        self.tokenizer, self.separator = tokenizer, separator
        self.known: dict[str, bytes] = {}  # the ids of each word, int32

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"known": {}}  # a worker process builds its own

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32, without special tokens around it."""
        # Only these two blanks: others are rare and stay inside words, which the tokenizer splits
        # further.
        split = [text.replace("\n", " ").split(" ") for text in texts]
        by_word = [len(text) <= LONG * len(words) for text, words in zip(texts, split, strict=True)]
        # A local reference for this call, since other threads may replace the dictionary.
        known = self.known = self.known if len(self.known) < MOST else {}
        new = (
            set()
            .union(*(words for words, short in zip(split, by_word, strict=True) if short))
            .difference(known)
        )
        known.update(self.cut(list(new)))
        whole = iter(
            self.whole([text for text, short in zip(texts, by_word, strict=True) if not short])
        )
        get = known.__getitem__
        return [
            np.frombuffer(b"".join(map(get, words)), np.int32) if short else next(whole)
            for words, short in zip(split, by_word, strict=True)
        ]

    def whole(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, int32, from the tokenizer itself."""
        return [
            np.array(row.ids, np.int32)
            for row in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    def cut(self, words: Sequence[str]) -> dict[str, bytes]:
        """Returns the ids of each word. Tokenizing many at once takes less time than one by one."""
        mark = self.tokenizer.token_to_id(self.separator)
        groups = [words[begin : begin + GROUP] for begin in range(0, len(words), GROUP)]
        made: dict[str, bytes] = {}
        for group, ids in zip(
            groups, self.whole([f" {self.separator} ".join(group) for group in groups]), strict=True
        ):
            marks = np.flatnonzero(ids == mark)
            if len(marks) != len(group) - 1:  # a word contains the separator
                made.update(
                    zip(group, [alone.tobytes() for alone in self.whole(group)], strict=True)
                )
                continue
            begins, ends = [0, *(4 * marks + 4).tolist()], [*(4 * marks).tolist(), 4 * ids.size]
            row = ids.tobytes()
            made.update(
                {word: row[begin:end] for word, begin, end in zip(group, begins, ends, strict=True)}
            )
        return made


def fits(tokenizer: Tokenizer) -> str:
    """Returns a separator with which a tokenizer can work word by word;

    "" if the tokens of a word may depend on its context.
    """
    if not isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        return ""
    if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer):
        return ""
    added = tokenizer.get_added_tokens_decoder()
    # Those that span white space, or are matched after normalization.
    if any(
        token.lstrip or token.rstrip or token.normalized or len(token.content.split()) != 1
        for token in added.values()
    ):
        return ""
    model = tokenizer.model
    unknown = (
        model.unk_token
        if isinstance(model, models.BPE | models.WordPiece | models.WordLevel)
        else None
    )
    return next(
        (token.content for token in added.values() if token.special and token.content != unknown),
        "",
    )
