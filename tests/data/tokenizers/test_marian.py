"""Marian's tokenizers: two SentencePiece models over one vocabulary, read, used, stored and refused."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from fmjax.data.tokenizers.tokenizer import load_tokenizer
from fmjax.errors import UserError

ENGLISH = ["A little dog runs over the green grass.", "Two men are standing at the bus stop, waiting.", "The girl reads a book."]
GERMAN = [
    "Ein kleiner Hund läuft über das grüne Gras.",
    "Zwei Männer stehen an der Haltestelle und warten.",
    "Das Mädchen liest.",
]


def model(texts: list[str], size: int) -> sentencepiece.SentencePieceProcessor:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 5), model_writer=written, vocab_size=size, hard_vocab_limit=False, minloglevel=2
    )
    return sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())


def write_folder(folder: Path, **settings: object) -> Path:
    """Writes a tokenizer as opus-mt has it: ids by how often pieces occur, the padding last, languages besides."""
    models = model(ENGLISH, 80), model(GERMAN, 80)
    pieces = {m.id_to_piece(i) for m in models for i in range(m.get_piece_size())} - {"<s>", "</s>", "<unk>"}
    kept = sorted(pieces)[:-3]  # in opus-mt, some pieces of the models have no id
    tokens = ["</s>", "<unk>", *kept, ">>fra<<", ">>deu<<", "<pad>"]
    folder.mkdir(exist_ok=True)
    for name, one in zip(("source.spm", "target.spm"), models, strict=True):
        (folder / name).write_bytes(one.serialized_model_proto())
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"source_lang": "en", "target_lang": "de"} | settings))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("marian") / "tokenizer")


def test_ids_are_those_of_the_vocabulary(folder):
    tokenizer = load_tokenizer(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    source = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
    pieces = source.encode(ENGLISH[0], out_type=str)
    ids = tokenizer.encode_batch([ENGLISH[0]])[0]
    assert ids.tolist() == [vocabulary.get(piece, 1) for piece in pieces]
    assert tokenizer.assemble(ids)[0].tolist() == [*ids, 0]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (len(vocabulary) - 1, 0, 1)
    assert tokenizer.vocab_size == len(vocabulary)


def test_source_and_target_are_cut_by_their_own_models(folder):
    tokenizer = load_tokenizer(folder)
    source, target = tokenizer.encode_batch([GERMAN[1]])[0], tokenizer.encode_targets([GERMAN[1]])[0]
    assert len(target) < len(source)
    assert tokenizer.decode(target) == GERMAN[1]


def test_the_language_and_special_tokens_are_read(folder):
    tokenizer = load_tokenizer(folder)
    plain, asked, other = tokenizer.encode_batch([ENGLISH[2], f">>fra<< {ENGLISH[2]}", f">>xxx<< {ENGLISH[2]}"])
    assert tokenizer.token(int(asked[0])) == ">>fra<<" and other[0] == tokenizer.unk_id
    assert np.array_equal(asked[1:], plain) and np.array_equal(other[1:], plain)
    ids = tokenizer.encode_batch(["The girl</s> reads"])[0]
    assert tokenizer.eos_id in ids and tokenizer.decode(ids) == "The girl</s> reads"
    found, offsets = tokenizer.encode_with_offsets(">>fra<< The girl")
    assert offsets[0].tolist() == [0, 7] and offsets[-1, 1] == 16 and len(found) == len(offsets)


def test_stored_pickled_and_read_back(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.sha256 == tokenizer.sha256 == pickle.loads(pickle.dumps(tokenizer)).sha256
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "MarianTokenizer"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("target.spm", None, "target.spm"),
        ("source.spm", b"no model", "not a complete Marian tokenizer"),
        ("vocab.json", b"{", "not a complete Marian tokenizer"),
        ("vocab.json", b'{"a": 0}', "including <pad>, </s> and <unk>"),
        ("vocab.json", b'{"<pad>": "0"}', "does not map tokens to numbers"),
        ("tokenizer_config.json", b'{"separate_vocabs": true}', "separate vocabularies"),
    ],
)
def test_damaged_folders_are_refused(folder, tmp_path, name, content, named):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=named) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
