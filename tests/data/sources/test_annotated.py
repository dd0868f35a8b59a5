"""Sources with annotations: SQuAD's and CoNLL's files, those made of the embedded corpus, and holding out by groups."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from support import corpus

from fmjax.data.sources.open import hold_out, open_source
from fmjax.data.sources.python_names import tagged
from fmjax.data.sources.python_questions import question
from fmjax.errors import UserError

NUMBERED = {"context": "x", "qas": [{"id": 1, "question": "", "answers": []}]}
ARTICLE = {
    "title": "Rain",
    "paragraphs": [
        {
            "context": "Rain is wet.",
            "qas": [
                {"id": "a", "question": "What is wet?", "answers": [{"text": "Rain", "answer_start": 0}]},
                {"id": "b", "question": "Who?", "answers": [], "is_impossible": True},
            ],
        }
    ],
}


def write(folder, name: str, content: str) -> str:
    data = content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(folder / name)


def records(source) -> list:
    return [source[index] for index in range(len(source))]


@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz"])
def test_squad_files(tmp_path, name):
    source = open_source("squad", write(tmp_path, name, json.dumps({"version": "2.0", "data": [ARTICLE, ARTICLE]})), "train")
    assert len(source) == 4 and set(source.columns) == set(source[0])
    assert source[0]["answers"] == {"text": ["Rain"], "answer_start": [0]} and source[0]["title"] == "Rain"
    assert source[1]["answers"] == {"text": [], "answer_start": []} and source[1]["context"] == "Rain is wet."
    assert source.where(1) == 'question b of "Rain"'
    again = pickle.loads(pickle.dumps(source))
    assert records(again) == records(source) and again.fingerprint() == source.fingerprint()
    assert str(tmp_path) not in json.dumps(source.fingerprint())


def test_squad_files_take_no_memory_to_speak_of(tmp_path):
    """Of two files of 1 MB, a paragraph is held, and 16 bytes for each; a half of a surrogate pair stays what it is."""

    def article(number: int) -> dict:
        asked = [{"id": f"{number}-{own}", "question": f"{own}?", "answers": []} for own in range(number % 4)]
        return {"title": f"T{number}", "paragraphs": [{"context": f"{number} \ud800 " + "北" * 600, "qas": asked}]}

    files = [
        write(tmp_path, f"{begin}.json", json.dumps({"data": list(map(article, range(begin, begin + 300)))}))
        for begin in (0, 300)
    ]
    open_source("squad", files[0], "train")[0]
    tracemalloc.start()
    try:
        source = open_source("squad", ",".join(files), "train")
        opened = tracemalloc.get_traced_memory()[0]
        places = [source.where(index) for index in range(len(source))]
        read = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    names = [(number, own) for number in range(600) for own in range(number % 4)]
    assert places == [f'question {number}-{own} of "T{number}"' for number, own in names]
    assert opened < 60_000 and read - opened < 200 * len(source) and len(pickle.dumps(source)) < 20_000
    for index in (0, 700, len(source) - 1, -1, 3):
        number, own = names[index]
        assert source[index]["context"] == f"{number} \ud800 " + "北" * 600 and source[index]["question"] == f"{own}?"
    assert list(source[0]) == list(source.columns) and len(records(pickle.loads(pickle.dumps(source)))) == len(names)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'dev.json: has no "data" \\(list\\)'),
        (json.dumps({"data": [{"paragraphs": []}]}), r'data\[0\]: has no "title" \(str\)'),
        (json.dumps({"data": [ARTICLE | {"paragraphs": [{"qas": []}]}]}), r'paragraphs\[0\]: has no "context" \(str\)'),
        (json.dumps({"data": [ARTICLE | {"paragraphs": [NUMBERED]}]}), r'data\[0\], paragraphs\[0\], qas\[0\]: has no "id"'),
        (json.dumps({"data": []}), "no questions for train"),
    ],
)
def test_malformed_squad_files(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        open_source("squad", write(tmp_path, "dev.json", content), "train")
    assert "\n" not in str(caught.value)


def test_a_folder_of_squad_files_is_to_be_named(tmp_path):
    write(tmp_path, "dev.json", json.dumps({"data": [ARTICLE]}))
    with pytest.raises(UserError, match="an extension of squad files.*; name the files"):
        open_source("squad", str(tmp_path), "train")
    assert len(open_source("squad", f"{tmp_path}/*.json", "train")) == 2


def test_conll_files(tmp_path):
    content = "\ufeff-DOCSTART- -X- -X- O\r\n\r\nEU NNP B-NP B-ORG\r\nrejects VBZ B-VP O\r\n\r\n \r\n北\tB-LOC\n \tO\n，\tO"
    source = open_source("auto", write(tmp_path, "train.conll", content), "train")
    assert records(source) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["北", "", "，"], "tags": ["B-LOC", "O", "O"]},
    ]
    assert [source.where(0), source.where(1)] == ["train.conll line 3", "train.conll line 7"]
    assert source.columns == ("tokens", "tags") and source.fingerprint()["source"] == "conll"
    assert records(open_source("conll", write(tmp_path, "b.txt", "a O\n\nb O\n"), "test")) == [
        {"tokens": ["a"], "tags": ["O"]},
        {"tokens": ["b"], "tags": ["O"]},
    ]
    with pytest.raises(UserError, match="b.txt line 2: has one field, not a token and its tag"):
        open_source("conll", write(tmp_path, "b.txt", "a O\nb\n"), "test")


def test_groups_are_held_out_whole(tmp_path):
    lines = [json.dumps({"text": str(number), "title": f"t{number % 7}"}) for number in range(50)]
    source = open_source("auto", write(tmp_path, "a.jsonl", "\n".join(lines)), "train")
    rest, held = hold_out(source, 0.3, "title")
    groups = [{record["title"] for record in records(part)} for part in (rest, held)]
    assert len(groups[1]) == 2 and not groups[0] & groups[1] and groups[0] | groups[1] == {f"t{n}" for n in range(7)}
    assert sorted(int(record["text"]) for record in records(rest) + records(held)) == list(range(50))
    assert held.fingerprint()["hold_out_by"] == "title" and groups[1] == {"t2", "t4"}  # frozen: a resumed run depends on it
    with pytest.raises(UserError, match=r"data\.hold_out=0\.01 of 7 values of title leaves one side empty"):
        hold_out(source, 0.01, "title")
    with pytest.raises(UserError, match='no column "titel"'):
        hold_out(source, 0.3, "titel")


def test_names_are_tagged():
    record = tagged("Call os.path.join() or PATH_MAX, see sys.path and HTTP; my_name, A.")
    found = dict(zip(record["tokens"], record["tags"], strict=True))
    assert found["os"] == "B-CALL" and found["join"] == "I-CALL" and found["PATH_MAX"] == "B-NAME"
    assert (found["sys"], found["HTTP"], found["my_name"], found["A"]) == ("B-NAME", "B-CONSTANT", "B-NAME", "O")
    assert record["tokens"][:4] == ["Call", "os", "path", "join"] and "(" not in record["tokens"]


def test_questions_take_words_out():
    context = "One two. The quick brown fox jumps over the lazy dog today. It ran."
    record = question("file", context)
    answer, start = record["answers"]["text"][0], record["answers"]["answer_start"][0]
    assert context[start : start + len(answer)] == answer
    assert record["question"].replace("what", answer) == "The quick brown fox jumps over the lazy dog today."
    assert question("file", "Too short. It is.") is None


@pytest.fixture
def manual() -> Iterator[None]:
    with corpus.small():
        yield


@pytest.mark.parametrize("kind", ["python_names", "python_questions"])
def test_sources_of_the_embedded_corpus(manual, kind):
    train, held = (open_source(kind, None, split) for split in ("train", "validation"))
    assert len(train) > len(held) > 3 and set(train.columns) == set(train[0])
    assert train.fingerprint() != held.fingerprint() and kind in train.where(0)
    assert records(pickle.loads(pickle.dumps(train))) == records(train)
    if kind == "python_names":
        assert {tag for record in records(train) for tag in record["tags"]} >= {"O", "B-CALL", "B-NAME", "I-NAME", "B-CONSTANT"}
    else:
        assert all(r["answers"]["text"][0] in r["context"] and "what" in r["question"] for r in records(train))
    with pytest.raises(UserError, match="no split"):
        open_source(kind, None, "dev")


def test_the_real_files(shared_data):
    source = open_source("squad", str(shared_data / "qa_squad11_dev" / "dev-v1.1.rebuilt.json.gz"), "train")
    assert len(source) == 10570 and sum(len(record["answers"]["text"]) for record in records(source)) == 34726
    rest, held = hold_out(source, 0.21, "title")
    assert [len({record["title"] for record in records(part)}) for part in (rest, held)] == [38, 10]
    assert [len(rest), len(held)] == [8723, 1847] and np.array_equal(held.indices, np.sort(held.indices))
