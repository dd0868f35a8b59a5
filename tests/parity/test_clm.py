"""Causal language modelling against the reference: the loss of a row, and how a prompt is continued."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.processors import using
from support.sources import MemoryRecords

import fmjax
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.tasks.clm import Task

torch = pytest.importorskip("torch", reason="the reference is not installed: pip install .[parity]")
transformers = pytest.importorskip("transformers", reason="the reference is not installed: pip install .[parity]")

pytestmark = pytest.mark.optimized

TEXT = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n"


class Records(MemoryRecords):
    place, first = "record", 1


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request, tmp_path_factory):
    """A random model of the reference, and ours of the folder that it writes."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer([TEXT], "char", 100)
    shared = {"vocab_size": tokenizer.vocab_size, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    if request.param == "gpt2":
        config = transformers.GPT2Config(n_embd=24, n_layer=2, n_head=3, n_positions=48, **shared)
        theirs = transformers.GPT2LMHeadModel(config)
    else:
        sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
        config = transformers.LlamaConfig(**sizes, intermediate_size=40, max_position_embeddings=48, **shared)
        theirs = transformers.LlamaForCausalLM(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    theirs.eval().save_pretrained(folder)
    tokenizer.save(folder)
    return theirs, fmjax.load(folder), folder


def test_the_loss_of_a_row_is_the_references(pair):
    theirs, ours, _ = pair
    task = Task(rows="offset")
    row = task.examples(Records([{"text": TEXT[:40]}]), using(ours.tokenizer), 39, train=False)[0]
    ids = torch.tensor(np.append(row["input_ids"], row["labels"][-1])[None].astype(np.int64))
    with torch.no_grad():
        expected = float(theirs(ids, labels=ids).loss)
    batch = {name: array[None] for name, array in row.items()}
    outputs = {"lm": ours.apply(input_ids=row["input_ids"][None])["logits"]}
    assert float(task.loss(outputs, batch)["lm"] / task.weights(batch)["lm"]) == pytest.approx(expected, abs=1e-4)


def test_prompts_are_continued_as_the_reference_does(pair):
    theirs, _, folder = pair
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = ["To be", "Whether 'tis n", "q"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    made = theirs.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"max_new_tokens": 20}))
    predicted = fmjax.load(folder).predict(prompts)
    expected = [tokenizer.decode(row, skip_special_tokens=True) for row in made]
    assert [prediction["text"] for prediction in predicted] == expected and any(len(set(text)) > 2 for text in expected)
