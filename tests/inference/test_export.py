"""A run and its export: the same prompts, and answers that JSON can hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers
from support.processors import using

from fmjax import models, tasks
from fmjax.config import write_config
from fmjax.contracts import Task
from fmjax.data.tokenizers.tokenizer import Tokenizer, train_tokenizer
from fmjax.errors import UserError
from fmjax.inference.answers import check_answers
from fmjax.inference.folder_task import folder_task
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained, abstract_params
from fmjax.runs.checkpoint import Checkpoints

TEXTS = ["the cat sat", "a dog ran", "the dog sat", "a cat ran"] * 5
SIZES = {"width": 12, "layers": 1, "attention_heads": 2, "mlp_width": 8, "positions": 16}


def language_model(tokenizer: Tokenizer, rows: str) -> Pretrained:
    """Returns what loading a run of a GPT gives."""
    task, family = tasks.make({"name": "clm", "rows": rows}), models.family("gpt")
    model = family.build(heads=task.heads, vocab_size=tokenizer.vocab_size, **SIZES)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(model)
    )
    config = {"model": {"name": "gpt"}, "data": {"max_length": 16}}
    return Pretrained(config, family, model, params, using(tokenizer), task)


def task_of(folder: Pretrained) -> Task:
    return folder_task(folder.config, folder.model, folder.processors, folder.class_name)


@pytest.mark.parametrize("rows", ["packed", "offset"])
@pytest.mark.parametrize("kind", ["bpe", "t5", "unigram", "wordpiece", "char"])
def test_a_run_and_its_export_read_a_prompt_alike(kind, rows, tmp_path):
    tokenizer = train_tokenizer(TEXTS, kind, 40 if kind in ("wordpiece", "char") else 400)
    run = language_model(tokenizer, rows)
    run.save(tmp_path / "export")
    export = load(tmp_path / "export")
    texts = ["the cat", "a dog"]
    batches = [
        task.inputs(texts, one.processors, 16, "example {}".format)["input_ids"]
        for task, one in ((run.task, run), (task_of(export), export))
    ]
    np.testing.assert_array_equal(*batches)
    # The reference's tokenizer has no other beginning, and no end.
    if (path := tmp_path / "export" / "tokenizer.json").is_file():
        whole = tokenizers.Tokenizer.from_file(str(path))
        found = [row.ids for row in whole.encode_batch(texts)]
        assert found == [row[row != tokenizer.fill_id].tolist() for row in batches[0]]
    else:
        assert kind == "char"


def test_generation_begins_and_ends_with_tokens_of_the_vocabulary(tmp_path):
    tokenizer = train_tokenizer(TEXTS, "bpe", 300)
    language_model(tokenizer, "packed").save(tmp_path / "export")
    for name in ("generation_config.json", "config.json"):
        found = json.loads((tmp_path / "export" / name).read_text())
        ids = {key: found[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
        names = {key: tokenizer.token(number) for key, number in ids.items()}
        assert names == {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}


@pytest.mark.parametrize("answer", [{"score": float("nan")}, {"spans": [{"score": float("inf")}]}])
def test_answers_are_numbers(answer):
    check_answers([{"text": "a", "score": 0.5, "scores": {"a": 1.0}}, {}], "line {}".format)
    with pytest.raises(UserError, match="line 1: the model's output is NaN or infinite"):
        check_answers([{}, answer], "line {}".format)


def test_a_model_whose_numbers_overflow_gives_no_answer():
    tokenizer = train_tokenizer(TEXTS, "wordpiece", 40)
    task = tasks.make({"name": "classify", "labels": ("a", "b")})
    family = models.family("bert")
    model = family.build(heads=task.heads, vocab_size=tokenizer.vocab_size, **SIZES)
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), abstract_params(model))
    config = {"data": {"max_length": 16}}
    broken = Pretrained(config, family, model, params, using(tokenizer), task)
    nothing = np.full((1, 2), np.nan)
    broken.__dict__["_forward"] = lambda batch: {"classify": nothing}
    with pytest.raises(UserError, match="example 0: the model's output is NaN"):
        broken.predict(["the cat"])


def test_checkpoints_that_are_not_finite_are_not_loaded(tmp_path: Path):
    tokenizer = train_tokenizer(TEXTS, "bpe", 300)
    run = language_model(tokenizer, "packed")
    settings = {"name": "gpt"} | dataclasses.asdict(run.model.settings)
    config = {"model": settings, "task": {"name": "clm"}, "data": {"max_length": 16}}
    write_config(tmp_path, config | {"checkpoint": {"mode": "max"}})
    tokenizer.save(tmp_path / "tokenizer")
    run.params["decoder"]["norm"]["bias"][3] = np.nan
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, {"params": run.params, "step": np.int32(1)}, {})
    checkpoints.close()
    with pytest.raises(UserError, match="at step 1: decoder/norm/bias holds NaN or infinity"):
        load(tmp_path)
