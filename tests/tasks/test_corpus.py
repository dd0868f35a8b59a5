"""Tokenized corpora: views on a token store give what one array in memory gave, and are built once."""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.processors import using
from support.sources import MemoryRecords

from fmjax.contracts import Record
from fmjax.data.kinds import encoding
from fmjax.data.kinds.encoding import Encoder, encode
from fmjax.data.records import ConcatenatedSources, Selected
from fmjax.data.sources.open import open_source
from fmjax.data.storage import token_store
from fmjax.data.stream.tolerance import Tolerance, Watched
from fmjax.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from fmjax.errors import RecordError, UserError
from fmjax.tasks import make
from fmjax.tasks.corpus import Corpus, MemoryDocuments, cut, tokenize

TEXTS = [f"The dog sleeps {number} times. 你好 " * (number % 4) for number in range(40)]
TOKENIZER = train_tokenizer(TEXTS, "wordpiece", 200)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))


def records(texts: list[str] = TEXTS) -> MemoryRecords:
    return MemoryRecords({"text": text} for text in texts)


class Unread(MemoryRecords):
    """Records whose texts may not be read again."""

    columns = ("text",)

    def __getitem__(self, index):
        raise AssertionError(f"record {index} was read")

    def fingerprint(self) -> Record:
        return records().fingerprint()


def whole(corpus: Corpus) -> list[int]:
    return corpus.read(0, corpus.size).tolist()


def reference(
    texts: list[str], before: tuple = (), after: tuple = ()
) -> tuple[list[int], list[int]]:
    """Returns the tokens and the ends of documents, as one array in memory."""
    tokens, ends = [], []
    for ids in TOKENIZER.encode_batch(texts):
        if ids.size or not (before or after):
            tokens += [*before, *ids.tolist(), *after]
            ends.append(len(tokens))
    return tokens, ends


@pytest.mark.parametrize(
    "chosen", [None, [3, 0, 7, 20, 21, 39], list(range(1, 40)), list(range(40))]
)
@pytest.mark.parametrize("around", [((), ()), ((1,), (2, 3)), ((4, 5), ())])
def test_a_view_reads_as_one_array(chosen, around):
    source, texts = records(), TEXTS
    if chosen is not None:
        source, texts = Selected(source, np.array(chosen), {}), [TEXTS[index] for index in chosen]
    corpus = tokenize(source, "text", TOKENIZER)
    assert (corpus.characters, corpus.bytes) == (
        sum(map(len, texts)),
        sum(len(text.encode()) for text in texts),
    )
    if any(around):
        corpus = corpus.enclosed(*(np.array(side, np.int32) for side in around))
    tokens, ends = reference(texts, *around)
    assert corpus.bounds.tolist() == ends and corpus.size == len(tokens)
    assert whole(corpus) == tokens and corpus.read(0, 1).dtype == np.int32
    again = pickle.loads(pickle.dumps(corpus))
    for begin in range(0, len(tokens), 3):
        for end in (begin, begin + 1, begin + 2, begin + 17, len(tokens)):
            assert again.read(begin, min(end, len(tokens))).tolist() == tokens[begin:end]


@given(
    sizes=st.lists(st.integers(0, 9), max_size=12),
    most=st.integers(1, 5),
)
def test_pieces_cover_every_document(sizes, most):
    ends = np.cumsum(np.array(sizes, np.int64))
    begins = ends - sizes
    found = cut(begins, ends, most)
    expected = [
        [at, min(at + most, end)]
        for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)
        for at in range(begin, end, most)
    ]
    assert found.tolist() == expected


def test_a_second_start_reads_no_text(tmp_path):
    corpus = tokenize(records(), "text", TOKENIZER)
    assert whole(tokenize(Unread(records()), "text", TOKENIZER)) == whole(corpus)
    assert len(list((tmp_path / "cache" / "tokens").glob("tokens-*"))) == 1


def test_pickles_hold_no_tokens():
    texts = [" ".join(["dog sleeps"] * 100)] * 1000
    examples = make({"name": "mlm"}).examples(records(texts), using(TOKENIZER), 64, train=True)
    assert examples.corpus.size == 200_000
    assert len(pickle.dumps(examples.corpus)) < 1000


def test_another_tokenizer_or_source_is_another_store(tmp_path):
    other = train_tokenizer(TEXTS[:20], "wordpiece", 100)
    changed = [*TEXTS[:-1], "A cat."]
    for texts, tokenizer in ((TEXTS, TOKENIZER), (TEXTS, other), (changed, TOKENIZER)):
        expected = np.concatenate(tokenizer.encode_batch(texts)).tolist()
        assert whole(tokenize(records(texts), "text", tokenizer)) == expected
    assert len(list((tmp_path / "cache" / "tokens").glob("tokens-*"))) == 3


