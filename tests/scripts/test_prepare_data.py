"""Preparing a corpus: flags and errors, shards, the report; and, where datatrove is installed, the whole of it, stopped and
resumed."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support.sources import MemoryRecords

from fmjax.data.records import Selected
from fmjax.data.sources.open import open_source
from fmjax.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from fmjax.errors import UserError
from fmjax.prepare import report as reports
from fmjax.prepare.tokens import TaskTokens, place_tokens
from fmjax.tasks.corpus import Corpus, tokenize
from scripts import prepare_data

ROOT = Path(__file__).resolve().parents[2]
needs_datatrove = pytest.mark.skipif(
    importlib.util.find_spec("datatrove") is None, reason="needs datatrove: pip install -e '.[prepare]'"
)
WORDS = ["the", "of", "and", "to", "with", "that"]


def document(number: int, length: int = 120) -> str:
    """Returns a text of its own that every filter lets pass."""
    draw = random.Random(number)
    made = ["".join(draw.choice("bdfglmnprst") + draw.choice("aeiou") for _ in range(draw.randint(2, 4))) for _ in range(length)]
    made[::4] = [draw.choice(WORDS) for _ in made[::4]]
    return " ".join(made[: length // 2]) + ". " + " ".join(made[length // 2 :]) + "."


def altered(text: str) -> str:
    words = text.split()
    words[len(words) // 3] = "otherwise"
    return " ".join(words)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> tuple[Path, set[str]]:
    """Four files, and the texts that are to be left: 40, of which 6 are there twice and 6 with a word changed, and junk."""
    folder = tmp_path_factory.mktemp("raw")
    good = [document(number) for number in range(40)]
    rows: list[list[str]] = [good[place::3] for place in range(3)] + [["  ", "too short", "# # # 1 2 3", "another short one"]]
    for number in range(6):
        rows[(number + 1) % 3].append("  " + good[number].replace(" ", "\n", 1))
        rows[(number + 1) % 3].append(altered(good[20 + number]))
    rows[2].append("cheap pills to buy now " * 40)
    for number, texts in enumerate(rows):
        lines = "".join(json.dumps({"text": text, "id": place}) + "\n" for place, text in enumerate(texts))
        with gzip.open(folder / f"{number}.jsonl.gz", "wt") as stream:
            stream.write(lines)
    return folder, {" ".join(text.split()) for text in good}


def written(folder: Path) -> list[str]:
    source = open_source("auto", str(folder), "train")
    return [" ".join(source[index]["text"].split()) for index in range(len(source))]


def check_texts(found: list[str], good: set[str]) -> None:
    """Checks that each text is left once, as it was or as the one word changed."""
    changed = {altered(text): text for text in good}
    assert len(found) == len(good) and {changed.get(text, text) for text in found} == good


def dropped(report: dict) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in report["dropped"]:
        found[row["step"]] = found.get(row["step"], 0) + row["documents"]
    return found


LEFT_OUT = {"blank": 1, "gopher_repetition": 4, "exact": 6, "minhash": 6}


# Without datatrove


def test_shards_are_dealt_in_turn_and_read_back(tmp_path):
    work = tmp_path / "corpus" / "work"
    for rank in range(2):
        shards = reports.Shards(work / "parts", rank, 2, 5)
        for number in range(4 if rank == 0 else 1):
            shards.write({"text": f"文 {rank} {number}", "number": number})
        assert not list((work / "parts").glob(f"{rank:05d}.array_record"))  # no name before it is whole
        files = shards.close()
        reports.write_json(work / "tallies" / "written" / f"{rank:05d}.json", {"files": files})
    placed = reports.place_shards(work, tmp_path / "corpus")
    assert [(shard["file"], shard["records"]) for shard in placed] == [
        (f"corpus.array_record-0000{number}-of-00004", count) for number, count in enumerate([2, 1, 1, 1])
    ]
    assert reports.place_shards(work, tmp_path / "corpus") == placed  # it may have been cut off
    assert sorted(written(tmp_path / "corpus")) == ["文 0 0", "文 0 1", "文 0 2", "文 0 3", "文 1 0"]


def test_abandoned_shards_leave_nothing(tmp_path):
    shards = reports.Shards(tmp_path, 0, 1, 2)
    shards.write({"text": "a"})
    shards.abandon()
    assert not list(tmp_path.iterdir())


class Stored(MemoryRecords):
    """Records as prepared ones were before there were token stores."""

    place, first = "record", 0


def with_ids(text: str, ids: np.ndarray, sha256: str) -> dict[str, str]:
    packed = base64.b64encode(ids.astype("<i4").tobytes()).decode()
    return {"text": text, "ids": packed, "tokenizer": sha256[:16]}


def test_stored_ids_are_read_and_not_made_again():
    tokenizer, other = (train_tokenizer([document(number)], "bpe", 300) for number in (1, 2))
    texts = [document(3), "the  sea", ""]
    rows = tokenizer.encode_batch(texts)
    stored = [with_ids(text, ids, tokenizer.sha256) for text, ids in zip(texts, rows, strict=True)]
    reversed_ids = [with_ids(text, ids[::-1], tokenizer.sha256) for text, ids in zip(texts, rows, strict=True)]
    plain, read = (tokenize(Stored(records), "text", tokenizer) for records in (stored, reversed_ids))
    assert np.array_equal(plain.bounds, read.bounds) and (plain.characters, plain.bytes) == (read.characters, read.bytes)
    assert whole(plain).tolist() == np.concatenate(rows).tolist() and whole(plain).dtype == np.int32
    assert whole(read).tolist() == np.concatenate([ids[::-1] for ids in rows]).tolist()
    # Of another tokenizer they are of no use: the texts are tokenised.
    ours = whole(tokenize(Stored(reversed_ids), "text", other))
    assert ours.tolist() == np.concatenate(other.encode_batch(texts)).tolist()
    with pytest.raises(UserError, match="record 1: its ids are damaged"):
        tokenize(Stored([stored[0], stored[1] | {"ids": "?"}]), "text", tokenizer)
    with pytest.raises(UserError, match="record 1: its ids are from another tokenizer"):
        tokenize(Stored([stored[0], stored[1] | {"tokenizer": "0" * 16}]), "text", tokenizer)
    unknown = with_ids(texts[1], np.array([tokenizer.vocab_size]), tokenizer.sha256)
    with pytest.raises(UserError, match="record 1: has ids that are not in the vocabulary"):
        tokenize(Stored([stored[0], unknown]), "text", tokenizer)


def whole(corpus: Corpus) -> np.ndarray:
    return corpus.read(0, corpus.size)


def test_a_prepared_store_is_in_the_order_of_the_shards_and_found_by_training(tmp_path):
    work, output = tmp_path / "corpus" / "work", tmp_path / "corpus"
    train_tokenizer([document(1)], "bpe", 300).save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    for rank in range(2):
        shards, stored = reports.Shards(work / "parts", rank, 2, 5), TaskTokens(work, rank, str(tmp_path / "tokenizer"))
        made = [document(10 * rank + number, 20) for number in range(7 if rank == 0 else 1)]
        for text in made:
            shards.write({"text": text})
            stored.add([text])
        reports.write_json(work / "tallies" / "written" / f"{rank:05d}.json", {"files": shards.close()})
        assert stored.close() == sum(map(len, tokenizer.encode_batch(made)))
    settings = {"tokenizer": {"path": str(tmp_path / "tokenizer")}, "tasks": 2, "shards": 5}
    for _ in range(2):  # it may have been cut off
        place_tokens(work, output, settings, reports.place_shards(work, output))
    (store,) = output.glob("tokens-*")
    source = open_source("auto", str(output), "validation")
    corpus = tokenize(source, "text", tokenizer)
    assert corpus.documents.folder == store
    texts = [source[index]["text"] for index in range(len(source))]
    assert whole(corpus).tolist() == np.concatenate(tokenizer.encode_batch(texts)).tolist()
    assert corpus.characters == sum(map(len, texts))
    part = tokenize(Selected(source, np.array([6, 0, 3]), {}), "text", tokenizer)  # few, but the store is there
    assert part.documents.folder == store
    assert whole(part).tolist() == np.concatenate(tokenizer.encode_batch([texts[i] for i in (6, 0, 3)])).tolist()


def tallies(work: Path, kept: int = 3) -> None:
    for rank in range(2):
        tally = reports.Tally(work, "short")
        for number in range(3 + rank):
            tally.note("under 5 words", "tiny\ntext", f"a.txt line {rank}{number}")
        tally.end(rank)
        reports.write_json(work / "tallies" / "documents" / f"{rank:05d}.json", {"documents": 6, "characters": 100, "seconds": 1})
        last = {"documents": kept - rank, "characters": 30, "seconds": 0.5, "tokens": 7, "clusters": {}}
        reports.write_json(work / "tallies" / "written" / f"{rank:05d}.json", last)
    again = reports.Tally(work, "minhash")
    again.note("duplicate", "one two three", "b.txt line 4", cluster=8)
    again.end(0)
    last |= {"documents": 1, "clusters": {"8": {"where": "a.txt line 1", "text": "one two 3"}}}
    reports.write_json(work / "tallies" / "written" / "00001.json", last)


def test_the_report_adds_up_and_shows_examples(tmp_path):
    tallies(tmp_path)
    settings = {"tokenizer": {"path": "bert", "sha256": "0"}}
    report = reports.gather(tmp_path, settings, ["short", "minhash", "unused"])
    assert (report["read"], report["written"]) == (
        {"documents": 12, "characters": 200},
        {"documents": 4, "characters": 60},
    )
    assert [(row["step"], row["reason"], row["documents"], row["characters"]) for row in report["dropped"]] == [
        ("short", "under 5 words", 7, 63),
        ("minhash", "duplicate", 1, 13),
    ]
    examples = [row["examples"] for row in report["dropped"]]
    assert [example["where"] for example in examples[0]] == ["a.txt line 00", "a.txt line 01", "a.txt line 02"]
    assert examples[1][0]["like"] == {"where": "a.txt line 1", "text": "one two 3"}
    assert (report["tokens"], report["task_seconds"]) == (14, 3.0)
    shown = reports.table(report | {"shards": [{"file": "x", "records": 4, "bytes": 2_000_000}]})
    assert shown.splitlines() == [
        "                         documents        characters",
        "read                            12               200",
        "short: under 5 words            -7               -63",
        "  a.txt line 00: tiny text",
        "minhash: duplicate              -1               -13",
        "  b.txt line 4, like a.txt line 1: one two three",
        "written                          4                60  33.3% of the documents",
        "14 tokens of bert",
        "1 shard of ArrayRecord, 2.0 MB",
    ]


def test_a_lost_document_is_a_bug_and_not_silent(tmp_path):
    tallies(tmp_path, kept=2)
    with pytest.raises(RuntimeError, match="1 documents were neither written nor dropped"):
        reports.gather(tmp_path, {}, ["short", "minhash"])


def test_steps_of_flags():
    known = {"exact": (), "minhash": ("n_grams", "seed")}
    assert reports.parse_steps("--dedup", "exact, minhash", known) == {"exact": {}, "minhash": {}}
    assert reports.parse_steps("--dedup", '{"minhash": {"seed": 2}}', known) == {"minhash": {"seed": 2}}
    assert reports.parse_steps("--dedup", "none", known) == {}
    for text, message in {
        "minhsh": r'"minhsh" is not known \(did you mean "minhash"\?\); choose from exact, minhash, or none',
        '{"minhash": {"ngrams": 2}}': r'minhash has no "ngrams" \(did you mean "n_grams"\?\); it has n_grams, seed',
        '{"exact": {"x": 1}}': "it has no options",
        '{"exact": 1}': "not an object",
        '{"exact"': "is not JSON",
    }.items():
        with pytest.raises(UserError, match=message):
            reports.parse_steps("--dedup", text, known)


def test_a_folder_is_that_of_its_settings(tmp_path):
    settings = {"shards": 2, "files": {"a.txt": [3, 0]}}
    reports.claim(tmp_path / "new", settings)
    reports.claim(tmp_path / "new", settings)
    with pytest.raises(UserError, match=r"\(files: a.txt \[3, 0\] -> \[4, 0\]; shards: 2 -> 3\); name a new --output"):
        reports.claim(tmp_path / "new", {"shards": 3, "files": {"a.txt": [4, 0]}})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and was not written by this command"):
        reports.claim(tmp_path / "other", settings)
    with pytest.raises(UserError, match="is a file, not a folder"):
        reports.claim(tmp_path / "other" / "mine.txt", settings)


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is not None, reason="datatrove is installed")
def test_without_datatrove_the_recipe_is_told(refused, corpus, tmp_path):
    line = refused(prepare_data.main, "--input", str(corpus[0]), "--output", str(tmp_path / "out"))
    assert line.endswith("pip install -e '.[prepare]'") and "datatrove" in line and not (tmp_path / "out").exists()


# With datatrove


def prepare(*words: object) -> int:
    return prepare_data.main([str(word) for word in words])


@needs_datatrove
def test_the_whole_of_it(corpus, tmp_path, capsys):
    folder, good = corpus
    train_tokenizer(sorted(good), "bpe", 400).save(tmp_path / "tokenizer")
    out = tmp_path / "out"
    command = ("--input", f"{folder}/*.gz", "--output", out, "--workers", 1, "--tokenizer", tmp_path / "tokenizer")
    assert prepare(*command) == 0
    shown, told = capsys.readouterr()
    report = json.loads((out / "report.json").read_text())
    assert dropped(report) == LEFT_OUT and shown == reports.table(report) + "\n"
    assert len(told.splitlines()) == 8 and report["read"]["documents"] == 57
    check_texts(written(out), good)
    source = open_source("auto", str(out), "train")
    assert source.columns == ("text",)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer.encode_batch([source[index]["text"] for index in range(len(source))])
    corpus = tokenize(source, "text", tokenizer)
    assert corpus.documents.folder.parent == Path(out)
    assert whole(corpus).tolist() == np.concatenate(ids).tolist()
    assert report["tokens"] == corpus.size
    near = next(row for row in report["dropped"] if row["step"] == "minhash")
    assert len(near["examples"]) == 3
    for example in near["examples"]:
        assert example["like"]["text"][:100] == example["text"][:100] and example["like"]["where"] != example["where"]
    # Again: nothing is done, the report is told.
    assert prepare(*command) == 0 and capsys.readouterr() == (shown, "")


@needs_datatrove
def test_shards_and_no_filters(corpus, tmp_path):
    folder, _ = corpus
    out = tmp_path / "out"
    flags = ("--filters", "none", "--dedup", "exact", "--shards", 2, "--workers", 1)
    assert prepare("--input", folder, "--output", out, *flags) == 0
    report = json.loads((out / "report.json").read_text())
    assert dropped(report) == {"blank": 1, "exact": 6} and report["settings"]["tasks"] == 2
    assert len(list(out.glob("*.array_record-*-of-00002"))) == 2 and len(written(out)) == 50


DRIVER = """
import sys
from fmjax.prepare import steps
class Slow(steps.ArrayRecords):
    def run(self, data, rank=0, world_size=1):
        if rank == 2:
            print("stalled", flush=True)
            __import__("time").sleep(600)
        super().run(data, rank, world_size)
