"""Starting from other weights: whose sizes a model has, and which rows of a classifier are which
labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fmjax import pytree, tasks
from fmjax.errors import UserError
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained
from fmjax.train.warm_start import fit_heads, rows, start_from

GOLDEN = Path(__file__).parents[1] / "golden"
# A head of each kind, and the parameters that have a row for each class, with its axis.
HEADS = {
    "bert_classify": ({"name": "classify"}, ("head/classify/kernel", "head/classify/bias")),
    "roberta_classify": ({"name": "classify"}, ("head/classify/kernel", "head/classify/bias")),
    "bert_tag": ({"name": "tag"}, ("head/tag/kernel", "head/tag/bias")),
    "vision/vit_classify": (
        {"name": "image_classify", "image_size": 16},
        ("head/classify/kernel", "head/classify/bias"),
    ),
    "vision/deit_distilled": (
        {"name": "image_classify", "image_size": 16, "head": "classify_distilled"},
        tuple(
            f"head/classify_distilled/{token}/{leaf}"
            for token in ("class_token", "distillation_token")
            for leaf in ("kernel", "bias")
        ),
    ),
}


def source_of(case: str, *labels: str, **config: object) -> Pretrained:
    """Returns the weights of a golden folder, whose classes have these names."""
    names = {"id2label": {str(index): label for index, label in enumerate(labels)}}
    found = load(GOLDEN / case)
    return dataclasses.replace(found, config={**found.config, **names, **config})


def fitted(source: Pretrained, settings: dict, *labels: str) -> tuple[dict, list[str]]:
    """Returns the parameters for a run with these labels, by name, and what is said."""
    task = tasks.make({**settings, "labels": labels})
    params, lines = fit_heads(source.params, source, source.model.clone(heads=task.heads), task)
    return pytree.names(params), lines


@pytest.mark.parametrize("case", HEADS)
def test_rows_follow_the_names_of_labels(case):
    settings, leaves = HEADS[case]
    count = len(pytree.names(load(GOLDEN / case).params)[leaves[1]])
    theirs = [f"class {letter}" for letter in "cabde"[:count]]
    source = source_of(case, *theirs)
    found, [line] = fitted(source, settings, *sorted(theirs))
    order = [theirs.index(label) for label in sorted(theirs)]
    assert order != sorted(order)
    before = pytree.names(source.params)
    for name in leaves:
        np.testing.assert_array_equal(found[name], np.asarray(before[name])[..., order])
    for name in set(before) - set(leaves):
        assert found[name] is before[name]
    assert f"the run has {', '.join(sorted(theirs))}, the weights {', '.join(theirs)}" in line

    # The same order says nothing; other names leave the last layer out, so that it starts fresh.
    assert fitted(source, settings, *theirs)[1] == []
    found, [line] = fitted(source, settings, *theirs[:-1], "other")
    assert set(before) - set(found) == set(leaves)
    assert line.endswith(
        f"is newly initialized: the run has {', '.join(theirs[:-1])}, other, the weights {', '.join(theirs)}"
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "order"),
    [
        (("entailment", "neutral"), ("NEUTRAL", "ENTAILMENT"), (1, 0)),
        (("0", "1"), ("LABEL_0", "LABEL_1"), (0, 1)),
        (("no", "yes"), ("LABEL_0", "LABEL_1"), None),
        (("no", "yes"), ("no", "yes", "maybe"), None),
        (("a", "A"), ("A", "a"), (1, 0)),
        (("a", "A"), ("A", "b"), None),
    ],
)
def test_which_labels_are_the_same(ours, theirs, order):
    assert rows(ours, theirs) == order


def test_classes_without_names_are_not_taken_by_number():
    source = source_of("bert_classify", "LABEL_0", "LABEL_1", "LABEL_2")
    found, [line] = fitted(source, {"name": "classify"}, "no", "perhaps", "yes")
    assert "head/classify/kernel" not in found and line.endswith(
        "; to keep it, list its labels in id2label in config.json"
    )


def test_a_regression_is_no_class():
    source = source_of("bert_classify", "x", problem_type="regression")
    regression = {"name": "classify", "kind": "regression"}
    assert fitted(source, regression)[1] == []
    found, [line] = fitted(source, {"name": "classify"}, "x")
    assert "head/classify/kernel" not in found and "the weights (a number)" in line


def test_the_parts_of_a_mixture_have_labels_of_their_own():
    source = source_of("bert_classify", "b", "c", "a")
    parts = {
        "first": {"name": "classify", "labels": ("a", "b", "c")},
        "second": {"name": "mlm", "split": "other"},
    }
    found, [line] = fitted_mixture(source, parts)
    before = pytree.names(source.params)["head/classify/bias"]
    np.testing.assert_array_equal(found["head/classify/bias"], before[[2, 0, 1]])
    assert line.startswith("head/classify has its rows matched by label name")


def fitted_mixture(source: Pretrained, parts: dict) -> tuple[dict, list[str]]:
    task = tasks.make({"name": "mixture", "parts": parts})
    params, lines = fit_heads(source.params, source, source.model.clone(heads=task.heads), task)
    return pytree.names(params), lines


# As configs/gpt_clm.py has them; the weights are 24 wide and have 2 layers of 4 heads.
FILE = {"width": 256, "layers": 6, "attention_heads": 8, "mlp_width": 688, "dropout": 0.3}
FAMILIES = {
    "llama": ("decoders/llama_lm", FILE | {"kv_heads": 8}),
    "gpt": ("decoders/gpt2_lm", FILE | {"positions": 7}),
}


def begun(case: str, section: dict, *overridden: str) -> dict:
    """Returns the section `model` of a run that starts from a golden folder."""
    config = {"model": section, "init": {"weights": "DIR"}}
    return start_from(config, load(GOLDEN / case), overridden)["model"]


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_a_config_file_yield_to_the_weights(family, capsys):
    case, section = FAMILIES[family]
    found = begun(case, {"name": family} | section)
    assert found == {"name": family, "dropout": 0.3}
    said = capsys.readouterr().err
    assert said.startswith("init.weights=DIR: the sizes of the weights replace those of the config: width=")
    assert "(not 256)" in said and "layers=2 (not 6)" in said
    # Nothing is said, and nothing tried, where all agree.
    settings = dataclasses.asdict(load(GOLDEN / case).model.settings)
    same = {"name": family} | {name: settings[name] for name in section}
    assert begun(case, same) == same and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("key", "section", "message"),
    [
        ("model.layers", {"layers": 6}, "model.layers=6, but init.weights=DIR has layers=2; leave"),
        ("model.positions", {"positions": 7}, "model.positions=7, but init.weights=DIR has "),
        ("model.size", {"size": "base"}, "model.size=base, which is width=768, but init.weights="),
    ],
)
def test_a_size_that_the_user_sets_is_not_given_up(key, section, message):
    case = "decoders/gpt2_lm"
    with pytest.raises(UserError, match=message):
        begun(case, {"name": "gpt"} | section, key)
    assert begun(case, {"name": "gpt"} | section) == {"name": "gpt"}


def test_settings_that_shape_no_parameter_stay():
    section = {"name": "llama", "context": 99, "scan_layers": True, "rotary_base": 5.0}
    assert begun("decoders/llama_lm", section) == section


def test_images_of_another_size_are_no_contradiction():
    section = {"name": "vit", "image_size": 25}
    settings = load(GOLDEN / "vision/vit_classify").model.settings
    assert settings.image_size != 25 and 25 % settings.patch_size == 0
    assert begun("vision/vit_classify", section, "model.image_size") == section
