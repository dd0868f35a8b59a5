"""The three classics of the README, from Python and from the command line, on weights small enough to make here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import pytest

import fmjax
from fmjax import models
from fmjax.contracts import Processors
from fmjax.data.kinds import text
from fmjax.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from fmjax.hub import families
from fmjax.inference.pretrained import Pretrained
from scripts import convert, predict, train

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GOOD, BAD = "干净舒服满意热情", "肮脏吵闹失望冷淡"
SMALL = {"width": 16, "layers": 1, "attention_heads": 2, "mlp_width": 32}


def weights(folder: Path, tokenizer: Tokenizer) -> Path:
    """Writes a Hugging Face folder of a small BERT with random weights."""
    family = models.family("bert")
    model = family.build(heads={"pooled": {}}, vocab_size=tokenizer.vocab_size, positions=32, **SMALL)
    params = nn.meta.unbox(model.init(jax.random.key(0), model.one_row_batch())["params"])
    config = families.table_of("bert").write_config(model.settings, tokenizer.pad_id) | {"architectures": ["BertModel"]}
    Pretrained(config, family, model, jax.device_get(params), Processors(text.Processor(tokenizer))).save(folder)
    return folder


def said(folder: Path, examples: Sequence[str], tmp_path: Path) -> list[dict]:
    """Returns the predictions of the command line, having seen that Python's are the same."""
    source, target = tmp_path / "in.jsonl", tmp_path / f"{folder.name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in examples), encoding="utf-8")
    assert predict.main(["--workdir", str(folder), "--input", str(source), "--output", str(target)]) == 0
    lines = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [(line.pop("line"), line.pop("input")["text"]) for line in lines] == [*enumerate(examples, start=1)]
    assert lines == fmjax.load(folder).predict(examples)
    return lines


@pytest.mark.full
def test_fine_tuning_a_classifier(tmp_path):
    nouns = {"child": "person", "woman": "person", "man": "person", "cat": "animal", "dog": "animal", "bird": "animal"}
    words = itertools.product(("small", "old", "good"), nouns, ("sees", "likes", "finds"), nouns)
    rows = [(f"the {adjective} {noun} {verb} the {other}", nouns[noun]) for adjective, noun, verb, other in words] * 9
    rows = rows[:2800]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    bert = weights(tmp_path / "bert", train_tokenizer([text for text, _ in rows], "wordpiece", 80))
    changes = {
        "init.from": str(bert),
        "data.files.train": str(tmp_path / "train.csv"),
        "data.files.validation": str(tmp_path / "train.csv"),
        "train.epochs": 3,
        "train.log_every": 10,
        "data.batch_size": 16,
        "optim.warmup_ratio": None,
        "optim.warmup_steps": 500,
        "optim.weight_decay": 0.01,
        # What the small stand-in needs besides.
        "data.max_length": 16,
        "optim.learning_rate": 3e-3,
    }
    spec = f"{CONFIGS / 'bert_classify.py'}:files"
    metrics = fmjax.fit(spec, tmp_path / "results", changes)
    assert metrics["accuracy"] > 0.9
    lines = [json.loads(line) for line in (tmp_path / "results" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(10, 525, 10), 525]
    rates = {line["step"]: line["learning_rate"] for line in lines if "loss" in line}
    assert max(rates, key=rates.__getitem__) == 500
    assert {"metrics.jsonl", "report.html", "tensorboard", "checkpoints", "config.json"} <= {
        path.name for path in (tmp_path / "results").iterdir()
    }
    # The command line is the same experiment: it finds that run complete, where it would refuse another config.
    flags = [f"--config.{key}={'none' if value is None else value}" for key, value in changes.items()]
    assert train.main(["--config", spec, "--workdir", str(tmp_path / "results"), *flags]) == 0
    assert [json.loads(line) for line in (tmp_path / "results" / "metrics.jsonl").read_text().splitlines()] == lines


@pytest.mark.full
def test_sentiment_of_two_chinese_sentences(tmp_path):
    rows = [(f"这家酒店很{word[0]}，服务也{word[1]}", label) for letters, label in ((GOOD, "positive"), (BAD, "negative"))
            for word in zip(letters, letters[1:] + letters[:1], strict=True)]  # fmt: skip
    (tmp_path / "train.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows * 5), encoding="utf-8")
    bert = weights(tmp_path / "bert", train_tokenizer([text for text, _ in rows] * 3, "wordpiece", 80))
    changes = {
        "init.from": str(bert),
        "data.files.train": str(tmp_path / "train.tsv"),
        "data.columns": ["text", "label"],
        "data.batch_size": 8,
        "data.max_length": 32,
        "optim.learning_rate": 5e-3,
        "train.epochs": None,
        "train.steps": 80,
        "train.eval_every": 0,
        "checkpoint.best": None,
    }
    fmjax.fit(f"{CONFIGS / 'bert_classify.py'}:files", tmp_path / "run", changes)
    assert convert.main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "exported")]) == 0
    for folder in (tmp_path / "run", tmp_path / "exported"):
        answers = said(folder, ["这家酒店很干净，服务也热情", "这家酒店很肮脏，服务也冷淡"], tmp_path)
        assert [answer["label"] for answer in answers] == ["positive", "negative"]
        assert all(0.5 < answer["score"] == max(answer["scores"].values()) for answer in answers)


PAIRS = {"How are you?": "你好吗？", "Thank you.": "谢谢你。", "Good night.": "晚安。", "I love you.": "我爱你。"}


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a small T5 that knows four sentences."""
    folder = tmp_path_factory.mktemp("t5")
    (folder / "pairs.tsv").write_text("".join(f"{en}\t{zh}\n" for en, zh in [*PAIRS.items()] * 2), encoding="utf-8")
    changes = {
        "data.files.train": str(folder / "pairs.tsv"),
        "data.files.validation": str(folder / "pairs.tsv"),
        "data.columns": ["en", "zh"],
        "data.hold_out": None,
        "data.tokenizer_kind": "char",
        "data.batch_size": 8,
        "data.max_length": 64,
        "task.target_length": 8,
        "optim.warmup_ratio": None,
        "optim.learning_rate": 5e-3,
        "train.epochs": None,
        "train.steps": 160,
        "train.seed": 1,
        "train.eval_every": 0,
        **{f"model.{name}": value for name, value in SMALL.items()},
        "model.width": 32,
        "model.decoder_layers": 1,
        "model.head_width": 16,
        "model.dropout": 0.0,
    }
    fmjax.fit(CONFIGS / "t5_translate.py", folder / "run", changes)
    return folder / "run"


def test_translating_how_are_you(translator, tmp_path):
    assert convert.main(["--from", str(translator), "--to", str(tmp_path / "exported")]) == 0
    # A run puts the prefix of its task before each text; of a Hugging Face folder, who asks does.
    prefix = "translate English to Chinese: "
    assert fmjax.load(translator).predict(["How are you?"]) == [{"text": "你好吗？"}]
    answers = said(tmp_path / "exported", [prefix + english for english in PAIRS], tmp_path)
    assert [answer["text"] for answer in answers] == list(PAIRS.values())
