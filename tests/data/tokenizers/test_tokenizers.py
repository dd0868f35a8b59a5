"""Tokenizers: the ids of the official libraries, their layouts of special tokens, training that repeats itself."""

from __future__ import annotations

import base64
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

from fmjax.data.tokenizers import tiktokens
from fmjax.data.tokenizers.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
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
    with pytest.raises(UserError, match="do not mark where words begin"):
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
from fmjax.data.tokenizers.tokenizer import train_tokenizer
# More letters than fit, many as frequent as others: what is kept must not depend on the order of a hash table.
letters = [chr(0x3041 + i) for i in range(80)] + [chr(0xAC00 + 37 * i) for i in range(200)]
texts = ["".join(letters[(i * 7 + j * 13) % 280] for j in range(i % 9 + 1)) + " the dogs" for i in range(900)]
print(*(train_tokenizer(iter(texts), kind, 700 if kind == "unigram" else 420, min_frequency=1).sha256 for kind in sys.argv[1:]))
"""


def test_training_repeats_itself():
    command = [sys.executable, "-c", TRAIN, *KINDS, "char", "byte"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
    assert len(set(runs)) == 1 and len(set(runs[0].split())) == len(KINDS) + 2


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


# What exact round trips are prone to lose: white space, capitals, combining marks, what is not in the basic plane.
ODD = " \tA\r\n\n  é e\u0301 日本 😀\u00a0\u200d Ġ▁ \n"


def test_characters_are_tokens():
    tokenizer = train_tokenizer([ODD, "aab"], "char", 1000)
    letters = sorted(set(ODD + "ab"))
    assert [tokenizer.token(number) for number in range(tokenizer.vocab_size)] == ["<pad>", "</s>", "<unk>", *letters]
    ids = tokenizer.encode_batch([ODD, "", "aXba", "a</s>"])
    assert [tokenizer.token(int(number)) for number in ids[0]] == list(ODD) and ids[1].size == 0
    assert [tokenizer.token(int(number)) for number in ids[2]] == ["a", "<unk>", "b", "a"]
    assert ids[3].tolist() == [letters.index("a") + 3, 1]
    assert tokenizer.decode(ids[0]) == ODD
    assert tokenizer.encode_with_offsets(ODD)[1].tolist() == [[place, place + 1] for place in range(len(ODD))]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2) and tokenizer.special_ids == {0, 1, 2}
    # Where not all fit, the frequent ones stay.
    assert [train_tokenizer(["cbbaaa"], "char", 5).token(number) for number in (3, 4)] == ["a", "b"]
    with pytest.raises(UserError, match="do not mark where words begin"):
        train_tokenizer(["ab"], "char", 9).word_starts(ids[2])


@settings(deadline=None, max_examples=50)
@given(st.text(st.sampled_from(ODD), max_size=60))
def test_characters_and_bytes_round_trip(text):
    for kind in ("char", "byte"):
        tokenizer = train_tokenizer([ODD], kind, 400)
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_bytes_have_the_ids_of_byt5():
    tokenizer = train_tokenizer(["x"], "byte", 400)
    assert tokenizer.vocab_size == 259 and (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)
    every = "".join(map(chr, range(0x20, 0xD800, 7))) + ODD + "\x00\x7f\U0010fffd"
    assert (tokenizer.encode_batch([every])[0] - 3).tolist() == list(every.encode())
    assert tokenizer.decode(tokenizer.encode_batch([every])[0]) == every


def test_what_begins_and_ends_a_document(trained, bert, tmp_path):
    def ends(tokenizer: Tokenizer) -> tuple:
        return tokenizer.opening.tolist(), tokenizer.end_id, tokenizer.fill_id

    assert ends(bert) == ([2], 3, 0)
    assert ends(trained["bpe"]) == ([0], 2, 1)
    assert ends(train_tokenizer(["ab"], "char", 9)) == ([], 1, 0)
    folder = tmp_path / "gpt"
    folder.mkdir()
    # GPT-2 has neither padding nor anything before a text.
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate([*alphabet, "<|endoftext|>"])}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert ends(load_tokenizer(folder)) == ([], 256, 0) and load_tokenizer(folder).eos_id == 256
    (folder / "tokenizer_config.json").write_text('{"eos_token": "!"}')
    assert ends(load_tokenizer(folder))[1] == alphabet.index("!")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    assert ends(load_tokenizer(folder / "tokenizer.json")) == ([], None, 0)
    with pytest.raises(UserError, match="the tokenizer has no eos token"):
        _ = load_tokenizer(folder / "tokenizer.json").eos_id


def test_long_lines_train_quickly():
    """SentencePiece needs minutes for one line of this length."""
    text = " ".join(f"word{i % 97} and{i % 31}" for i in range(15_000)) + "日本語" * 2000
    assert train_tokenizer([text], "unigram", 500).encode_batch(["word96"])[0].size < 5


@pytest.mark.parametrize(
    ("texts", "kind", "size", "message"),
    [
        (TEXTS, "wordpeice", 400, r'data.tokenizer_kind="wordpeice" \(did you mean "wordpiece"\?\)'),
        (TEXTS, "bpe", 100, "a bpe vocabulary has at least 261 tokens"),
        (TEXTS, "byte", 258, "a byte vocabulary has at least 259 tokens"),
        (TEXTS, "char", 3, "a char vocabulary has at least 4 tokens"),
        (TEXTS, "unigram", 270, "data.vocab_size=270: SentencePiece cannot train this many tokens .*270 vs 317"),
        ([], "word", 400, "the data has no text to train a tokenizer on"),
        ([" \n"], "unigram", 400, "the data has no text to train a tokenizer on"),
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

    names = "tokenizer.json, vocab.txt, vocab.json with merges.txt or source.spm"
    refused(rf"looked for {names}, a SentencePiece \*.model, or \*.tiktoken")
    with pytest.raises(UserError, match="no such folder or file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "spiece.model").write_bytes(b"not a model")
    refused("spiece.model: is not a SentencePiece model")
    (tmp_path / "other.model").write_bytes(b"")
    refused("has other.model, spiece.model; name one")
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    refused(r"vocab.txt: has no \[UNK\]")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertJapaneseTokenizer"}')
    refused("a BertJapaneseTokenizer splits text in its own way; add the tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    refused("is not a tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    refused("tokenizer_config.json: is not a JSON object")


def test_renumbered_sentencepieces_are_refused(trained, tmp_path):
    (tmp_path / "sentencepiece.bpe.model").write_bytes(trained["unigram"].pieces.content)
    with pytest.raises(UserError, match="renumber these pieces"):
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
    *("whisper/gpt2.tiktoken", "whisper/multilingual.tiktoken"),
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
    expected = golden.get("ids_no_special") or golden["ids"]
    assert len(texts) == len(rows) == len(expected) == 104
    differ = [text for text, row, ids in zip(texts, rows, expected, strict=True) if row.tolist() != ids]
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


@pytest.mark.parametrize("model_type", ["", "gpt2"])
@pytest.mark.parametrize("kind", ["char", "byte"])
def test_the_reference_reads_characters_and_bytes(kind, model_type, tmp_path):
    reference = pytest.importorskip("transformers", reason="the reference is not installed (tests/parity says how)")
    tokenizer = train_tokenizer([ODD, "plain , text . It 's"], kind, 400)
    tokenizer.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = reference.AutoTokenizer.from_pretrained(tmp_path)
    texts = [ODD, ODD[::-1], "plain , text . It 's", "a</s>b", "unknown: ß"]
    rows = [row.tolist() for row in tokenizer.encode_batch(texts)]
    assert theirs(texts)["input_ids"] == rows
    assert [theirs.decode(row) for row in rows] == [tokenizer.decode(row) for row in rows]
    assert theirs.decode(rows[2]) == texts[2]
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)


@pytest.mark.full
@pytest.mark.parametrize("name", SUPPORTED)
def test_the_reference_reads_what_is_exported(shared_data, name, tmp_path):
    """Vocabulary files in, Hugging Face's layout out: the reference gives the golden ids."""
    reference = pytest.importorskip("transformers", reason="the reference is not installed (tests/parity says how)")
    goldens = json.loads((shared_data / "tokenizers" / "goldens.json").read_text())
    golden, texts = goldens["models"][name], goldens["texts"]
    tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
    tokenizer.save(tmp_path)
    theirs = reference.AutoTokenizer.from_pretrained(tmp_path)
    ours = [tokenizer.assemble(row)[0].tolist() for row in tokenizer.encode_batch(texts)]
    differ = [text for text, one, two in zip(texts, theirs(texts)["input_ids"], ours, strict=True) if one != two]
    # The reference reads <s> in a text as one token, the sentencepiece library (the golden) does not.
    assert differ == (["[MASK] [CLS] [SEP] <s> </s> <pad>"] if name.endswith(".model") else [])
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256
    if "ids_with_special" in golden:
        assert theirs(texts)["input_ids"] == golden["ids_with_special"]


