"""Predicting files: what is read and written, with a model that answers at once; bad lines, pipes, interruptions."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import pytest

from fmjax import contracts
from fmjax.contracts import Processors
from fmjax.errors import Interrupted, UserError
from fmjax.inference import predict
from fmjax.inference.inputs import column_names, open_inputs
from fmjax.inference.predict import predict_file
from fmjax.inference.predicting import Predictor
from fmjax.tasks.token_rows import given_texts


@dataclasses.dataclass(frozen=True)
class Shout(contracts.Task):
    """Answers a text with its capitals and its number among all."""

    @property
    def reads(self) -> Mapping[str, str]:
        return {"text": "text"}

    def inputs(self, examples: Sequence, processors: Processors, max_length: int, where: Callable[[int], str]) -> dict:
        texts = given_texts(examples, "text", where)
        for index, text in enumerate(texts):
            if len(text) > max_length:
                raise UserError(f"{where(index)}: has {len(text)} letters, more than {max_length}")
        return {"texts": texts}

    def describe(self, outputs: Mapping, batch: Mapping, processors: Processors) -> list[dict]:
        pairs = zip(batch["texts"], outputs["numbers"], strict=True)
        return [{"shout": text.upper(), "number": number} for text, number in pairs]


class Model:
    """What `load` returns: notes the chunks that it computes, and may be interrupted before one."""

    task, step = Shout(), 3

    def __init__(self):
        self.chunks: list[tuple[int, int]] = []
        self.stop_at = -1
        self.answer: Callable[[int], object] = lambda number: number

    def predictor(self, examples: Iterable, seed: int | None, settings: Mapping) -> Predictor:
        def compute(batch: Mapping, first: int) -> dict:
            if first == self.stop_at:
                raise KeyboardInterrupt
            self.chunks.append((first, len(batch["texts"])))
            return {"numbers": [self.answer(first + index) for index in range(len(batch["texts"]))]}

        return Predictor(self.task, Processors(), 20, compute)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model()
    monkeypatch.setattr(predict, "load", lambda folder: made)
    return made


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def answers(target: Path) -> list[dict]:
    return [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]


def written(folder: Path, content: str | bytes, name: str = "in.jsonl") -> Path:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder / name


BAD = {
    "not json": "is not JSON (Expecting value: line 1 column 1 (char 0)); write one JSON string or object per line",
    '{"txt": 3}': "is not text",
    '"' + "x" * 21 + '"': "has 21 letters, more than 20",
    '"\\ud800"': "has half of a surrogate pair",
    '{"text": "a", "text": "b"}': 'has the key "text" twice',
    '{"text": NaN}': "NaN is not a number",
    "[" * 100_000: "is not JSON",
    b'"the d\xf6g"': "is not UTF-8 (byte 0xf6)",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_loses_no_other(bad, model, target, tmp_path):
    line = bad if isinstance(bad, bytes) else bad.encode()
    source = written(tmp_path, b'"one"\n\n' + line + b'\n{"id": "x7", "text": "three", "more": [1]}\n')
    with pytest.raises(UserError) as caught:
        predict_file(tmp_path, source, target)
    assert BAD[bad] in str(caught.value) and f"{source} line 3: " in str(caught.value)
    assert "1 of 3 examples could not be predicted" in str(caught.value)
    first, second, third = answers(target)
    assert first == {"line": 1, "input": "one", "shout": "ONE", "number": 0}
    assert (second["line"], "shout" in second) == (3, False) and BAD[bad] in second["error"]
    assert third == {
        "line": 4, "id": "x7", "input": {"id": "x7", "text": "three", "more": [1]}, "shout": "THREE", "number": 2
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path not in (source, target)] == []


def test_order_and_places_over_chunks(model, target, tmp_path):
    lines = [f'"t{number}"' if number % 7 else "oops" if number % 5 else "" for number in range(150)]
    with pytest.raises(UserError, match=r"17 of 145 examples could not be predicted.* line 8: is not JSON"):
        predict_file(tmp_path, written(tmp_path, "\r\n".join(lines)), target)
    found = answers(target)
    assert [answer["line"] for answer in found] == [number + 1 for number, line in enumerate(lines) if line]
    for index, answer in enumerate(found):
        number = answer["line"] - 1
        assert "error" in answer if lines[number] == "oops" else answer["shout"] == f"T{number}"
        assert answer.get("number", index) == index  # bad lines shift no draws
    assert model.chunks == [(0, 32), (32, 32), (64, 32), (96, 32), (128, 17)]


def test_examples_that_do_not_fit_each_other_are_answered_one_by_one(model):
    class Alike(Shout):
        def inputs(self, examples, processors, max_length, where):
            if len({len(str(example)) for example in examples}) > 1:
                raise UserError(f"{where(1)}: is of another length")
            return super().inputs(examples, processors, max_length, where)

    predictor = dataclasses.replace(model.predictor((), None, {}), task=Alike())
    found = predictor.answers_or_errors(["a", "bb", 5, "cc"], "place {}".format, 40)
    assert [answer["shout"] for answer in found if isinstance(answer, dict)] == ["A", "BB", "CC"]
    assert [answer["number"] for answer in found if isinstance(answer, dict)] == [40, 41, 43]
    assert isinstance(found[2], UserError)


def test_nothing_is_written_where_nothing_has_an_answer(model, target, tmp_path):
    source = written(tmp_path, "5\n6\n")
    with pytest.raises(UserError, match=r"none of the 2 examples could be predicted.* line 1: is not text"):
        predict_file(tmp_path, source, target)
    assert list(tmp_path.iterdir()) == [source]


def test_answers_that_are_no_numbers_are_errors(model, target, tmp_path):
    model.answer = lambda number: [1.0, float("nan")][number]
    with pytest.raises(UserError, match=r"line 2: the answer is not a finite number"):
        predict_file(tmp_path, written(tmp_path, '"a"\n"b"\n'), target)
    assert "NaN" not in target.read_text() and answers(target)[0]["number"] == 1.0


TEXTS = ["one", "two, three", "四"]


def kind_of_file(name: str) -> bytes:
    table = pa.table({"id": [7, 8, 9], "text": TEXTS, "score": [0.5, None, float("nan")], "raw": [b"1", b"2", b"3"]})
    if name.endswith(".parquet"):
        pa.parquet.write_table(table, sink := io.BytesIO())
        return sink.getvalue()
    if name.endswith(".arrow"):
        with pa.ipc.new_stream(sink := io.BytesIO(), table.schema) as stream:
            stream.write_table(table)
        return sink.getvalue()
    texts = {
        ".txt": "".join(f"{text}\n" for text in TEXTS),
        ".csv": 'id,text\n7,one\n8,"two, three"\n9,四\n',
        ".tsv": "id\ttext\n7\tone\n8\ttwo, three\n9\t四\n",
        ".jsonl": "".join(json.dumps({"id": id, "text": text}) + "\n" for id, text in zip((7, 8, 9), TEXTS, strict=True)),
    }
    content = b"\xef\xbb\xbf" + texts[Path(name.removesuffix(".gz")).suffix].encode()
    return gzip.compress(content) if name.endswith(".gz") else content


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.arrow", "a.csv.gz", "a.txt.gz"])
def test_kinds_of_files(name, model, target, tmp_path, monkeypatch):
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    predict_file(tmp_path, written(tmp_path, kind_of_file(name), name), target)
    found = answers(target)
    assert [answer["shout"] for answer in found] == ["ONE", "TWO, THREE", "四"]
    columnar = name in ("a.parquet", "a.arrow")
    begin = 0 if columnar else 2 if "csv" in name or "tsv" in name else 1
    assert [answer["record" if columnar else "line"] for answer in found] == [begin, begin + 1, begin + 2]
    if "txt" in name:
        assert found[1]["input"] == "two, three"
    else:
        assert [str(answer["id"]) for answer in found] == ["7", "8", "9"]
        assert found[1]["input"]["text"] == "two, three"


def test_a_bad_row_of_a_table(model, target, tmp_path):
    source = written(tmp_path, "text,label\none,1\ntwo\nthree,1\n", "in.csv")
    with pytest.raises(UserError, match=r"1 of 3 examples .*in.csv line 3: has 1 fields, not the 2 of text, label"):
        predict_file(tmp_path, source, target)
    assert [answer.get("shout") for answer in answers(target)] == ["ONE", None, "THREE"]


def test_the_column_may_have_another_name(model, target, tmp_path):
    table = written(tmp_path, "review,label\none,1\n", "in.csv")
    with pytest.raises(UserError, match=r'no column "text"; it has review, label; name the one to read with --column'):
        predict_file(tmp_path, table, target)
    with pytest.raises(UserError, match=r'no column "revue" \(did you mean "review"\?\)'):
        predict_file(tmp_path, table, target, column="revue")
    predict_file(tmp_path, table, target, column="review")
    assert answers(target) == [{"line": 2, "input": {"review": "one", "label": "1"}, "shout": "ONE", "number": 0}]
    lines = written(tmp_path, '{"review": "one"}\n"two"\n{"text": "three"}\n')
    with pytest.raises(UserError, match=r'1 of 3 .* line 3: lacks "review"; it has text'):
        predict_file(tmp_path, lines, tmp_path / "other.jsonl", column="text=review")
    assert [answer.get("shout") for answer in answers(tmp_path / "other.jsonl")] == ["ONE", "TWO", None]


def test_a_table_without_a_header(model, target, tmp_path):
    source = written(tmp_path, "one\t1\ntwo\t0\n", "in.tsv")
    with pytest.raises(UserError, match="it has one, 1; .* or, if the file has no header, all of them with --header"):
        predict_file(tmp_path, source, target)
    predict_file(tmp_path, source, target, header=("text", "label"))
    assert [(answer["line"], answer["shout"]) for answer in answers(target)] == [(1, "ONE"), (2, "TWO")]
    with pytest.raises(UserError, match="--header=text: applies to csv and tsv, not to jsonl"):
        open_inputs(written(tmp_path, '"a"\n'), header=("text",))


def test_names_of_several_columns():
    both = ("question", "context")
    assert column_names("context=passage, question=q", both) == {"question": "q", "context": "passage"}
    with pytest.raises(UserError, match="reads question and context; write --column question=NAME,context=NAME"):
        column_names("q", both)
    for wrong in ("answer=a", "question=", "=q"):
        with pytest.raises(UserError, match="is not an input of the model, which reads question, context"):
            column_names(wrong, both)


def test_an_output_is_never_overwritten(model, target, tmp_path):
    source = written(tmp_path, '"a"\n')
    target.write_text("mine")
    with pytest.raises(UserError, match="already exists; name another file, or delete it"):
        predict_file(tmp_path, source, target)
    assert target.read_text() == "mine"
    with pytest.raises(UserError, match="is a folder; name a file in it"):
        predict_file(tmp_path, source, tmp_path)


def test_an_interrupted_prediction_is_continued(model, target, tmp_path):
    source = written(tmp_path, "".join(f'"t{number}"\n' if number != 3 else "oops\n" for number in range(100)))
    with pytest.raises(UserError):
        predict_file(tmp_path, source, target, settings={"top_k": 3})
    whole = target.read_bytes()
    target.unlink()

    model.stop_at = 64
    with pytest.raises(Interrupted, match=r"64 of 100 examples are answered; .*out.jsonl.partial has them"):
        predict_file(tmp_path, source, target, settings={"top_k": 3})
    assert not target.exists()
    partial = tmp_path / "out.jsonl.partial"
    assert len(answers(partial)) == 64
    model.stop_at, model.chunks = -1, []
    for changed in ({"settings": {"top_k": 4}}, {"seed": 2, "settings": {"top_k": 3}}):
        with pytest.raises(UserError, match="interrupted prediction whose settings differ; run that command again"):
            predict_file(tmp_path, source, target, **changed)
    with partial.open("ab") as file:
        file.write(b'{"line": 65, "inp')  # as a kill leaves it
    with pytest.raises(UserError, match="1 of 100"):
        predict_file(tmp_path, source, target, settings={"top_k": 3})
    assert target.read_bytes() == whole
    assert model.chunks == [(64, 32), (96, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_from_and_to_pipes(model, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"one\ntwo\n")))
    predict_file(tmp_path, Path("-"), Path("-"), kind="text")
    out, said = capfdbinary.readouterr()
    assert [json.loads(line)["shout"] for line in out.splitlines()] == ["ONE", "TWO"]
    assert said == b"2 predictions written to standard output\n"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"--input=.*none.jsonl: cannot be read \(No such file or directory\)"):
        open_inputs(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"has no examples; write one per line"):
        open_inputs(written(tmp_path, "\n \n"))
    with pytest.raises(UserError, match='--source="cvs" .did you mean "csv"'):
        open_inputs(written(tmp_path, "a\n"), "cvs")


def test_a_file_of_an_unknown_extension_has_json_lines(tmp_path):
    for name in ("prompts", "prompts.json"):
        found = open_inputs(written(tmp_path, '"a"\n"b"', name))
        assert [found[index].value for index in range(len(found))] == ["a", "b"]


def test_byte_order_marks_and_line_breaks_of_the_input(tmp_path):
    for line_break in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "in.jsonl").write_bytes(line_break.join([b'\xef\xbb\xbf{"text": "a"}', b"", b'"b"']))
        found = open_inputs(tmp_path / "in.jsonl")
        assert [found[index].value for index in range(len(found))] == [{"text": "a"}, "b"] and found[1].place == {"line": 3}
