"""Plans: what they count is what training holds, and what they cannot serve is said in a line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import pytest
from support import corpus

from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.errors import UserError
from fmjax.planning.plan import (
    analytic_traffic,
    compile_step,
    describe_step,
    device_bytes,
    plan,
    roofline,
)
from fmjax.planning.report import sharding_rows, sharding_table, table
from fmjax.planning.topology import Absent, read_topology
from fmjax.train.experiment import prepare
from scripts import plan as command

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FSDP = {"mesh.rules": "fsdp", "mesh.axes": '{"fsdp": -1}'}


def config(name: str, **changes: str) -> dict:
    loaded = load_config(f"{CONFIGS / name}")
    apply_overrides(loaded, list(changes.items()))
    return to_dict(loaded)


@pytest.mark.parametrize(
    ("text", "count", "memory"),
    [
        ("v5e:4x4", 16, 16e9),
        ("v5e:4x4:2", 32, 16e9),
        ("v5p:8x8x4", 256, 95e9),
        ("gpu:h200", 1, 141e9),
        ("gpu:h100:8", 8, 80e9),
        ("cpu:8", 8, 0),
    ],
)
def test_topologies_are_read(text, count, memory):
    found = read_topology(text)
    assert found.count == count and (found.chip.memory if found.chip else 0) == memory and found.tpu == text.startswith("v")


@pytest.mark.parametrize(
    "text",
    ["v5e", "v5e:0x4", "v5e:4", "v5e:4x4:0", "v5e:4x4:2:2", "v9:2x2", "gpu", "gpu:h20", "gpu:h100:0", "cpu:", "cpu:0", "tpu:4"],
)
def test_other_topologies_are_refused(text):
    with pytest.raises(UserError, match=r'--topology=".*" is not known.*choose from v5e:4x4'):
        read_topology(text)
    with pytest.raises(UserError, match='did you mean "h200"'):
        read_topology("gpu:h20")


def test_a_plan_holds_the_bytes_that_training_does(tmp_path):
    given = config("bert_mlm.py:tiny", **FSDP)
    with corpus.small():
        experiment = prepare(given, tmp_path / "run")
    state = experiment.initial_state()
    on_first = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state))]
    vocabulary = {"model.vocab_size": str(experiment.data.processors.sizes()["vocab_size"])}
    found = plan(config("bert_mlm.py:tiny", **FSDP, **vocabulary), read_topology("cpu:8"))
    assert found["bytes_per_device"]["parameters"] + found["bytes_per_device"]["optimizer"] == sum(on_first)
    assert found["model_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert "fits" not in found and found["analytic"]


def test_the_sharding_report_lists_every_parameter():
    given, topology = config("bert_mlm.py:tiny", **FSDP), read_topology("gpu:h100:8")
    rows = sharding_rows(given, topology)
    step = describe_step(given, topology.devices())
    assert sum(row["bytes_per_device"] for row in rows) == device_bytes(step.abstract.state.params)
    word = next(row for row in rows if row["name"] == "embed/word/embedding")
    assert word["axes"] == ["vocab", "embed"] and word["spec"] == [None, "fsdp"]
    assert word["bytes_per_device"] == math.prod(word["shape"]) * 4 // 8
    lines = sharding_table(given, topology).splitlines()
    assert len(lines) == len(rows) + 1 and "embed 32 over fsdp" in next(line for line in lines if "word" in line)


@pytest.mark.full
def test_flops_and_memory_agree_with_a_compiler(tmp_path):
    """Dense enough that the matrix products are nearly all there is; unrolled, as a loop's body is counted once."""
    sizes = {"model.width": "256", "model.layers": "2", "model.attention_heads": "4", "model.mlp_width": "1024"}
    plain = {f"model.{name}dropout": "0.0" for name in ("", "embedding_", "attention_")}
    given = config("gpt_clm.py:tiny", **sizes, **plain, **{"data.max_length": "128", "model.positions": "128"})
    step = describe_step(given, jax.devices()[:1])
    counted = compile_step(step).cost_analysis()["flops"]
    assert 3 * step.built.model.forward_flops(step.abstract.spec) == pytest.approx(counted, rel=0.1)


def test_remat_keeps_less_and_multiplies_more():
    plans = {
        remat: plan(config("gpt_clm.py:tiny", **{"model.remat": remat, "model.layers": "4"}), read_topology("gpu:h100"))
        for remat in ("none", "dots", "attention", "everything")
    }
    kept = [found["bytes_per_device"]["activations"] for found in plans.values()]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert plans["everything"]["seconds"]["compute"] == pytest.approx(4 / 3 * plans["none"]["seconds"]["compute"])


