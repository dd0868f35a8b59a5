"""Tiktoken's files: byte-level BPE as a list of tokens by rank, one "base64 rank" per line
(openai/tiktoken, load.py).

The file has neither the merges, which follow from the ranks, nor the pattern that splits text into
words. The pattern is known for some numbers of tokens; otherwise "pattern" in
`tokenizer_config.json` sets it.
"""

from __future__ import annotations

import base64
import codecs
import itertools
from collections.abc import Mapping
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

from fmjax.config.numbers import whole
from fmjax.contracts import Value
from fmjax.errors import UserError, one_line

SUFFIX = ".tiktoken"
END = "<|endoftext|>"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Number of tokens in the file -> the pattern, and the id of END (openai/tiktoken, openai_public.py;
# openai/whisper).
KNOWN = {50256: (GPT2, 50256), 50257: (GPT2, 50257), 100256: (CL100K, 100257)}


def read(path: Path, settings: Mapping[str, Value]) -> tokenizers.Tokenizer:
    """Returns the tokenizer of a file.

    Raises UserError if it is malformed, or its pattern is unknown.
    """
    ranks = read_ranks(path)
    merged = merges(ranks, path)
    pattern, end = KNOWN.get(len(ranks), ("", len(ranks)))
    pattern = settings.get("pattern", pattern)
    if not pattern:
        raise UserError(
            f"{path}: has {len(ranks)} tokens; how text is split into words is known only for "
            f'{", ".join(map(str, KNOWN))} tokens; name the folder, and set "pattern" in its '
            "tokenizer_config.json to that of the tiktoken.Encoding"
        )
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {names[token]: rank for token, rank in ranks.items()} | {END: end}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, [(names[a], names[b]) for a, b in merged])
    )
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    letters_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(END, normalized=False)])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Returns the rank of each token.

    Raises UserError, naming the line, unless all tokens have one and every byte is a token.
    """
    ranks: dict[bytes, int] = {}
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            # OpenAI's multilingual file has one token without bytes, written "=".
            ranks[b"" if token == b"=" else base64.b64decode(token, validate=True)] = whole(
                rank.decode("ascii")
            )
        except ValueError as error:
            raise UserError(
                f'{path} line {number}: is not "base64 rank" ({one_line(error)}); '
                "fetch the file again"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path}: its ranks are not 0 to {len(ranks) - 1}, each once; fetch the file again"
        )
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError(
            f"{path}: some bytes have no token, so the file is truncated or of another kind; fetch "
            "it again"
        )
    return ranks


def merges(ranks: Mapping[bytes, int], path: Path) -> list[tuple[bytes, bytes]]:
    """Returns the two tokens that each longer token is merged from, by rank: the result of applying
    the earlier merges to its bytes.

    Raises UserError for a token for which the result is not two tokens.
    """
    found = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue
        parts = [token[place : place + 1] for place in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(one + two, rank) for one, two in itertools.pairwise(parts)]
            lowest = min(pairs)
            if lowest >= rank:
                raise UserError(
                    f"{path}: no merge makes the token {token!r} of rank {rank}; "
                    "fetch the file again"
                )
            place = pairs.index(lowest)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        found.append((parts[0], parts[1]))
    return found


def byte_letters() -> dict[int, str]:
    """Returns the letter for each byte in GPT-2's vocabulary (openai/gpt-2, encoder.py): the byte
    itself, if it is printable."""
    shown = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {
        byte: chr(256 + place) for place, byte in enumerate(hidden)
    }
