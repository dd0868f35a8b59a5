"""A step that has no room is refused from shapes alone, in seconds, with what would help."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.distributed.layout import lay_out
from fmjax.errors import UserError
from fmjax.planning.plan import build_from_first_records, describe_step
from fmjax.train import budget
from fmjax.train.stages import batch_shapes

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
    given = stages(**changes)
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        budget.check_memory(*given)
    assert time.monotonic() - begun < 30  # unrolled, the first would take many minutes
    for part in parts:
        assert part in str(caught.value)


def test_the_bytes_are_those_of_the_state():
    config, model, task, spec, layout = stages()
    need = budget.needed_bytes(config, model, task, spec, layout)
    state = describe_step(config).abstract.state
    assert need["parameters"] == need["gradients"] == budget.device_bytes(state.params)
    assert need["optimizer"] == budget.device_bytes(state.opt_state)
    assert budget.is_small(model, spec)
    budget.check_memory(config, model, task, spec, layout)
