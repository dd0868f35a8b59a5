"""The block of facts at the start of a run: on the screen, in provenance.json, of devices and of bad vocabularies."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from support.sources import MemoryRecords

from fmjax.contracts import Examples, Processors
from fmjax.data.kinds import text
from fmjax.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from fmjax.distributed import sharding
from fmjax.distributed.layout import Layout
from fmjax.train import facts

BLOCK = ("records", "labels", "lengths", "unknown", "padding", "model", "devices", "export")


def test_a_run_begins_with_facts_and_keeps_them(classifier):
    stored = json.loads((classifier / "provenance.json").read_text())["facts"]
    assert tuple(stored) == BLOCK
    assert stored["records"]["records"] == {"train": 120, "validation": 20}
    counts = stored["labels"]["counts"]
    assert set(counts) == {"animal", "person"} and sum(counts.values()) == 120
    assert stored["labels"]["majority_accuracy"] == max(counts.values()) / 120
    assert stored["lengths"]["cut"] == 0 and stored["lengths"]["sampled"] == 120
    assert stored["unknown"]["share"] == 0 and "warning" not in stored["unknown"]
    assert stored["export"] == {
        "text": "yes, as BertForSequenceClassification (scripts/convert.py)",
        "possible": True,
        "architecture": "BertForSequenceClassification",
    }
    shown = facts.lines(stored)
    assert len(shown) == len(BLOCK) and shown[0] == "records  120 train, 20 validation"
    assert len({line.index(stored[name]["text"]) for line, name in zip(shown, BLOCK, strict=True)}) == 1  # one column


def test_facts_are_shown_where_there_is_no_terminal(run, tmp_path, capsys):
    assert run(tmp_path / "run", "train.steps=1") == 0  # masked words, in packed rows
    lines = [line for line in capsys.readouterr().err.splitlines() if line.split("  ")[0] in (*BLOCK, "steps")]
    names = [line.split("  ")[0] for line in lines]
    assert names == ["records", "unknown", "padding", "model", "devices", "export", "steps"]
    assert lines[0].startswith("records  120 train, 20 validation (") and lines[0].endswith(" validation examples)")
    assert lines[-1] == "steps    0 to 1, of 16 examples each"
    assert lines[2].endswith("of input_ids in packed rows") and "BertForMaskedLM" in lines[5]


def test_a_mixture_says_that_it_has_no_buckets():
    class Texts(Examples):
        lengths, max_length = np.array([4, 12]), 16

    class Mixed(Examples):
        parts = {"books": Texts(), "wiki": Texts()}  # noqa: RUF012

    (fact,) = facts.padding(Mixed(), {"max_length": 16})
    rows = "50 % of books/input_ids, 50 % of wiki/input_ids in batches of 16 tokens"
    assert fact.text == f"{rows}, as mixtures have no length buckets"


def test_unknown_tokens_are_counted_and_warned_of(tmp_path):
    tokenizer = train_tokenizer(["a cat and a dog"] * 2, "word", 40)
    sample = MemoryRecords([{"text": "狗 と 猫"}, {"text": "a cat"}])
    (fact,) = facts.unknown(sample, ["text"], Processors(text.Processor(tokenizer)))
    assert fact.values == {"share": 0.6, "tokens": 5} and fact.text == "60 % of the tokens"
    assert fact.warning.startswith("60 % of the tokens are unknown to the tokenizer") and "data.tokenizer" in fact.warning
    assert facts.lines({"unknown": {"text": fact.text, "warning": fact.warning}})[-1] == f"warning: {fact.warning}"
    (fact,) = facts.unknown(MemoryRecords([{"text": ["a", "cat"]}]), ["text"], Processors(text.Processor(tokenizer)))
    assert fact.values["share"] == 0 and not fact.warning
    tokenizer.save(tmp_path / "tokenizer")
    assert load_tokenizer(tmp_path / "tokenizer").roles["unk"] == "[UNK]"


@pytest.mark.parametrize(
    ("axes", "rules", "text", "warning"),
    [
        ({"data": 8}, "dp", "8 x cpu, mesh data 8, rules dp: batches sharded, all parameters replicated", ""),
        (
            {"data": 2, "fsdp": 4},
            "fsdp",
            "8 x cpu, mesh data 2 x fsdp 4, rules fsdp: 80 % of the parameters sharded, 20 % replicated, the largest b",
            "",
        ),
        (
            {"data": 8},
            "fsdp",
            "8 x cpu, mesh data 8, rules fsdp: batches sharded, all parameters replicated",
            "rules fsdp shard no parameter over the mesh {'data': 8}, so each device holds all of them; add the axis, "
            "mesh.axes='{\"fsdp\": -1}'",
        ),
        ({"data": 1}, "dp", "1 x cpu", ""),
    ],
)
def test_devices_and_what_is_divided_over_them(axes, rules, text, warning):
    count = int(np.prod(list(axes.values())))
    layout = Layout(sharding.make_mesh(axes, jax.devices()[:count]), sharding.resolve_rules(rules))
    over = PartitionSpec("fsdp") if "fsdp" in axes else PartitionSpec()
    params = {
        "a": jax.ShapeDtypeStruct((16,), np.float32, sharding=NamedSharding(layout.mesh, over)),
        "b": jax.ShapeDtypeStruct((4,), np.float32, sharding=NamedSharding(layout.mesh, PartitionSpec())),
    }
    abstract = SimpleNamespace(layout=layout, state=SimpleNamespace(params=params))
    fact = facts.devices(SimpleNamespace(abstract=abstract, config={"mesh": {"rules": rules}}))
    assert (fact.text, fact.warning) == (text, warning)


def test_a_sample_is_small_and_without_records_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr(facts, "RECORDS", 50)
    source = MemoryRecords({"text": f"text {number}"} for number in range(200))
    sample = facts.sample_of(source, ["text"])
    assert len(sample) == 50 and len({sample[index]["text"] for index in range(50)}) == 50
    few = facts.sample_of(MemoryRecords(source[:3]), ["text"])
    assert [few[index]["text"] for index in range(len(few))] == ["text 0", "text 1", "text 2"]
    monkeypatch.setattr(facts, "CHARACTERS", 20)
    assert len(facts.sample_of(source, ["text"])) < 5