def tiktoken_file(folder, *tokens: bytes):
    ranks = [bytes([byte]) for byte in range(256)] + list(tokens)
    path = folder / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))
    return path


def test_a_tiktoken_file_merges_by_rank(tmp_path):
    path = tiktoken_file(tmp_path, b"in", b" r", b"ing", "é".encode(), b" ring")
    with pytest.raises(UserError, match="261 tokens; how text is split into words is known only for 50256, 50257, 100256 tokens"):
        load_tokenizer(path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pattern": tiktokens.GPT2}))
    tokenizer = load_tokenizer(tmp_path)
    text = "a ring<|endoftext|>é in"
    assert tokenizer.encode_batch([text])[0].tolist() == [ord("a"), 260, 261, 259, ord(" "), 256]
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
    assert (tokenizer.end_id, tokenizer.vocab_size) == (261, 262)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").sha256 == tokenizer.sha256


def test_damaged_tiktoken_files_are_refused(tmp_path):
    def refused(content: bytes, message: str) -> None:
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_tokenizer(path)

    path = tiktoken_file(tmp_path, b"in")
    whole = path.read_bytes()
    refused(whole + b"???? 257\n", 'line 258: is not "base64 rank"')
    refused(whole + b"IGE= 300\n", "its ranks are not 0 to 257, each once")
    refused(b"".join(whole.splitlines(keepends=True)[:200]), "some bytes have no token")
    refused(tiktoken_file(tmp_path, b"abc").read_bytes(), "no merge makes the token b'abc' of rank 256")
