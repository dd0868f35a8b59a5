"""A step that has no room is refused from shapes alone, in seconds, with what would help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.data.stream.batches import batch_shapes
from fmjax.distributed.layout import lay_out
from fmjax.errors import UserError
from fmjax.hardware import Room
from fmjax.planning.plan import build_from_first_records, describe_step
from fmjax.train import budget
from fmjax.train.experiment import prepare

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bert_mlm.py"


def stages(**changes: str) -> tuple:
    """Returns what `check_memory` reads for the tiny config with some changes."""
    loaded = load_config(f"{CONFIG}:tiny")
    apply_overrides(loaded, list(changes.items()))
    config = to_dict(loaded)
    built = build_from_first_records(config)
    return built.config, built.model, built.task, batch_shapes(config, built.examples["train"]), lay_out(config)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"model.layers": "1000", "model.width": "8192", "model.attention_heads": "64", "model.mlp_width": "65536"},
            ("a training step needs about", "GiB per device (parameters", "choose a smaller model.size"),
        ),
        ({"data.batch_size": "8388608"}, ("activations", "lower data.batch_size=8388608 or data.max_length")),
    ],
    ids=["model", "batch"],
)
def test_what_has_no_room_is_refused(changes, parts):
    # Unrolled, the first would take many minutes.
    given = stages(**changes)
    with pytest.raises(UserError) as caught:
        budget.check_memory(*given)
    for part in parts:
        assert part in str(caught.value)


def test_a_model_without_room_is_refused_before_texts_are_tokenized(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n\n" * 40)
    loaded = load_config(f"{CONFIG}:tiny")
    files = {"train": str(tmp_path / "a.txt")}
    apply_overrides(loaded, [("data.files", json.dumps(files)), ("data.vocab_size", "60"), ("data.hold_out", "none")])
    monkeypatch.setattr("fmjax.train.stages.make_examples", None)
    monkeypatch.setattr(budget, "FEW", 0)
    monkeypatch.setattr(budget, "memory_of_devices", lambda: Room(1000, "this machine"))
    message = r"needs about 0.0 GiB per device \(parameters 0.0, gradients 0.0, optimizer 0.0\), .*; choose a smaller model.size"
    with pytest.raises(UserError, match=message):
        prepare(to_dict(loaded), tmp_path / "run")


def test_devices_that_share_heads_may_share_activations(monkeypatch):
    axes = {"mesh.rules": "fsdp_tp", "mesh.axes": '{"data": 4, "tensor": 2}'}
    given = stages(**axes, **{"data.batch_size": "4096"})
    need, layout = budget.needed_bytes(*given), given[-1]
    assert budget.devices_per_batch(layout) == 4
    state = need["parameters"] + need["gradients"] + need["optimizer"]
    least = state + need["activations"] // 2 // 2
    monkeypatch.setattr(budget, "memory_of_devices", lambda: Room(least, "this machine"))
    budget.check_memory(*given)
    monkeypatch.setattr(budget, "memory_of_devices", lambda: Room(least - 1, "this machine"))
    with pytest.raises(UserError, match="activations"):
        budget.check_memory(*given)


def test_the_bytes_are_those_of_the_state():
    config, model, task, spec, layout = stages()
    need = budget.needed_bytes(config, model, task, spec, layout)
    state = describe_step(config).abstract.state
    assert need["parameters"] == need["gradients"] == budget.device_bytes(state.params)
    assert need["optimizer"] == budget.device_bytes(state.opt_state)
    assert budget.is_small(model, spec)
    budget.check_memory(config, model, task, spec, layout)