def test_a_plan_says_which_kernel_computes_attention():
    """And counts what it keeps: no scores."""
    sizes = {"model.dtype": "bfloat16", "model.positions": "128", "data.max_length": "128"}

    def planned(topology: str, **changes: str) -> dict:
        return plan(config("gpt_clm.py:tiny", **sizes, **changes), read_topology(topology))

    fused, plain = planned("gpu:h100:8"), planned("gpu:h100:8", **{"model.attention_dropout": "0.1"})
    assert fused["attention"] == "cudnn" and plain["attention"].startswith("xla (cudnn: attention weights are dropped")
    assert fused["bytes_per_device"]["activations"] < 0.7 * plain["bytes_per_device"]["activations"]
    assert planned("cpu")["attention"] == "xla"
    with pytest.raises(UserError, match='decoder/attention: it is for TPUs and this is a GPU'):
        planned("gpu:h100", **{"model.attention": "splash"})


def test_what_does_not_fit_is_told_what_would():
    sizes = {"model.width": "8192", "model.layers": "48", "model.attention_heads": "64", "model.mlp_width": "32768"}
    whole = plan(config("gpt_clm.py:tiny", **sizes, **{"model.scan_layers": "true"}), read_topology("gpu:h100:8"))
    assert not whole["fits"] and "mesh.rules=fsdp" in whole["hint"]
    assert whole["bytes_per_device"]["parameters"] == 4 * whole["model_parameters"]
    spread = plan(config("gpt_clm.py:tiny", **sizes, **FSDP, **{"model.scan_layers": "true"}), read_topology("gpu:h100:8"))
    assert spread["bytes_per_device"]["parameters"] < whole["bytes_per_device"]["parameters"] / 7
    text = table(whole)
    assert "does not fit; try" in text and "estimated by formula" in text


def test_the_command_prints_a_table_or_an_object(capsys):
    words = ["--config", f"{CONFIGS / 'bert_mlm.py'}:tiny", "--topology", "gpu:h200:8"]
    assert command.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() >= {"fits", "bytes_per_device", "flops_per_step", "step_seconds", "mfu"} and found["fits"]
    assert command.main(words) == 0
    assert "fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh.axes": '{"data": 2, "fsdp": 4}'}, "no rule uses fsdp=4"),
        ({"mesh.table": '{"act_batch": "data", "mpl": "tensor"}'}, 'no axis is named "mpl" (did you mean "mlp"?)'),
        ({"mesh.table": '{"act_batch": "data", "mlp": "tensor"}'}, "mesh.table.mlp=tensor: mesh.axes has only data"),
        ({"mesh.table": '{"act_batch": "data", "mlp": "data", "embed": "data"}'}, "shard two of its axes (layers, mlp, embed)"),
        ({"mesh.table": '{"mlp": 3}'}, "mesh.table.mlp=3: is not an axis of the mesh"),
        ({"mesh.axes": '{"data": 3}'}, "multiply to the 8 devices"),
        ({"model.width": "36", **FSDP}, 'embed" of size 36 is not divisible by the 8 devices'),
        ({"init.from": "somewhere"}, "a plan reads no weights"),
        ({"model.remat": "dot"}, 'model.remat="dot" (did you mean "dots"?): choose one of none, dots'),
    ],
)
def test_mistakes_are_one_line(changes, message, capsys):
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    assert command.main(["--config", f"{CONFIGS / 'bert_mlm.py'}:tiny", "--topology", "cpu:8", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_large_parameter_that_no_rule_shards_is_refused():
    rules = {"mesh.table": '{"act_batch": "data", "mlp": "tensor"}', "mesh.axes": '{"data": 2, "tensor": 4}'}
    wide = {"model.vocab_size": "600000"}
    message = r"embed/word/embedding: 73 MiB would be replicated on each of 8 .*vocab 600000, embed 32"
    with pytest.raises(UserError, match=message):
        plan(config("bert_mlm.py:tiny", **rules, **wide), read_topology("cpu:8"))


def test_slices_exchange_gradients_alone():
    """Each device sends its part of them, and the network between slices has a time of its own."""
    given = config("gpt_clm.py:tiny", **{"mesh.rules": "fsdp", "mesh.axes": '{"fsdp": -1}'})
    topology = dataclasses.replace(read_topology("v5e:2x2:2"), tpu=False)
    devices = [Absent(index, "cpu", slice_index=index // 4) for index in range(8)]
    step = describe_step(given, devices)
    assert dict(step.abstract.layout.mesh.shape) == {"slice": 2, "fsdp": 4}
    sent = analytic_traffic(step)
    held = 0.0
    for leaf in jax.tree.leaves(step.abstract.state.params):
        held += leaf.size * leaf.dtype.itemsize / 4  # of a slice's four devices
    assert sent["between slices"].sent == held
    result = {"bytes_per_device": dict.fromkeys(("parameters", "gradients", "optimizer", "activations"), 0), "flops_per_step": 0}
    result["collectives"] = {kind: traffic._asdict() for kind, traffic in sent.items()}
    seconds = roofline(step, topology, result)["seconds"]
    assert seconds["network"] == held / 3.125e9
    assert seconds["links"] == sum(traffic.sent for kind, traffic in sent.items() if kind != "between slices") / 200e9
