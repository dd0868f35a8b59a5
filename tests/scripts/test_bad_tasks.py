"""Mistakes in the data, settings and weights of other tasks than those of test_bad_input.py end in the same way: exit code 2,
one line that says what, why and how to fix, and nothing written."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmjax.data.tokenizers.tokenizer import train_tokenizer
from scripts import convert, predict, train

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
MIXTURE = """
from fmjax.defaults import experiment

def get_config(arg=""):
    config = experiment("bert", "classify", "mlm")
    config.data.source = "jsonl"
    config.data.files.train = config.data.files.free = {folder!r} + "/pairs.jsonl"
    config.train.steps = 1
    return config
"""


def png(height: int, width: int, channels: int = 3) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((height, width, channels), np.uint8).squeeze()).save(stream, "PNG")
    return stream.getvalue()


def squad(context: str = "Rain is wet.", start: int = 0, **article: object) -> bytes:
    answers = [{"text": "Rain", "answer_start": start}]
    questions = [{"id": f"q{number}", "question": "What is wet?", "answers": answers} for number in range(16)]
    return json.dumps({"data": [{"title": "Rain", "paragraphs": [{"context": context, "qas": questions}]} | article]}).encode()


def tar(name: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for member in ("cat/1.png", name):
            info = tarfile.TarInfo(member)
            info.size = len(png(8, 8))
            archive.addfile(info, io.BytesIO(png(8, 8)))
    return stream.getvalue()


def jsonl(**record: object) -> bytes:
    return (json.dumps(record) + "\n").encode() * 16


FILES = {
    "good.json": squad(),
    "title.json": squad(title=None),
    "shifted.json": squad(start=1),
    "cut.json": squad()[:-9],
    "none.json": b'{"data": []}',
    "answers.jsonl": jsonl(context="Rain", question="What?", answers="Rain"),
    "columns.jsonl": jsonl(context="Rain", question="What?"),
    "good.conll": b"EU B-ORG\nrejects O\n\n" * 16,
    "field.conll": b"EU B-ORG\nrejects\n",
    "other.conll": b"EU B-LOC\n",
    "latin.conll": b"f\xf6 O\n",
    "plain.conll": b"an X\nox Y\n\n" * 16,
    "counts.jsonl": jsonl(tokens=["a", "b"], tags=["O"]),
    "numbers.jsonl": jsonl(tokens=["a", "b"], tags=[0, 1]),
    "a.en": b"A dog.\nTwo men.\n" * 8,
    "a.de": b"Ein Hund.\nZwei.\n" * 8,
    "short.de": b"Ein Hund.\n",
    "blank.de": b"Ein Hund.\n\n" * 8,
    "long.de": b"Ein Hund. " * 99 + b"\nZwei." * 15,
    "pairs.jsonl": jsonl(text="the cat", label="a"),
    "lines.txt": b"the cat\n" * 10,
    "broken/cat/1.png": png(8, 8)[:40],
    "unlike/cat/1.png": png(8, 8),
    "unlike/cat/2.png": png(9, 8),
    "grey/cat/1.png": png(8, 8),
    "grey/cat/2.png": png(8, 8, 1),
    "flat/1.png": png(8, 8),
    "texts/cat/1.bin": b"no image",
    "outside.tar": tar("../cat/2.png"),
    "cut.tar": tar("cat/2.png")[:1300],
    "magic/train-images-idx3-ubyte": b"\0\0\x0d\x03" + bytes(12),
    "few/train-images-idx3-ubyte": struct.pack(">4I", 0x803, 2, 8, 8) + bytes(127),
}
FILES["few/train-labels-idx1-ubyte"] = FILES["magic/train-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, 2) + bytes(2)

QA, TAG, PAIRS = "bert_qa.py:tiny", "bert_tag.py:tiny", "transformer_translate.py:tiny"
TEXT, CLASSIFY, MAE = "bert_mlm.py:tiny", "vit_classify.py:tiny", "vit_mae.py:tiny"
FILE = "data.source=auto data.files.train={here}/"
SQUAD, CONLL, IMAGES = (FILE.replace("auto", kind) for kind in ("squad", "conll", "class_folders"))
LINES = FILE.replace("auto", "parallel") + "a.en,{here}/"
TRANSLATE = "task.source=en task.target=de"

# What is wrong -> the config, overrides, and what the message has to say.
CASES = {
    "no title": (QA, f"{SQUAD}title.json", ("title.json, data[0]", 'has no "title" (str)', "correct the file")),
    "answer elsewhere": (QA, f"{SQUAD}shifted.json", ('question q0 of "Rain"', '"Rain" is not at character 1')),
    "not JSON": (QA, f"{SQUAD}cut.json", ("cut.json: is not JSON", "fetch it again")),
    "no questions": (QA, f"{SQUAD}none.json", ("none.json: no questions for train",)),
    "answers of no form": (QA, f"{FILE}answers.jsonl", ("answers.jsonl line 1", "'Rain', not {\"text\": [...]")),
    "no column of answers": (QA, f"{FILE}columns.jsonl", ('no column "answers"', "context, question")),
    "no room for a context": (
        QA,
        f"{SQUAD}good.json data.max_length=5",
        ("question q0", "data.max_length=5", "task.max_question"),
    ),
    "one article held out": (QA, f"{SQUAD}good.json data.hold_out=0.5 data.hold_out_by=title", ("1 values of title",)),
    "no spans": (QA, "task.n_best=0", ("task.n_best=0", "at least 1")),
    "one field": (TAG, f"{CONLL}field.conll", ("field.conll line 2", "not a token and its tag")),
    "unknown tag": (
        TAG,
        f"{CONLL}good.conll data.files.validation={{here}}/other.conll",
        ("other.conll line 1", '"B-LOC"', "B-ORG"),
    ),
    "tags not UTF-8": (TAG, f"{CONLL}latin.conll", ("latin.conll line 1", "not UTF-8")),
    "tags not BIO": (TAG, f"{CONLL}plain.conll task.mode=strict", ("task.mode=strict", "X, Y", "choose default")),
    "fewer tags": (TAG, f"{FILE}counts.jsonl", ("counts.jsonl line 1", "2 words and 1 tags")),
    "tags without names": (TAG, f"{FILE}numbers.jsonl", ("numbers.jsonl line 1", "holds 0, not a string", "task.labels")),
    "not aligned": (PAIRS, f"{LINES}short.de {TRANSLATE}", ("16 in a.en, 1 in short.de", "same number of lines")),
    "blank counterpart": (PAIRS, f"{LINES}blank.de {TRANSLATE}", ("blank.de line 2", "its counterpart is not")),
    "one language": (PAIRS, LINES.partition(",")[0], ("a.en is one file", "a.en,a.de")),
    "another language": (PAIRS, f"{LINES}a.de {TRANSLATE} task.target=fr", ('no column "fr"', "en, de")),
    "overlong target": (PAIRS, f"{LINES}long.de {TRANSLATE} task.overlong=error", ("long.de line 1", "task.target_length=16")),
    "unknown score": (PAIRS, "task.scores=blue", ('"blue" is not known (did you mean "bleu"?)',)),
    "no such part": (TEXT, f"{FILE}lines.txt[:x%]", ("lines.txt[:x%]", "write [BEGIN:END]")),
    "part beyond": (TEXT, f"{FILE}lines.txt[:11] data.record=line", ("selects none of the 10 records",)),
    "empty part": (TEXT, f"{FILE}lines.txt[:9%] data.record=line", ("lines.txt[:9%]", "contains some")),
    "part of one of two": (TEXT, f"{FILE}lines.txt[:5],lines.txt", ("a part applies to one file",)),
    "broken image": (CLASSIFY, f"{IMAGES}broken", ("broken: cat/1.png: is not a complete image",)),
    "unlike sizes": (CLASSIFY, f"{FILE}unlike", ("unlike: cat/2.png: is 9 x 8 pixels", "task.image_size")),
    "unlike channels": (MAE, f"{FILE}grey task.image_size=8", ("grey: cat/2.png: has 1 channels", "task.channels")),
    "no class folder": (CLASSIFY, f"{IMAGES}flat", ("flat: 1.png: is not in a class folder",)),
    "no images": (CLASSIFY, f"{IMAGES}texts", ("texts: no images for train",)),
    "outside the archive": (CLASSIFY, f"{FILE}outside.tar", ("outside.tar: ../cat/2.png: would be extracted outside",)),
    "cut archive": (CLASSIFY, f"{FILE}cut.tar", ("cut.tar: is not a complete tar archive", "fetch it again")),
    "idx of another type": (CLASSIFY, f"{FILE}magic", ("train-images-idx3-ubyte: begins with 00 00 0d 03",)),
    "short idx": (CLASSIFY, f"{FILE}few", ("its header promises 128 bytes, but it has 127",)),
    "images for a model of text": (CLASSIFY, "model.name=bert", ("reads images", 'model.name="bert"')),
    "channels of another model": (CLASSIFY, "model.channels=3", ("1 channels", "model.channels=3")),
    "file of digits": (CLASSIFY, "data.files.train={here}/flat", ("built in and reads no files",)),
    "unknown resampling": (CLASSIFY, "task.resize=bilinera", ('did you mean "bilinear"?',)),
    "numbers per channel": (CLASSIFY, "task.mean=0.1,0.2", ("task.mean=0.1,0.2", "one per channel")),
    "mixed labels": (CLASSIFY, "task.mixup=1 task.focal_gamma=2 task.label_smoothing=0", ("task.focal_gamma", "mixup")),
    "patches of the task": (MAE, "task.patch_size=3", ("task.image_size=8", "task.patch_size=3")),
    "all masked": (MAE, "task.mask_ratio=0.999", ("task.mask_ratio=0.999 of 16 patches",)),
    "balanced without classes": (MAE, "data.balance=oversample", ("data.balance=oversample", "set it to none")),
    "no weight of a part": ("", "task.parts.mlm.factor=0", ("task.parts.mlm.factor=0.0", "above 0")),
    "no split of a part": ("", "task.parts.mlm.split=fre", ('data.files has no "fre"', "train, free")),
    "setting of another part": ("", "task.parts.mlm.label=x", ("task.parts.mlm.label", "no such key")),
    "setting of a part": ("", "task.parts.mlm.mask_rate=2", ("task.parts.mlm.mask_rate=2.0",)),
    "column of a part": ("", "task.parts.classify.label=lable", ('no column "lable" (did you mean "label"?)',)),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "mixture.py").write_text(MIXTURE.format(folder=str(folder)))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_training(case, refused, here, tmp_path):
    name, overrides, parts = CASES[case]
    config = ROOT / "configs" / name if name else here / "mixture.py"
    words = [f"--config.{override}" for override in overrides.format(here=here).split()]
    message = refused(train.main, "--config", config, "--workdir", tmp_path / "run", *words)
    for part in parts:
        assert part in message
    left = {path.name for path in (tmp_path / "run").iterdir()} if (tmp_path / "run").exists() else set()
    assert left <= {".lock"}


# A file of weights -> what it holds, and what the message has to say.
WEIGHTS = {
    "pytorch_model.bin": (b"\x80\x02.", ("pytorch_model.bin, a pickle, which can run code", "convert it once")),
    "tf_model.h5": (b"HDF", ("tf_model.h5, which is not supported", "download the model.safetensors")),
    "flax_model.msgpack": (b"\x81\xa1a", ("flax_model.msgpack: is damaged", "download the file again")),
    "empty.bin": (b"", ("empty.bin: is not a checkpoint of llama2.c",)),
    "zip.bin": (b"PK\3\4" * 20, ("zip.bin: is not a checkpoint of llama2.c: its sizes would be",)),
    "later.bin": (struct.pack("<7i", 0x616B3432, 2, 1, 1, 1, 1, 1), ("in version 2; export it in version 0",)),
    "cut.bin": (struct.pack("<7i", 12, 10, 2, 3, 1, 300, 6) + bytes(400), ("cut.bin: holds 100 numbers",)),
    "none.bin": (None, ("none.bin: no such", "download it first")),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name, refused, tmp_path):
    content, parts = WEIGHTS[name]
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(GOLDEN / "bert_classify" / "config.json", folder)
    if content is not None:
        (folder / name).write_bytes(content)
    path = folder if "model" in name else folder / name
    (tmp_path / "in.jsonl").write_text('"the cat"\n')
    before = {path.name for path in tmp_path.rglob("*")}
    flags = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    for message in (
        refused(convert.main, "--from", path, "--to", tmp_path / "new"),
        refused(predict.main, "--workdir", path, *flags),
    ):
        assert all(part in message for part in parts)
    assert {path.name for path in tmp_path.rglob("*")} == before


GENERATION = {
    '{"num_beams": 0}': "num_beams=0 must be a whole number",
    '{"typical_p": 0.5}': "not supported: typical_p=0.5 (only 1.0 is)",
    '{"top_kk": 3}': '"top_kk" is not a generation setting (did you mean "top_k"?)',
    '{"do_sample": true, "num_beams": 2}': "do_sample=true with num_beams=2 is not supported",
    '{"temperature": 0}': "temperature=0 must be a number above 0",
    '{"max_length": 1}': "max_length=1 leaves no room",
    '{"max_new_tokens": 99}': "exceed the 40 positions of the model",
    "[]": "generation_config.json: contains a JSON list",
    "{": "generation_config.json: is not JSON",
}
QUESTION, PICTURE = '{"question": "the", "context": "%s"}', '{"image": %s}'
# A golden folder, a line of input, and the message.
EXAMPLES = [
    ("bert_span", '"the cat"', "is not a question about a context"),
    ("bert_span", QUESTION % " ", "column \"context\" holds ' ', not text"),
    ("bert_tag", "5", "line 1: has no word"),
    ("bert_choice", '{"context": "a", "endings": ["b"]}', "must be a context and two or more endings"),
    ("seq2seq/marian", "5", "line 1: is not text"),
    ("vision/vit_classify", '"nowhere.png"', 'line 1: "nowhere.png" cannot be read'),
    ("vision/vit_classify", PICTURE % 5, "line 1: 5 is not an image"),
    ("vision/vit_classify", '{"picture": "a.png"}', 'line 1: lacks "image"'),
    ("vision/vit_classify", f'"{__file__}"', "is not a complete image (no known format)"),
    ("vision/vit_mae", '"a.png"', "has no human-readable output"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["the cat"], "wordpiece", 20).save(folder)
    return folder


@pytest.mark.parametrize("number", range(len(EXAMPLES) + len(GENERATION)))
def test_predicting(number, refused, tokenizer, tmp_path):
    generating = [("decoders/gpt2_lm", '"the"', message) for message in GENERATION.values()]
    folder, line, message = [*EXAMPLES, *generating][number]
    model = shutil.copytree(GOLDEN / folder, tmp_path / "model")
    if not folder.startswith("vision"):
        shutil.copytree(tokenizer, model, dirs_exist_ok=True)
    if number >= len(EXAMPLES):
        (model / "generation_config.json").write_text(list(GENERATION)[number - len(EXAMPLES)])
    (tmp_path / "in.jsonl").write_text(line + "\n")
    flags = ("--workdir", model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert message in refused(predict.main, *flags)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "in.jsonl"}


@pytest.mark.parametrize("content", ['{"crop_pct": 0.9}', '{"do_resize": false}', "{"])
def test_image_processors(content, refused, tmp_path):
    model = shutil.copytree(GOLDEN / "vision" / "vit_classify", tmp_path / "model")
    (model / "preprocessor_config.json").write_text(content)
    assert "preprocessor_config.json: " in refused(convert.main, "--from", model, "--to", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
