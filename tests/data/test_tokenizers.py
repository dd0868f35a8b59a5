"""Tokenizers: the ids of the official libraries, their layouts of special tokens, training that repeats itself."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer
from fmjax.errors import UserError

KINDS = ("wordpiece", "bpe", "unigram", "word")
TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the dogs do not care about foxes.",
    "A tokenizer cuts texts into pieces; pieces that are frequent are kept whole, others are cut again.",
    "Naïve cafés serve 日本語 and 中文 menus — Ελληνικά too; the price is $1,234.56 (approx.)!",
    "Reading, writing, and reckoning: the reader reads what the writer writes.",
] * 3
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "un", "##able", "##s", "read", ",", "cafe", "日", "##ing"]


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: train_tokenizer(TEXTS, kind, 400, min_frequency=1) for kind in KINDS}


@pytest.fixture
def bert(tmp_path) -> Tokenizer:
    (tmp_path / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n", encoding="utf-8")
    return load_tokenizer(tmp_path)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.token(int(number)) for number in tokenizer.encode_batch([text])[0]]


def test_wordpiece_of_a_vocabulary_file(bert):
    assert pieces(bert, "The Reads,\tunreadable CAFÉ日[MASK] x") == (
        ["the", "read", "##s", ",", "[UNK]", "cafe", "日", "[MASK]", "[UNK]"]
    )
    assert (bert.pad_id, bert.unk_id, bert.cls_id, bert.sep_id, bert.mask_id) == (0, 1, 2, 3, 4)
    assert bert.special_ids == {0, 1, 2, 3, 4} and bert.vocab_size == len(BERT_VOCABULARY)
    assert bert.encode_batch(["", "the"])[0].shape == (0,) and bert.encode_batch(["the"])[0].dtype == np.int32


def test_settings_beside_a_vocabulary_file(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\ncafe\ncafé\nCafé\n日\n##本\n日本\n", encoding="utf-8")

    def cut(**values) -> list[str]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
        return pieces(load_tokenizer(tmp_path), "Café 日本")

    assert cut(do_lower_case=True) == ["cafe", "日", "[UNK]"]
    assert cut(do_lower_case=True, strip_accents=False) == ["café", "日", "[UNK]"]
    assert cut(do_lower_case=False, tokenize_chinese_chars=False) == ["Café", "日本"]
    # One token of six has a capital letter: the vocabulary is cased, and says so by itself.
    assert cut() == ["Café", "日", "[UNK]"]


def test_assemble_as_bert_does(bert):
    one, two = np.array([5, 6], np.int32), np.array([9], np.int32)
    ids, types = bert.assemble(one)
    assert ids.tolist() == [2, 5, 6, 3] and types.tolist() == [0, 0, 0, 0]
    ids, types = bert.assemble(one, two)
    assert ids.tolist() == [2, 5, 6, 3, 9, 3] and types.tolist() == [0, 0, 0, 0, 1, 1]
    assert ids.dtype == types.dtype == np.int32
    assert bert.assemble(one[:0], two[:0])[0].tolist() == [2, 3, 3]
    assert (bert.special_count(), bert.special_count(pair=True)) == (2, 3)


def test_assemble_as_roberta_does(trained):
    one, two = np.array([300], np.int32), np.array([301, 302], np.int32)
    ids, types = trained["bpe"].assemble(one, two)
    assert ids.tolist() == [0, 300, 2, 2, 301, 302, 2] and not types.any()
    assert trained["bpe"].assemble(one)[0].tolist() == [0, 300, 2]
    assert (trained["bpe"].special_count(), trained["bpe"].special_count(pair=True)) == (2, 4)


def test_assemble_without_special_tokens(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.assemble(np.array([0]), np.array([1, 1]))[0].tolist() == [0, 1, 1]
    assert loaded.special_count() == loaded.special_count(pair=True) == 0
    with pytest.raises(UserError, match=r"the tokenizer has no mask token \(it has none\)"):
        _ = loaded.mask_id


def test_word_starts_of_wordpiece(bert):
    ids = bert.assemble(bert.encode_batch(["the reads, reading"])[0])[0]
    assert [bert.token(int(i)) for i in ids] == ["[CLS]", "the", "read", "##s", ",", "read", "##ing", "[SEP]"]
    assert bert.word_starts(ids).tolist() == [True, True, True, False, True, True, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_word_starts_are_where_words_start(trained, kind):
    tokenizer, text = trained[kind], "the reader reads foxes again"
    ids, offsets = tokenizer.encode_with_offsets(text)
    begins = {0} | {place + 1 for place, letter in enumerate(text) if letter == " "}
    found = {int(begin) + (text[begin] == " ") for begin, _ in offsets[tokenizer.word_starts(ids)]}
    assert found == begins


def test_line_feeds_end_words(trained):
    bpe = trained["bpe"]
    ids = bpe.encode_batch(["the\nfox"])[0]
    starts = {bpe.token(int(i)): bool(start) for i, start in zip(ids, bpe.word_starts(ids), strict=True)}
    assert starts["the"] and starts["Ċ"] and list(starts.values())[2]


def test_unmarked_words_are_refused(tmp_path):
    model = tokenizers.models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>")
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="do not show where words begin"):
        load_tokenizer(tmp_path).word_starts(np.array([0, 1]))


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_of_trained_tokenizers(trained, kind):
    tokenizer = trained[kind]
    roles = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id]
    assert roles == ([1, 3, 0, 2, 4] if kind == "bpe" else [0, 1, 2, 3, 4])
    assert tokenizer.special_ids == set(range(5))
    mask = tokenizer.token(tokenizer.mask_id)
    ids = tokenizer.encode_batch([f"the {mask} dog", f"{mask}.", "the dog"])
    assert [(row == tokenizer.mask_id).sum() for row in ids] == [1, 1, 0]
    # What stands before the mask and after it is cut as it would be without it.
    assert ids[0][ids[0] != tokenizer.mask_id].tolist() == ids[2].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_point_into_the_text(trained, kind):
    tokenizer, text = trained[kind], f"the Ελληνικά {trained[kind].token(trained[kind].mask_id)} café"
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids.tolist() == tokenizer.encode_batch([text])[0].tolist() and offsets.shape == (ids.size, 2)
    begin, end = offsets[ids == tokenizer.mask_id][0]
    assert text[begin:end].strip() == tokenizer.token(tokenizer.mask_id)
    assert offsets[:, 1].max() == len(text) and (offsets[:, 0] <= offsets[:, 1]).all()


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30))
def test_bytes_cover_every_text(trained, text):
    bpe = trained["bpe"]
    if not any(token in text for token in ("<s>", "</s>", "<pad>", "<unk>", "<mask>")):
        assert bpe.decode(bpe.encode_batch([text])[0]) == tokenizers.normalizers.Lowercase().normalize_str(text)
    unigram = trained["unigram"]
    assert unigram.unk_id not in unigram.encode_batch([text])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load_keep_everything(trained, kind, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save(tmp_path / "one")
    loaded = load_tokenizer(tmp_path / "one")
    packed = pickle.loads(pickle.dumps(tokenizer))
    for other in (loaded, packed):
        assert other.sha256 == tokenizer.sha256 and other.roles == tokenizer.roles
        assert [row.tolist() for row in other.encode_batch(TEXTS)] == [row.tolist() for row in tokenizer.encode_batch(TEXTS)]
        assert other.special_count(pair=True) == tokenizer.special_count(pair=True)
    loaded.save(tmp_path / "two")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    extra = {"wordpiece": {"vocab.txt"}, "unigram": {"spiece.model"}}.get(kind, set())
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} | extra
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_hashes_tell_tokenizers_apart(trained):
    others = [train_tokenizer(TEXTS, "wordpiece", 400, lowercase=False), train_tokenizer(TEXTS[1:2], "wordpiece", 400)]
    assert len({tokenizer.sha256 for tokenizer in [*trained.values(), *others]}) == 6


def test_the_unigram_json_agrees_with_the_model(trained, tmp_path):
    trained["unigram"].save(tmp_path)
    converted = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    texts = [*TEXTS, "the [MASK] dog", " two  spaces ", "ﬁne Ⅳ 🎉", ""]
    ids = [row.ids for row in converted.encode_batch(texts, add_special_tokens=False)]
    assert ids == [row.tolist() for row in trained["unigram"].encode_batch(texts)]


def test_settings_of_a_folder_survive_but_not_its_code(bert, tmp_path):
    bert.save(tmp_path / "in")
    given = {"tokenizer_class": "BertTokenizer", "model_max_length": 128, "auto_map": {"AutoTokenizer": ["evil.py", None]}}
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(given | {"do_lower_case": True}))
    load_tokenizer(tmp_path / "in").save(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "BertTokenizer" and saved["model_max_length"] == 128 and "auto_map" not in saved
    (tmp_path / "out" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert pieces(load_tokenizer(tmp_path / "out"), "The the") == ["[UNK]", "the"]


TRAIN = """
import sys
from fmjax.data.tokenizers import train_tokenizer
# More letters than fit, many as frequent as others: what is kept must not depend on the order of a hash table.
letters = [chr(0x3041 + i) for i in range(80)] + [chr(0xAC00 + 37 * i) for i in range(200)]
texts = ["".join(letters[(i * 7 + j * 13) % 280] for j in range(i % 9 + 1)) + " the dogs" for i in range(900)]
print(*(train_tokenizer(iter(texts), kind, 700 if kind == "unigram" else 420, min_frequency=1).sha256 for kind in sys.argv[1:]))
"""


def test_training_repeats_itself():
    command = [sys.executable, "-c", TRAIN, *KINDS]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert len(set(runs)) == 1 and len(runs[0].split()) == len(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_to_the_size(kind):
    tokenizer = train_tokenizer(TEXTS, kind, 330)
    assert 5 < tokenizer.vocab_size <= 330
    lower, cased = (train_tokenizer(TEXTS, kind, 400, lowercase=flag) for flag in (True, False))
    the, capital = (lower.encode_batch([text])[0].tolist() for text in ("the fox", "THE FOX"))
    assert the == capital
    assert cased.encode_batch(["The fox"])[0].tolist() != cased.encode_batch(["the fox"])[0].tolist()


def test_min_frequency():
    words = {kind: train_tokenizer(["often often rare"], "word", 50, min_frequency=kind) for kind in (1, 2)}
    assert pieces(words[1], "Often rare!") == ["often", "rare", "[UNK]"]
    assert pieces(words[2], "Often rare!") == ["often", "[UNK]", "[UNK]"]


def test_long_lines_train_quickly():
    """SentencePiece needs minutes for one line of this length."""
    text = " ".join(f"word{i % 97} and{i % 31}" for i in range(15_000)) + "日本語" * 2000
    assert train_tokenizer([text], "unigram", 500).encode_batch(["word96"])[0].size < 5


@pytest.mark.parametrize(
    ("texts", "kind", "size", "message"),
    [
        (TEXTS, "wordpeice", 400, r'data.tokenizer_kind="wordpeice" \(did you mean "wordpiece"\?\)'),
        (TEXTS, "bpe", 100, "a bpe vocabulary has at least 261 tokens"),
        (TEXTS, "unigram", 270, "data.vocab_size=270: SentencePiece cannot train as many tokens .*270 vs 317"),
        ([], "word", 400, "there is no text to train a tokenizer on"),
        ([" \n"], "unigram", 400, "there is no text to train a tokenizer on"),
    ],
)
def test_refused_training(texts, kind, size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, kind, size)


def test_refused_folders(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(tmp_path)
        assert "\n" not in str(caught.value)

    refused("looked for tokenizer.json, vocab.txt, vocab.json with merges.txt, or a SentencePiece")
    with pytest.raises(UserError, match="no such folder or file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    refused("spiece.model: is not a SentencePiece model")
    (tmp_path / "other.model").write_bytes(b"")
    refused("has other.model, spiece.model; name one")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    refused(r"vocab.txt: has no \[UNK\]")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    refused("a BertJapaneseTokenizer cuts texts in its own way; add the tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    refused("is not a tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    refused("tokenizer_config.json: is not a JSON object")


def test_renumbered_sentencepieces_are_refused(trained, tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(trained["unigram"].pieces.content)
    with pytest.raises(UserError, match="number these pieces anew"):
        load_tokenizer(tmp_path)


def test_a_bare_sentencepiece_model(trained, tmp_path):
    (tmp_path / "any.model").write_bytes(trained["unigram"].pieces.content)
    official = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "any.model"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.sha256 == load_tokenizer(tmp_path / "any.model").sha256 == trained["unigram"].sha256
    assert [row.tolist() for row in loaded.encode_batch(TEXTS)] == official.encode(TEXTS)


def test_what_is_no_text_or_token_is_refused(bert):
    with pytest.raises(UserError, match="half of a surrogate pair"):
        bert.encode_batch(["fine", "bad \ud83d"])
    with pytest.raises(UserError, match="token id 14 is out of range; the vocabulary has 14 tokens"):
        bert.token(14)


def test_decode(bert, trained):
    assert bert.decode(np.array([2, 9, 13, 10, 5, 4, 3])) == "[CLS] reading, the [MASK] [SEP]"
    for kind in ("bpe", "unigram"):
        assert trained[kind].decode(trained[kind].encode_batch(["the lazy dogs, again"])[0]) == "the lazy dogs, again"


SUPPORTED = [
    *("bert-base-uncased", "bert-base-cased", "bert-base-chinese", "gpt2", "roberta-base"),
    *("sentencepiece/test_model.model", "sentencepiece/test_ja_model.model", "t5_seqio_test/sentencepiece.model"),
    *("c4_t5style/tokenizer.model", "mistral-v3/tokenizer.model", "opennmt_sample/sample.sp.model"),
]


@pytest.mark.parametrize("name", SUPPORTED)
def test_ids_of_the_official_libraries(shared_data, name):
    goldens = json.loads((shared_data / "tokenizers" / "goldens.json").read_text())
    golden, texts = goldens["models"][name], goldens["texts"]
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    rows = tokenizer.encode_batch(texts)
    if "ids_with_special" in golden:
        assert [tokenizer.assemble(row)[0].tolist() for row in rows] == golden["ids_with_special"]
        return
    # RoBERTa's own tokenizer reads <s> in a text as one token, its byte-level BPE alone (the golden) does not.
    differ = [text for text, row, ids in zip(texts, rows, golden["ids_no_special"], strict=True) if row.tolist() != ids]
    assert differ == (["[MASK] [CLS] [SEP] <s> </s> <pad>"] if name == "roberta-base" else [])
    if "decoded" in golden:
        assert [tokenizer.decode(ids) for ids in golden["ids_no_special"]] == golden["decoded"]


@pytest.mark.parametrize("model_type", ["", "bert", "roberta"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_reads_what_is_saved(trained, kind, model_type, tmp_path):
    reference = pytest.importorskip("transformers", reason="the reference is not installed (tests/parity says how)")
    trained[kind].save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = reference.AutoTokenizer.from_pretrained(tmp_path)
    mask = trained[kind].token(trained[kind].mask_id)
    texts = [*TEXTS, f"the {mask} dog", "Two  spaces, ﬁne"]
    ids = trained[kind].encode_batch(texts)
    assert theirs(texts)["input_ids"] == [trained[kind].assemble(row)[0].tolist() for row in ids]
    pair = theirs(texts[0], texts[1])
    assembled, types = trained[kind].assemble(ids[0], ids[1])
    assert pair["input_ids"] == assembled.tolist()
    assert pair.get("token_type_ids", [0] * len(types)) == types.tolist()
    assert (theirs.mask_token_id, theirs.pad_token_id) == (trained[kind].mask_id, trained[kind].pad_id)
