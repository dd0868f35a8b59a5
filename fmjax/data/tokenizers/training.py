"""Trains tokenizers on texts.

The same texts give the same tokenizer, regardless of the order of threads.
"""

from __future__ import annotations

import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from fmjax.contracts import Value
from fmjax.data.tokenizers.reading import ROLES, Pieces, bert, roberta
from fmjax.data.tokenizers.sentencepieces import SentencePieces, bert_template, sentinel
from fmjax.errors import UserError, one_of

BERT_SPECIAL = [names[0] for names in ROLES.values()]  # ids 0 to 4
ROBERTA_SPECIAL = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    AddedToken("<mask>", lstrip=True, normalized=False),
]
T5_SPECIAL = ["<pad>", "</s>", "<unk>"]
SENTINELS = 100
BYTES = 256
# In characters; SentencePiece's time grows with the square of a sentence's length.
CHUNK = 2000
THREADS = 16  # of SentencePiece: sums of floats, and therefore the model, depend on this number


def train(
    texts: Iterable[str], kind: str, vocab_size: int, lowercase: bool, min_frequency: int
) -> Pieces | SentencePieces:
    """Returns a tokenizer of a kind, of at most `vocab_size` tokens.

    Raises UserError if training is impossible.
    """
    one_of("data.tokenizer_kind", kind, KINDS)
    special = T5_SPECIAL if kind in ("t5", "char", "byte") else BERT_SPECIAL
    least = (
        len(special)
        + (BYTES if kind in ("bpe", "unigram", "t5", "byte") else 1)
        + (SENTINELS if kind == "t5" else 0)
    )
    if vocab_size < least:
        raise UserError(
            f"data.vocab_size={vocab_size}: a {kind} vocabulary has at least {least} tokens; "
            "raise it"
        )
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError(
            "the data has no text to train a tokenizer on; add text, or name a tokenizer in "
            "data.tokenizer"
        )
    return KINDS[kind](texts, vocab_size, lowercase, min_frequency)