from fmjax.prepare import run
run.ArrayRecords = Slow
from scripts import prepare_data
sys.exit(prepare_data.main(sys.argv[1:]))
"""


@needs_datatrove
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "terminated"])
def test_stopped_and_resumed(corpus, tmp_path, number, capsys):
    folder, good = corpus
    out = tmp_path / "out"
    command = ["--input", str(folder), "--output", str(out), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == b"stalled\n"
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 75)
    if number == signal.SIGTERM:
        assert error.splitlines()[-1].startswith(b"interrupted: finished tasks are kept")
    done = out / "work" / "logs" / "write" / "completions"
    assert sorted(path.name for path in done.iterdir()) == ["00000", "00001"] and not (out / "report.json").exists()
    tallies = [path for path in (out / "work" / "tallies").rglob("*.json") if {"written", "blank"} & {*str(path).split("/")}]
    for path in tallies:
        os.utime(path, ns=(1, 1))
    assert prepare(*command) == 0
    assert "filter: done before" in (told := capsys.readouterr().err) and "write: 2 of 4 tasks" in told
    assert dropped(json.loads((out / "report.json").read_text())) == LEFT_OUT
    check_texts(written(out), good)
    assert tallies and all(path.stat().st_mtime_ns == 1 for path in tallies)


SBATCH = """#!/bin/bash
# A cluster of one machine, where a job is done as soon as it is submitted.
script="${@: -1}"
last="$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")"
for task in $(seq 0 "${last:-0}"); do
  env SLURM_JOB_ID=1 SLURM_ARRAY_JOB_ID=1 SLURM_ARRAY_TASK_ID="$task" SLURM_NODELIST=here bash "$script" >&2 || exit 1
