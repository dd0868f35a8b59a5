"""Files of tokenizers as they come: byte order marks, line breaks, holes in the ids, bytes that are not UTF-8, T5's model."""

from __future__ import annotations

import json
import shutil

import pytest
import sentencepiece
import tokenizers

from fmjax.config import json_files
from fmjax.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from fmjax.errors import UserError

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
BOM = b"\xef\xbb\xbf"


def test_a_hole_in_the_ids_is_no_token(tmp_path):
    """Else the hole, whose name would be empty, were the token of every role that the vocabulary lacks."""
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 2, "<unk>": 4}, unk_token="<unk>"))
    made.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.vocab_size == 5 and loaded.roles == {"unk": "<unk>"} and loaded.special_ids == {4}
    assert loaded.end_id is None and loaded.token(1) == ""
    for role in ("pad_id", "mask_id", "eos_id", "cls_id"):
        with pytest.raises(UserError, match=rf"no {role[:-3]} token \(it has unk <unk>\)"):
            getattr(loaded, role)


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r"])
def test_byte_order_marks_and_line_breaks_of_a_vocabulary(tmp_path, line_break):
    path = tmp_path / "VOCAB.TXT"
    path.write_bytes(BOM + line_break.join([*SPECIAL, "the", "cat", ""]).encode())
    loaded = load_tokenizer(path)
    assert (loaded.vocab_size, loaded.pad_id, loaded.mask_id) == (7, 0, 4)
    assert loaded.encode_batch(["the cat"])[0].tolist() == [5, 6]


@pytest.mark.parametrize("token", ["\r", "a\rb", "\u2028", "\x85", "\x1d"])
def test_what_is_no_line_break_shifts_no_id(tmp_path, token):
    (tmp_path / "vocab.txt").write_bytes("\n".join([*SPECIAL, token, "the", "cat\r"]).encode())
    assert load_tokenizer(tmp_path).encode_batch(["the cat"])[0].tolist() == [6, 7]


def test_a_vocabulary_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\n".join([*SPECIAL, "café"]).encode("latin-1"))
    with pytest.raises(UserError, match=r"vocab.txt line 6: is not UTF-8 \(byte 0xe9\); fetch it again, or convert it") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_byte_order_marks_of_every_file(tmp_path):
    texts = ["the cat sat on the mat"] * 9
    train_tokenizer(texts, "bpe", 280).save(tmp_path / "json")
    whole = json.loads((tmp_path / "json" / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "vocab.json").write_bytes(BOM + json.dumps(whole["model"]["vocab"]).encode())
    merges = "\r\n".join(["#version: 0.2", *(" ".join(pair) for pair in whole["model"]["merges"]), ""])
    (tmp_path / "files" / "merges.txt").write_bytes(BOM + merges.encode())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "json" / name
        path.write_bytes(BOM + path.read_bytes())
    one, other = load_tokenizer(tmp_path / "json"), load_tokenizer(tmp_path / "files")
    assert one.encode_batch(texts[:1])[0].tolist() == other.encode_batch(texts[:1])[0].tolist()
    assert one.roles == other.roles


def test_byte_order_marks_of_json_files(tmp_path):
    (tmp_path / "config.json").write_bytes(BOM + b'{"model_type": "bert"}')
    assert json_files.read_json(tmp_path / "config.json") == {"model_type": "bert"}


@pytest.mark.parametrize("name", ["gpt2", "roberta-base"])
def test_merges_are_read_as_the_library_reads_them(shared_data, name):
    folder = shared_data / "tokenizers" / name
    own = load_tokenizer(folder).pieces.tokenizer.model
    theirs = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    for word in ("Ġunbelievable", "ĠðŁĻĤ", "Ġ1234", "naÃ¯ve"):
        assert [token.id for token in own.tokenize(word)] == [token.id for token in theirs.tokenize(word)]


def seqio(shared_data) -> str:
    return shared_data / "tokenizers" / "t5_seqio_test" / "sentencepiece.model"


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}])
def test_the_model_of_t5_alone_has_sentinels_and_an_end(shared_data, tmp_path, settings):
    shutil.copy(seqio(shared_data), tmp_path / "spiece.model")
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode_batch(["this is a test"])[0].tolist() == [11, 8, 6, 3, 8, 6, 3, 5, 10]  # seqio's own test
    # As the reference numbers them: the first has the last id.
    assert loaded.vocab_size == 126 and loaded.token(125) == "<extra_id_0>" and loaded.token(26) == "<extra_id_99>"
    assert loaded.assemble(loaded.encode_batch(["a <extra_id_0>"])[0])[0].tolist()[-2:] == [125, 1]
    assert loaded.eos_id == 1 and {26, 125, 0, 1} <= loaded.special_ids
    loaded.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.vocab_size == 126 and again.sha256 == loaded.sha256 and "extra_ids" not in again.settings
    assert load_tokenizer(tmp_path / "spiece.model").vocab_size == 126


def test_other_models_get_no_sentinels(shared_data, tmp_path):
    assert load_tokenizer(seqio(shared_data)).vocab_size == 26  # not T5's name
    (tmp_path / "spiece.model").write_bytes(train_tokenizer(["the cat sat"] * 9, "unigram", 300).pieces.proto)
    size = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model")).get_piece_size()
    assert load_tokenizer(tmp_path).vocab_size == size
    shutil.copy(seqio(shared_data), tmp_path / "spiece.model")
    for settings, message in (({"legacy": False}, "splits text in its own way"), ({"extra_ids": -1}, "extra_ids=-1: must be")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"} | settings))
        with pytest.raises(UserError, match=message):
            load_tokenizer(tmp_path)
