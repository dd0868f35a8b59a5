"""Absurd values of every key of a config are refused in one line, or are listed here as meaningful."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest

from fmjax import defaults, models, tasks
from fmjax.config import names, to_dict
from fmjax.config.limits import of_fields
from fmjax.errors import UserError
from fmjax.models import sizes
from fmjax.train import limits

WHOLE = 10**9
ABSURD = (-1, 0, WHOLE, 1e9, math.nan, math.inf, "x")
GROUPS = ("files", "mixture", "curriculum", "multipliers", "axes", "table", "early_stopping")  # of keys, each checked below

# The keys whose text names something that is looked for where it is used: a column, a metric, a file, a folder.
NAMES = (
    *("data.name", "data.data_dir", "data.hold_out_by", "data.tokenizer", "data.store", "init.weights", "init.from"),
    *("data.time", "data.group_by", "data.record", "checkpoint.best", "train.early_stopping.metric"),
)
# The absurd values that a number may have, as they mean something.
MEANINGFUL: dict[str, tuple[object, ...]] = {
    "train.steps": (WHOLE,),
    "train.log_every": (0, WHOLE),
    "train.eval_every": (0, WHOLE),
    "train.seed": (0, WHOLE),
    "train.max_nonfinite": (WHOLE,),
    "train.early_stopping.patience": (0, WHOLE),
    "checkpoint.every": (0, WHOLE),
    "checkpoint.keep": (WHOLE,),
    "mesh.axes.data": (-1, WHOLE),  # how many devices there are is asked next
    "data.balance_power": (0,),
    "data.workers": (0,),
    "data.prefetch": (0,),
    "data.stall_seconds": (0, WHOLE, 1e9),
    "optim.learning_rate": (0, WHOLE, 1e9),  # one that is too high is noticed by the loss
    "optim.warmup_steps": (0, WHOLE),  # compared with the number of steps
    "optim.warmup_ratio": (0,),
    "optim.end_fraction": (0,),
    "optim.b1": (0,),
    "optim.b2": (0,),
    "optim.eps": (WHOLE, 1e9),
    "optim.weight_decay": (0, WHOLE, 1e9),
    "optim.l1": (0, WHOLE, 1e9),
    "optim.l2": (0, WHOLE, 1e9),
    "optim.clip_norm": (WHOLE, 1e9),
    "optim.ema": (0,),
    "model.kv_heads": (0,),
    "model.head_width": (0,),  # of Llama
    "model.embedding_width": (0,),
    "model.positions": (0,),  # of T5 and Llama: no limit
    "model.position_offset": (0,),
    "model.token_types": (0,),
    "model.window": (0,),
    "model.loss_chunk": (-1, 0, WHOLE),
    "model.decoder_layers": (0,),
    "model.decoder_attention_heads": (0,),
    "model.decoder_mlp_width": (0,),
    "model.target_vocab_size": (0,),
    "model.start_id": (0,),
    "model.end_id": (0,),
    "model.pad_id": (-1, 0),
    "model.class_tokens": (0,),
    "model.pooler_width": (0,),
    "model.initializer_range": (0,),
    "model.initializer_factor": (0,),
    "model.rotary_base": (WHOLE, 1e9),
    "model.dropout": (0,),
    "model.stochastic_depth": (0,),
    "task.choices": (0,),
    "task.label_smoothing": (0,),
    "task.effective_beta": (0,),
    "task.focal_gamma": (0,),
    "task.token_dropout": (0,),
    "task.span_mask": (0,),
    "task.temperature": (0,),
    "task.top_k": (0, WHOLE),
    "task.max_new_tokens": (0,),  # of seq2seq: as long as targets
    "task.mask_rate": (0,),  # of BART, which may permute sentences alone
    "task.permute": (0,),
    "task.null_threshold": (-1, 0, WHOLE, 1e9),
    "task.stride": (0,),
    "task.length_penalty": (-1, 0),
    "task.no_repeat_ngram_size": (0,),
    "task.packed_target_length": (0,),
    "task.image_size": (0,),
    "task.resize_size": (0,),
    "task.channels": (0,),
    "task.flip": (0,),
    "task.shift": (0,),
    "task.rand_augment": (0,),
    "task.rand_magnitude": (0,),
    "task.erase": (0,),
    "task.mixup": (0,),
    "task.cutmix": (0,),
}
MEANINGFUL |= {f"model.{name}": (0,) for name in sizes.LIMITS if name.endswith("_dropout")}


def accepted(check: Callable[[object], object]) -> list[object]:
    """Returns the absurd values that a check lets pass; the others are refused in one line."""
    passed = []
    for value in ABSURD:
        try:
            check(value)
            passed.append(value)
        except UserError as error:
            assert len(str(error).splitlines()) == 1
    return passed


def config() -> dict:
    made = to_dict(defaults.experiment("bert", "classify"))
    made["train"]["steps"] = 1
    return made


def keys() -> Iterator[tuple[str, str]]:
    """Yields the section and the name of every key that has a value of its own."""
    for section, content in defaults.experiment("bert", "classify").items():
        if section not in ("model", "task"):
            yield from ((section, key) for key in content if key not in GROUPS)
    yield from (("train.early_stopping", key) for key in ("metric", "mode", "patience"))
    yield "mesh.axes", "data"


@pytest.mark.parametrize(("section", "key"), [*keys()], ids=lambda name: name)
def test_every_key_of_the_defaults(section, key):
    def check(value: object) -> None:
        given = config()
        group = given
        for name in section.split("."):
            group = group[name]
        group[key] = value
        if (section, key) in (("optim", "b1"), ("optim", "b2"), ("optim", "eps"), ("optim", "warmup_ratio")):
            given["optim"]["name"] = "adamw"
        limits.check_config(given)

    passed = accepted(check)
    own = {"beta": "muon", "decay_rate": "adafactor", "clipping_threshold": "adafactor"}
    if key in own or key in ("multiply_by_parameter_scale", "min_dim_size_to_factor"):
        assert passed == []  # not a setting of AdamW; see below
        return
    assert [value for value in passed if value != "x"] == list(MEANINGFUL.get(f"{section}.{key}", ()))
    assert ("x" in passed) == (f"{section}.{key}" in NAMES)


def test_settings_of_other_optimizers():
    for name, key, meaningful in (
        ("adafactor", "decay_rate", (WHOLE, 1e9)),
        ("adafactor", "clipping_threshold", (WHOLE, 1e9)),
        ("adafactor", "min_dim_size_to_factor", (0, WHOLE)),
        ("adafactor", "multiply_by_parameter_scale", ()),
        ("muon", "beta", (0,)),
        ("lion", "b1", (0,)),
    ):
        made = config()
        made["optim"] = {"name": name}

        def check(value: object, made: dict = made, key: str = key) -> None:
            limits.check_config(made | {"optim": made["optim"] | {key: value}})

        assert accepted(check) == list(meaningful), key


@pytest.mark.parametrize("name", names.choices("fmjax.models", "Settings"))
def test_every_setting_of_every_family(name):
    settings = models.family(name).Settings
    numeric = {int, float, "int", "float", "float | None"}
    for field in dataclasses.fields(settings):
        passed = accepted(lambda value, key=field.name: sizes.check_section(settings, {key: value}))
        numbers = [value for value in passed if value != "x"]
        if field.type in numeric:
            assert field.name in sizes.LIMITS, f"model.{field.name} has no range"
            assert set(numbers) <= set(MEANINGFUL.get(f"model.{field.name}", ())), field.name
            assert "x" not in passed
        else:
            assert not numbers, field.name
    assert "positions" not in MEANINGFUL or models.family("llama").Settings.positions == 0


def test_a_family_says_where_0_is_meaningful():
    for name, key, fine in (("bert", "positions", False), ("llama", "positions", True), ("t5", "head_width", False)):
        passed = accepted(lambda value, name=name, key=key: sizes.check_section(models.family(name).Settings, {key: value}))
        assert passed == ([0] if fine else []), name


@pytest.mark.parametrize("name", [name for name in names.choices("fmjax.tasks", "Task") if name != "mixture"])
def test_every_setting_of_every_task(name):
    task = tasks.task(name).Task
    kinds = of_fields(task)
    for field in dataclasses.fields(task):
        passed = accepted(lambda value, key=field.name: tasks.make({"name": name, key: value}))
        numbers = [value for value in passed if value != "x"]
        if name != "denoise" and field.name == "mask_rate":
            assert passed == []
        assert set(numbers) <= set(MEANINGFUL.get(f"task.{field.name}", ())), field.name
        assert field.name in kinds


def test_a_value_of_a_list_is_checked_too():
    made = config()
    for section, key, value, message in (
        ("data", "buckets", [0], "data.buckets"),
        ("data", "buckets", ["auto", "8"], "data.buckets=auto,8: write auto, auto:N for N lengths"),
        ("data", "source", "csw", 'data.source="csw" (did you mean "csv"?): choose one of auto, '),
        ("data", "source", "my.toy", 'data.source="my.toy" names a module outside fmjax'),
        ("data", "tokenizer_kind", "wordpeace", 'data.tokenizer_kind="wordpeace" (did you mean "wordpiece"?)'),
        ("data", "mixture", {"a": {"source": "x"}, "b": {}}, 'data.mixture.a.source="x": choose one of auto, '),
        ("data", "mixture", {"a": {"wight": 1}, "b": {}}, 'data.mixture.a.wight (did you mean "weight"?)'),
        ("data", "mixture", {"a": {"weight": 1}, "b": {}}, "data.mixture: b has no weight, but a has one"),
        ("mesh", "rules", "fdsp", 'mesh.rules="fdsp": no such table (did you mean "fsdp"?)'),
        ("mesh", "table", {"vocap": "data"}, 'mesh.table: no axis is named "vocap"'),
        ("data", "columns", ["a", "b", "a"], 'data.columns: has "a" twice'),
        ("data", "files", {"train": 3}, "data.files"),
        ("mesh", "axes", {"data": 1.5}, "mesh.axes.data=1.5: must be a whole number of devices"),
        ("optim", "freeze", ["("], 'optim.freeze: "(" is not a regular expression'),
        ("optim", "multipliers", {"a": 0}, "optim.multipliers.a=0 is out of range"),
        ("task", "labels", ["n", "n", "p"], 'task.labels: has "n" twice'),
        ("task", "labels", [True], "task.labels: True must be text"),
        ("task", "class_weights", ["1_0", "2"], "task.class_weights"),
        ("train", "seed", 2**32, "train.seed=4294967296: must be a whole number from 0 to 4,294,967,295"),
        ("train", "seed", 2**63, "train.seed=9223372036854775808: must be a whole number"),
        ("train", "seed", True, "train.seed=True: must be a whole number"),
        ("data", "max_length", WHOLE, "data.max_length=1000000000: must be a whole number from 1 to 1,048,576"),
        ("model", "dropout", 1.5, "model.dropout=1.5: must be at least 0 and less than 1"),
    ):
        with pytest.raises(UserError) as caught:
            limits.check_config(made | {section: made[section] | {key: value}})
        assert str(caught.value).startswith(message), caught.value


def test_labels_that_are_numbers_are_their_names():
    assert tasks.make({"name": "classify", "labels": [1, 2, 3]}).labels == ("1", "2", "3")


def test_a_section_that_is_missing():
    made = config()
    for section in ("model", "train", "mesh"):
        with pytest.raises(UserError, match=rf"^config\.{section}: is missing"):
            limits.check_config({key: value for key, value in made.items() if key != section})
    with pytest.raises(UserError, match=r"^task\.name=None: must be text"):
        limits.check_config(made | {"task": {}})