def wordpiece(texts: list[str], size: int, lowercase: bool, min_frequency: int) -> Pieces:
    """Trains BERT's WordPiece by merging pairs, as the tokenizers library does.

    The library numbers the letters within words in an order that changes from run to run, and
    breaks ties between pairs by these numbers. So a first run finds the letters, and a second run
    gets them in order.
    """
    shell = bert({"[UNK]": 0}, lowercase)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(shell.normalizer.normalize_str(text))
    letters = sorted(
        (letter for letter in counts if not letter.isspace()),
        key=lambda letter: (-counts[letter], letter),
    )
    letters = letters[: max(1, size // 2)]

    def pieces(special: list[str], limit: int) -> dict[str, int]:
        trainer = trainers.WordPieceTrainer(
            vocab_size=limit,
            min_frequency=min_frequency,
            initial_alphabet=letters,
            limit_alphabet=len(letters),
            special_tokens=special,
            show_progress=False,
        )
        # The shell already has special tokens, whose ids training would keep.
        bare = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        bare.normalizer, bare.pre_tokenizer = shell.normalizer, shell.pre_tokenizer
        bare.train_from_iterator(texts, trainer, length=len(texts))
        return bare.get_vocab(with_added_tokens=False)

    first = sorted(pieces([], 0), key=lambda piece: (piece.startswith("##"), piece))
    return Pieces(bert(pieces(BERT_SPECIAL + first, size), lowercase))


def bpe(texts: list[str], size: int, lowercase: bool, min_frequency: int) -> Pieces:
    """Trains a byte-level BPE with RoBERTa's special tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=ROBERTA_SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return Pieces(roberta(tokenizer))


def words(texts: list[str], size: int, lowercase: bool, min_frequency: int) -> Pieces:
    """Collects the most frequent words; text is split at white space and punctuation."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel(unk_token="[UNK]"))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordLevelTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=BERT_SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = bert_template(
        BERT_SPECIAL.index("[CLS]"), BERT_SPECIAL.index("[SEP]")
    )
    return Pieces(tokenizer)


def characters(texts: list[str], size: int, lowercase: bool, min_frequency: int) -> Pieces:
    """Collects the characters that occur, or the most frequent ones if there are too many. Each
    becomes a token."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    kept = sorted(counts, key=lambda letter: (-counts[letter], letter))[: size - len(T5_SPECIAL)]
    return Pieces(unmerged(sorted(kept), decoders.Fuse()))


def single_bytes(texts: list[str], size: int, lowercase: bool, min_frequency: int) -> Pieces:
    """Returns UTF-8 bytes as tokens, with ByT5's ids (Xue et al. 2022): byte b is token b + 3."""
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    # Bytes that are not printable characters are written as the characters from U+0100 on, in
    # order.
    others = iter(sorted(letter for letter in letters if ord(letter) >= BYTES))
    tokenizer = unmerged(
        [chr(byte) if chr(byte) in letters else next(others) for byte in range(BYTES)],
        decoders.ByteLevel(),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return Pieces(tokenizer)


def unmerged(letters: list[str], decoder: decoders.Decoder) -> tokenizers.Tokenizer:
    """Returns a tokenizer with T5's special tokens whose other tokens are single characters: a BPE
    without merges."""
    vocabulary = {token: number for number, token in enumerate([*T5_SPECIAL, *letters])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens(T5_SPECIAL)
    return tokenizer


def unigram(texts: list[str], size: int, lowercase: bool, min_frequency: int) -> SentencePieces:
    """Trains SentencePiece's unigram model, with byte fallback and BERT's special tokens."""
    return sentence_pieces(
        texts,
        size,
        pad_id=0,
        unk_id=1,
        eos_id=-1,
        pad_piece="[PAD]",
        unk_piece="[UNK]",
        control_symbols=["[CLS]", "[SEP]"],
        user_defined_symbols=["[MASK]"],
        normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
    )


def t5(texts: list[str], size: int, lowercase: bool, min_frequency: int) -> SentencePieces:
    """Trains SentencePiece's unigram model, which falls back to bytes, with T5's special tokens and
    sentinels.

    All white space becomes a space. Apart from optional lowercasing, nothing else changes: the
    usual NFKC would replace Chinese punctuation by Latin.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".tsv", encoding="utf-8") as rules:
        rules.writelines(f"{ord(blank):X}\t20\n" for blank in "\t\n\r\u00a0\u3000")
        rules.flush()
        folded = (
            {"normalization_rule_name": "nmt_nfkc_cf"}
            if lowercase
            else {"normalization_rule_tsv": rules.name}
        )
        ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2}
        names = {"pad_piece": "<pad>", "eos_piece": "</s>", "unk_piece": "<unk>"}
        sentinels = [sentinel(number) for number in range(SENTINELS)]
        return sentence_pieces(
            texts, size, user_defined_symbols=sentinels, **ids, **names, **folded
        )


def sentence_pieces(texts: list[str], size: int, **special: Value) -> SentencePieces:
    """Trains SentencePiece's unigram model, which has its own criterion for rare pieces.

    Raises UserError if training fails.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            bos_id=-1,
            num_threads=THREADS,
            max_sentence_length=8 * CHUNK,
            minloglevel=2,
            **special,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).rpartition("] ")[2]
        raise UserError(
            f"data.vocab_size={size}: SentencePiece cannot train this many tokens ({reason}); "
            "change it"
        ) from error
    return SentencePieces(model.getvalue())


def sentences(texts: list[str]) -> Iterator[str]:
    """Yields the lines of texts, long ones in parts, cut at spaces if possible."""
    for text in texts:
        for line in text.splitlines():
            while len(line) > CHUNK:
                cut = line.rfind(" ", 1, CHUNK) if " " in line[1:CHUNK] else CHUNK
                yield line[:cut]
                line = line[cut:]
            if line.strip():
                yield line


# What `data.tokenizer_kind` may be, and what trains it.
KINDS: dict[str, Callable[[list[str], int, bool, int], Pieces | SentencePieces]] = {
    "wordpiece": wordpiece,
    "bpe": bpe,
    "word": words,
    "unigram": unigram,
    "t5": t5,
    "char": characters,
    "byte": single_bytes,
}