def test_a_small_part_of_a_large_source_has_a_store_of_its_own(tmp_path):
    source = records()
    few, others = (Selected(source, np.arange(10 * n, 10 * n + 10), {}) for n in range(2))
    assert whole(tokenize(few, "text", TOKENIZER)) == reference(TEXTS[:10])[0]
    assert whole(tokenize(others, "text", TOKENIZER)) == reference(TEXTS[10:20])[0]
    stores = tmp_path / "cache" / "tokens"
    assert len(list(stores.glob("tokens-*"))) == 2
    tokenize(Selected(source, np.arange(20), {}), "text", TOKENIZER)  # half of it
    assert tokenize(few, "text", TOKENIZER).documents is not None
    assert len(list(stores.glob("tokens-*"))) == 3
    corpus = tokenize(
        Selected(Selected(source, np.arange(40)[::-1], {}), np.array([1, 39]), {}),
        "text",
        TOKENIZER,
    )
    assert whole(corpus) == reference([TEXTS[38], TEXTS[0]])[0]
    assert len(list(stores.glob("tokens-*"))) == 3


def test_a_part_of_a_record_is_not_read_from_the_whole(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the dog sleeps " * 20 + "你好 " * 100, encoding="utf-8")
    for part, expected in (
        ("", "the dog sleeps " * 20 + "你好 " * 100),
        ("[:300]", "the dog sleeps " * 20),
        ("[300:]", "你好 " * 100),
    ):
        corpus = tokenize(
            open_source("text", f"{path}{part}", "train", record="file"), "text", TOKENIZER
        )
        assert (whole(corpus), corpus.characters) == (reference([expected])[0], len(expected))


class Unknown(MemoryRecords):
    """Records whose fingerprint says nothing about them."""

    def fingerprint(self) -> Record:
        return {"source": "own"}


def test_tokens_of_unknown_content_are_not_taken_for_others():
    texts = TEXTS[::-1]  # as many
    for own in (TEXTS, texts):
        source = Unknown(records(own))
        assert whole(tokenize(source, "text", TOKENIZER)) == reference(own)[0]
        assert whole(tokenize(Selected(source, np.arange(1, 40), {}), "text", TOKENIZER)) == reference(own[1:])[0]


def test_parts_with_different_records_are_other_stores():
    parts = {"a": records(), "b": records(TEXTS[:5])}
    for left_out in (1, 2):  # one each, as bad records
        kept = np.delete(np.arange(45), left_out)
        source = ConcatenatedSources(parts).take(kept, {"left_out": 1})
        expected = [[*TEXTS, *TEXTS[:5]][index] for index in kept]
        assert whole(tokenize(source, "text", TOKENIZER)) == reference(expected)[0]


def test_no_text_at_all():
    with pytest.raises(UserError, match='"text" has no text in any of 2 records'):
        tokenize(records(["", " "]), "text", TOKENIZER)


BAD = [{"text": text} for text in TEXTS[:6]]
BAD[2], BAD[4] = {"text": 3}, {"text": None}


def test_the_first_bad_record_ends_the_run(tmp_path):
    with pytest.raises(RecordError, match='line 3: column "text" holds 3, not text'):
        tokenize(MemoryRecords(BAD), "text", TOKENIZER)
    assert not list((tmp_path / "cache" / "tokens").glob("*tokens-*"))


def test_bad_records_are_left_out_one_by_one(tmp_path):
    told: list[str] = []
    tolerance = Tolerance("skip:2", tell=told.append)
    with tolerance.active():
        kept, corpus = tolerance.apply(
            MemoryRecords(BAD), lambda source: tokenize(source, "text", TOKENIZER), 3
        )
    assert (
        whole(corpus) == reference([TEXTS[index] for index in (0, 1, 3, 5)])[0] and len(kept) == 4
    )
    assert [line.partition(":")[2].strip().partition(":")[0] for line in told] == [
        "left out line 3",
        "left out line 5",
    ]
    assert (
        len(list((tmp_path / "cache" / "tokens").glob("tokens-*"))) == 1
    )  # however often it was tried
    # Now they are errors.
    with pytest.raises(RecordError, match="line 3"):
        tokenize(MemoryRecords(BAD), "text", TOKENIZER)
    with pytest.raises(RecordError, match="line 5") as raised:
        tokenize(Watched(MemoryRecords(BAD), np.array([1, 3, 4])), "text", TOKENIZER)
    assert raised.value.index == 2


@pytest.mark.parametrize("on_error", ["fail", "skip:1"])
def test_bad_records_that_are_not_chosen_are_no_error(on_error):
    source = Selected(MemoryRecords(BAD), np.array([5, 3, 0, 1]), {})  # more than half: a view on all
    with Tolerance(on_error).active():
        assert whole(tokenize(source, "text", TOKENIZER)) == reference([TEXTS[index] for index in (5, 3, 0, 1)])[0]


def test_a_bad_record_of_a_view_has_its_number_there():
    source = Selected(MemoryRecords(BAD), np.array([5, 3, 4, 1]), {})
    with pytest.raises(RecordError, match="line 5") as raised:
        tokenize(source, "text", TOKENIZER)
    assert raised.value.index == 2


class Renamed(MemoryRecords):
    """The same records in another file."""

    place = "moved.jsonl line"


def test_bad_records_of_a_renamed_file_are_left_out_where_they_are_now():
    for kind, place in (MemoryRecords, "line 3"), (Renamed, "moved.jsonl line 3"):
        tolerance = Tolerance("skip:2")
        with tolerance.active():
            kept, _ = tolerance.apply(kind(BAD), lambda source: tokenize(source, "text", TOKENIZER), 3)
        assert len(kept) == 4 and tolerance.found[0].startswith(f"{place}: ")


def test_one_bad_record_too_many_ends_the_run(tmp_path):
    tolerance = Tolerance("skip:1")
    with (
        tolerance.active(),
        pytest.raises(UserError, match="line 5: .*1 bad records were already left out"),
    ):
        tolerance.apply(MemoryRecords(BAD), lambda source: tokenize(source, "text", TOKENIZER), 3)
    assert not list((tmp_path / "cache" / "tokens").glob("*tokens-*"))


CHILD = """
import sys
from fmjax.data.sources.open import open_source
from fmjax.data.tokenizers.tokenizer import load_tokenizer
from fmjax.tasks.corpus import tokenize
source, tokenizer = open_source("text", sys.argv[1], "train"), load_tokenizer(sys.argv[2])
print("begun", flush=True)
tokenize(source, "text", tokenizer)
"""


@pytest.mark.full
def test_killed_at_random_moments_the_next_start_is_whole(tmp_path):
    texts = [f"{number} {text}" for number in range(2000) for text in TEXTS[1:4]]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    TOKENIZER.save(tmp_path / "tokenizer")
    stores = tmp_path / "cache" / "tokens"
    command = [sys.executable, "-c", CHILD, str(path), str(tmp_path / "tokenizer")]
    draw = random.Random(0)
    for _ in range(20):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and child.stdout.readline()
            time.sleep(draw.uniform(0, 0.4))
            child.kill()
        for store in stores.glob("tokens-*"):  # whole, or there is none
            assert len(token_store.TokenStore(store).ends) == len(texts)
            if draw.random() < 0.5:
                shutil.rmtree(store)
    corpus = tokenize(open_source("text", str(path), "train"), "text", TOKENIZER)
    assert whole(corpus) == reference(texts)[0]
    assert not list(stores.glob(".tokens-*"))


def joined(found) -> tuple[list[int], list[int]]:
    found = list(found)
    return (
        np.concatenate([one.part.ids for one in found]).tolist(),
        np.concatenate([one.part.counts for one in found]).tolist(),
    )


def test_processes_give_what_one_gives_in_order(monkeypatch):
    monkeypatch.setattr(encoding, "CHARACTERS", 100)
    encoder = Encoder(records(), "text", TOKENIZER)
    assert joined(encode(encoder, 2)) == joined([encoder(0, 40)])


def test_what_a_process_raises_is_raised_here(monkeypatch):
    monkeypatch.setattr(encoding, "CHARACTERS", 10)
    with pytest.raises(RecordError, match='line 3: column "text" holds 3, not text'):
        list(encode(Encoder(MemoryRecords(BAD), "text", TOKENIZER), 1))


class Killer(Tokenizer):
    """Ends the process."""

    def encode_batch(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_ends_the_run():
    killer = Killer(TOKENIZER.pieces, TOKENIZER.settings)
    with pytest.raises(
        UserError, match=r"a process that tokenizes the data ended \(exit code -9\)"
    ):
        list(encode(Encoder(records(), "text", killer), 1))


def test_the_other_half_of_a_pair_is_drawn_as_before():
    texts = [" ".join(["dog sleeps"] * (1 + 7 * (number % 3))) for number in range(12)]
    examples = make({"name": "mlm", "nsp": True}).examples(
        records(texts), using(TOKENIZER), 16, train=True
    )
    for index in range(len(examples)):
        own = examples.documents == examples.documents[index]
        first, count = int(own.argmax()), int(own.sum())
        lot = int(np.random.default_rng(index).integers(len(examples) - count))
        assert examples.other(index, np.random.default_rng(index)) == (
            lot if lot < first else lot + count
        )


def test_memory_documents_are_read_as_stores_are():
    corpus = Corpus(MemoryDocuments(np.array([5, 6, 7]), np.array([2, 3])))
    assert whole(corpus) == [5, 6, 7] and corpus.pieces(5).tolist() == [[0, 2], [2, 3]]
    assert token_store.find("tokens-none", []) is None