done
echo "Submitted batch job 1"
"""


@needs_datatrove
@pytest.mark.full
def test_slurm_runs_the_same_pipeline(corpus, tmp_path, monkeypatch, capsys):
    folder, good = corpus
    programs = {"sbatch": SBATCH, "scontrol": "#!/bin/bash\necho here\n", "srun": '#!/bin/bash\nshift 3\nexec "$@"\n'}
    (tmp_path / "bin").mkdir()
    for name, text in programs.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    options = json.dumps({"partition": "cpu", "time": "1:00:00", "tasks_per_job": 99})
    command = ("--input", folder, "--output", tmp_path / "out", "--executor", "slurm", "--slurm", options)
    assert prepare(*command) == 0
    assert prepare(*command) == 0
    assert dropped(json.loads((tmp_path / "out" / "report.json").read_text())) == LEFT_OUT
    check_texts(written(tmp_path / "out"), good)


@needs_datatrove
@pytest.mark.full
def test_a_bad_record_met_by_a_worker_is_named(tmp_path, refused):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "fine"}\n' + '{"text": 5}\n' * (number == 2))
    line = refused(prepare_data.main, "--input", f"{tmp_path}/*.jsonl", "--output", tmp_path / "out", "--workers", 2)
    assert '2.jsonl line 2: "text" is 5, not text' in line


@needs_datatrove
def test_wrong_input_is_named(corpus, tmp_path, refused, monkeypatch):
    folder, _ = corpus
    main, out = prepare_data.main, tmp_path / "out"
    common = ("--output", out, "--workers", 1)
    assert "choose from gopher_repetition" in refused(main, "--input", folder, *common, "--filters", "gopher")
    assert 'has no "min_words"' in refused(main, "--input", folder, *common, "--filters", '{"gopher_quality": {"min_words": 5}}')
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert "sbatch was not found" in refused(main, "--input", folder, *common, "--executor", "slurm")
        patch.setattr(shutil, "which", lambda name: name)
        assert "needs the partition" in refused(main, "--input", folder, *common, "--executor", "slurm")
    assert not out.exists()
    assert 'has no "body"; it has text, id' in refused(main, "--input", folder, *common, "--column", "body")
    assert "was started with other settings or input (column:" in refused(main, "--input", folder, *common)
    for name, content, message in (
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "a.jsonl line 2: is not JSON"),
        ("b.jsonl", b'{"text": 5}\n', 'b.jsonl line 1: "text" is 5, not text'),
        ("c.txt", b"fine\n\n\xff\xfe bad", "c.txt: cannot be read"),
        ("d.txt.gz", gzip.compress(b"a text\n" * 9999)[:-20], "d.txt.gz: cannot be read"),
        ("e.txt", b"short\n\nlines", "they drop every document"),
    ):
        (tmp_path / name).write_bytes(content)
        assert message in refused(main, "--input", tmp_path / name, "--output", tmp_path / f"{name}.out", "--workers", 1)


@needs_datatrove
def test_every_kind_of_file_is_read_as_fmjax_reads_it(tmp_path):
    import pyarrow
    import pyarrow.parquet

    texts = ["a b c", "ü 中文", 'with "quotes", and\ttab']
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("\ufeffa b\n c \n\n\nsecond\r\nline\r\n\r\nlast")
    (folder / "a.csv").write_text('n,text\n1,a b c\n2,ü 中文\n3,"with ""quotes"", and\ttab"\n')
    (folder / "a.tsv").write_text("n\ttext\n1\ta b c\n2\tü 中文\n")
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": texts}), folder / "a.parquet")
    for name, flags in (("txt", ()), ("txt", ("line",)), ("txt", ("file",)), ("csv", ()), ("tsv", ()), ("parquet", ())):
        out = tmp_path / f"{name}{''.join(flags)}"
        record = ("--record", *flags) if flags else ()
        flags_ = ("--filters", "none", "--dedup", "none", "--workers", 1, *record)
        assert prepare("--input", folder / f"a.{name}", "--output", out, *flags_) == 0
        options = {"record": flags[0] if flags else "paragraph"} if name == "txt" else {}
        theirs = open_source("auto", str(folder / f"a.{name}"), "train", **options)
        ours = open_source("auto", str(out), "train")
        assert [ours[i]["text"] for i in range(len(ours))] == [theirs[i]["text"] for i in range(len(theirs))]


@needs_datatrove
def test_words_without_spaces_are_letters():
    from fmjax.prepare.steps import Words

    assert Words().word_tokenize("It's  fine, 中文字 ok") == ["It's", "fine,", "中", "文", "字", "ok"]
    assert Words().sent_tokenize("One. Two! 三。四") == ["One.", "Two!", "三。", "四"]


@needs_datatrove
def test_input_is_read_like_training_data(tmp_path):
    """Of kinds that need an index, and from afar."""
    from fmjax.prepare.run import find_input
    from fmjax.prepare.steps import Documents

    members = [(f"{number}.txt", f"text {number}") for number in range(3)]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
    root, names, kind, _ = find_input(str(tmp_path / "a.tar"), "auto", "local")
    reader = Documents(kind, root, "unused", "text", "paragraph", tmp_path)
    found = [(document.text, document.id) for document in reader.read_file(names[0])]
    assert found == [(f"text {number}", f"a.tar: {number}") for number in range(3)]
    with pytest.raises(UserError, match="--source=tfds: reads no files of texts"):
        find_input("x", "tfds", "local")
    with pytest.raises(UserError, match="--input=gs://b/x.txt: remote files are fetched into the cache of this machine"):
        find_input("gs://b/x.txt", "auto", "slurm")
