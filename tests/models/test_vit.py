"""ViT, DeiT and the masked autoencoder against outputs of the reference, and against mutations that must be noticed."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import models, pytree
from fmjax.errors import UserError
from fmjax.hub import families, folders
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained, abstract_params
from fmjax.layers.grid import bicubic, resized, sinusoids_2d
from fmjax.models.vit_embed import patches
from fmjax.tasks import mae

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
TOLERANCE = 2.5e-5  # four times the largest error that was reached
pytestmark = pytest.mark.usefixtures("eager")
SIZE = {"width": 12, "layers": 1, "attention_heads": 3, "mlp_width": 8, "image_size": 8, "patch_size": 2, "channels": 1}


@functools.cache
def golden(case: str) -> Pretrained:
    return load(GOLDEN / case)


def expected(case: str, part: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the inputs and the reference's outputs of one set of a golden folder."""
    with np.load(GOLDEN / case / "expected.npz") as stored:
        arrays = {name.partition(".")[2]: stored[name] for name in stored.files if name.startswith(part)}
    inputs = {name: arrays.pop(name) for name in ("pixel_values", "patch_keep") if name in arrays}
    arrays.pop("loss", None)
    return inputs, arrays


def error(model: Pretrained, case: str, part: str = "own", **changed: np.ndarray) -> float:
    """Returns the largest absolute error over all outputs."""
    inputs, outputs = expected(case, part)
    found = model.apply(**inputs | changed)
    assert set(outputs) <= set(found)
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in outputs.items() if name in found)


def changed(model: Pretrained, **settings: object) -> Pretrained:
    return dataclasses.replace(model, model=model.model.clone(settings=dataclasses.replace(model.model.settings, **settings)))


def test_all_cases_are_found():
    assert CASES == ["deit_distilled", "deit_model", "vit_classify", "vit_mae", "vit_model"]


@pytest.mark.parametrize("part", ["own", "other"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_reference(case, part):
    assert error(golden(case), case, part) <= TOLERANCE


def test_compiled_and_scanned_are_the_same():
    with jax.disable_jit(False):
        assert error(changed(golden("vit_mae"), scan_layers=True), "vit_mae") <= TOLERANCE


@pytest.mark.parametrize("case", ["vit_classify", "vit_mae", "deit_model"])
@pytest.mark.parametrize("mutation", [{"activation": "gelu_new"}, {"epsilon": 1e-2}])
def test_settings_matter(case, mutation):
    assert error(changed(golden(case), **mutation), case) > 4 * TOLERANCE


def test_choices_matter():
    assert error(changed(golden("vit_model"), pooler_activation="tanh"), "vit_model") > 4 * TOLERANCE
    assert error(changed(golden("vit_classify"), pool="mean"), "vit_classify") > 4 * TOLERANCE


@pytest.mark.parametrize("case", ["vit_classify", "vit_mae", "deit_distilled"])
def test_every_parameter_matters(case):
    model = golden(case)
    inputs, _ = expected(case, "own")
    batch = model.checked_batch(inputs)
    kind = next(iter(model.model.heads))
    with jax.disable_jit(False):
        output = jax.jit(lambda params: model.model.apply({"params": params}, batch)[kind])
        right = output(model.params)
        for zeroed in pytree.names(model.params):
            wrong = output(pytree.map_named(lambda name, leaf, zeroed=zeroed: leaf * (name != zeroed), model.params))
            # A key's bias adds the same to all scores of a query, which softmax takes out again.
            assert (float(abs(wrong - right).max()) > 4 * TOLERANCE) == (not zeroed.endswith("key/bias")), zeroed


def test_which_patches_are_seen_matters_and_their_order_does_not():
    inputs, _ = expected("vit_mae", "own")
    keep = inputs["patch_keep"]
    model = golden("vit_mae")
    right = np.asarray(model.apply(**inputs)["logits"])
    assert np.abs(np.asarray(model.apply(**inputs | {"patch_keep": keep[:, ::-1]})["logits"]) - right).max() <= TOLERANCE
    assert np.abs(np.asarray(model.apply(**inputs | {"patch_keep": (keep + 1) % 16})["logits"]) - right).max() > 0.1


def test_patches_are_read_row_by_row():
    images = np.arange(2 * 5 * 6 * 3).reshape(2, 5, 6, 3)
    found = patches(images, 2)
    assert found.shape == (2, 6, 2, 2, 3)
    assert np.array_equal(found[1, 4], images[1, 2:4, 2:4])


@pytest.mark.parametrize("old", [1, 3, 7])
@pytest.mark.parametrize("new", [1, 3, 8])
def test_resampling_keeps_constants_and_the_same_size(old, new):
    matrix = bicubic(old, new)
    assert matrix.shape == (new, old) and np.allclose(matrix.sum(axis=1), 1)
    assert np.array_equal(bicubic(old, old), np.eye(old, dtype=np.float32))
    assert np.allclose(matrix[::-1, ::-1], matrix, atol=1e-6)


def test_other_grids_leave_the_first_tokens_alone():
    table = np.random.default_rng(0).normal(size=(1, 11, 4)).astype(np.float32)
    assert resized(table, 2, (3, 3)) is table
    assert np.array_equal(resized(table, 2, (2, 5))[:, :2], table[:, :2]) and resized(table, 2, (2, 5)).shape == (1, 12, 4)


def test_sinusoids_tell_columns_then_rows():
    table = sinusoids_2d(3, 8).reshape(3, 3, 8)
    assert np.array_equal(table[0, :, :4], table[2, :, :4]) and np.array_equal(table[:, 0, 4:], table[:, 2, 4:])
    assert np.allclose(table[2, 1, :4], np.concatenate([np.sin([1, 0.01]), np.cos([1, 0.01])]))


def test_loaded_positions_fit_another_image_size():
    model = golden("vit_classify")
    inputs, _ = expected("vit_classify", "own")
    pixels = np.pad(inputs["pixel_values"], ((0, 0), (0, 0), (0, 10), (0, 10)))
    settings = dataclasses.replace(model.model.settings, image_size=30)
    moved = dataclasses.replace(
        model, model=model.model.clone(settings=settings), params=model.family.fit_params(model.params, settings)
    )
    assert moved.params["embed"]["position"].shape == (1, 37, 24)
    assert np.allclose(moved.apply(pixel_values=pixels)["logits"], model.apply(pixel_values=pixels)["logits"], atol=1e-5)


def test_mean_pooling_is_of_the_patches():
    inputs, outputs = expected("vit_classify", "own")
    model = golden("vit_classify")
    found = changed(model, pool="mean").apply(**inputs)
    head = model.params["head"]["classify"]
    assert np.allclose(
        found["logits"], outputs["last_hidden_state"][:, 1:].mean(axis=1) @ head["kernel"] + head["bias"], atol=TOLERANCE
    )


def test_the_loss_of_masked_patches_is_that_of_the_reference():
    inputs, _ = expected("vit_mae", "own")
    model = golden("vit_mae")
    batch = model.checked_batch(inputs)
    outputs = {"pixels": model.apply(**inputs)["logits"]}
    with np.load(GOLDEN / "vit_mae" / "expected.npz") as stored:
        right = float(stored["own.loss"])
    task = mae.Task(image_size=20, patch_size=5, channels=3)
    loss = float(task.loss(outputs, batch)["pixels"] / task.weights(batch)["pixels"])
    assert abs(loss - right) <= 1e-5 * right
    plain = dataclasses.replace(task, target="pixels")
    assert abs(float(plain.loss(outputs, batch)["pixels"] / plain.weights(batch)["pixels"]) - right) > 1e-3


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_tables_cover_every_architecture(name):
    family, table = models.family(name), families.table_of(name)
    ours = {name for rule in table.weights for name in rule.params}
    assert len({rule.spellings for rule in table.weights}) == len(table.weights) == len(ours)
    heads = {kind: {} for kinds in table.classes().values() for kind in kinds}
    decoder = {"decoder_width": 8, "decoder_layers": 1, "decoder_heads": 2, "decoder_mlp_width": 4}
    assert set(pytree.names(abstract_params(family.build(heads=heads, **SIZE, **decoder)))) == ours


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [("vit", "base", 86_567_656), ("deit", "tiny", 5_910_800)],
)
def test_published_sizes(name, size, count):
    heads = {"classify" if name == "vit" else "classify_distilled": {"classes": 1000}}
    abstract = abstract_params(models.family(name).build(heads=heads, size=size, scan_layers=True))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract)) == count


@pytest.mark.parametrize("case", CASES)
def test_settings_go_there_and_back(case):
    config = folders.read_config(GOLDEN / case)
    name, table = families.reference_of(config["model_type"])
    settings = table.read_settings(config)
    written = table.write_config(models.family(name).Settings(**settings))
    assert table.read_settings(written) == settings
    assert all(config[key] == value for key, value in written.items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "gelu_fast"}, 'hidden_act="gelu_fast"'),
        ({"pooler_act": "selu"}, 'pooler_act="selu"'),
        ({"image_size": [20, 40]}, r"image_size=\[20, 40\]"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"qkv_bias": 1}, "qkv_bias=1"),
        ({"use_mean_pooling": True}, "use_mean_pooling=true"),
        ({"num_register_tokens": 4}, "num_register_tokens=4"),
    ],
)
def test_settings_not_handled_are_refused_by_name(change, named):
    config = json.loads((GOLDEN / "vit_classify" / "config.json").read_text())
    with pytest.raises(UserError, match=named):
        families.table_of("vit").read_settings(config | change)
    assert families.table_of("vit").read_settings(config | {"image_size": [20, 20]})["image_size"] == 20


def test_what_the_reference_lacks_is_not_written(tmp_path):
    family = models.family("vit")
    with pytest.raises(UserError, match="model.pool=mean has no counterpart"):
        families.table_of("vit").write_config(family.Settings(**SIZE, pool="mean"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pool": "max"}, 'model.pool="max".*first, mean'),
        ({"position_init": "learnt"}, "model.position_init"),
        ({"class_tokens": 0}, "model.class_tokens=0: must be 1, or 0 with model.pool=mean"),
        ({"class_tokens": 2, "pool": "mean"}, "model.class_tokens=2"),
        ({"patch_size": 9}, "model.image_size=8 holds no patch of model.patch_size=9"),
        ({"decoder_width": 9}, "model.decoder_width=9 is not divisible by model.decoder_heads=16"),
        ({"width": 13}, "model.width=13"),
        ({"stochastic_depth": 1.0}, "model.stochastic_depth=1.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, named):
    with pytest.raises(UserError, match=named):
        models.family("vit").build(heads={"pixels": {}}, **SIZE | change)


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({}, "pixel_values is missing"),
        ({"pixel_values": np.zeros((1, 1, 20, 20), np.float32)}, r"has shape \(1, 1, 20, 20\).*3 channels"),
        ({"pixel_values": np.zeros((3, 20, 20), np.float32)}, "pixel_values: has shape"),
        ({"pixel_values": np.zeros((0, 3, 20, 20), np.float32)}, "pixel_values: has shape"),
        ({"pixel_values": np.zeros((1, 3, 20, 4), np.float32)}, "fewer than a patch of 5"),
        ({"pixel_values": np.zeros((1, 3, 20, 20), np.float32), "patch_keep": np.array([[0, 16]])}, "0 to 15"),
        ({"pixel_values": np.zeros((1, 3, 20, 20), np.float32), "patch_keep": np.array([0])}, "patch_keep: pass"),
        ({"pixel_values": np.zeros((1, 3, 25, 20), np.float32), "interpolate_pos_encoding": False}, "25 x 20 pixels are not"),
        ({"pixel_values": np.zeros((1, 3, 20, 20), np.float32), "input_ids": np.array([[1]])}, '"input_ids" is not an input'),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, named):
    with pytest.raises(UserError, match=named):
        golden("vit_classify").apply(**inputs)


def test_dropout_and_stochastic_depth_act_in_training_alone():
    model = changed(golden("vit_classify"), stochastic_depth=0.5).model
    images = np.ones((4, 20, 20, 3), np.float32)
    run = lambda rngs: model.apply({"params": golden("vit_classify").params}, {"images": images}, rngs=rngs)["classify"]  # noqa: E731
    with jax.disable_jit(False):
        first, second = run({"dropout": jax.random.key(0)}), run({"dropout": jax.random.key(1)})
        assert not np.allclose(first, second) and np.array_equal(run({}), run({}))


def test_flops_follow_the_patches_that_are_seen():
    model = models.family("vit").build(heads={}, size="base")
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), np.float32)
    assert 2 * 17.4e9 < model.forward_flops({"images": images}) < 2 * 17.7e9  # 17.6 G multiplications and additions
    kept = model.forward_flops({"images": images, "patch_keep": jax.ShapeDtypeStruct((1, 49), np.int32)})
    assert kept < 0.3 * model.forward_flops({"images": images})


def masked_vit(**changes):
    """Returns a small ViT with random parameters, and the function of a batch."""
    size = {"width": 8, "layers": 2, "attention_heads": 2, "mlp_width": 12, "image_size": 8, "patch_size": 2, "scan_layers": True}
    decoder = {"decoder_width": 8, "decoder_layers": 1, "decoder_heads": 2, "decoder_mlp_width": 12}
    model = models.family("vit").build(**{"heads": {"classify": {}}, **size, **decoder, **changes})
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(model))
    apply = jax.jit(model.apply)
    return lambda **batch: apply({"params": params}, {name: jnp.asarray(array) for name, array in batch.items()})


OTHERS = [{"pool": "mean", "class_tokens": 0}, {"heads": {"pixels": {}}}]


@pytest.mark.parametrize("changes", [{}, *(pytest.param(one, marks=pytest.mark.full) for one in OTHERS)])
def test_an_image_on_a_canvas_is_the_image_alone(changes):
    apply, rng = masked_vit(**changes), np.random.default_rng(1)
    head = next(iter(changes.get("heads", {"classify": {}})))
    # A square, two rectangles, one of which ends inside a patch, and the whole canvas.
    sizes = [(8, 8), (6, 10), (5, 4), (10, 12)]
    canvas = rng.normal(size=(4, 10, 12, 3)).astype(np.float32)  # what is masked is no zero
    mask = np.zeros((4, 10, 12), np.int32)
    for row, (height, width) in enumerate(sizes):
        mask[row, :height, :width] = 1
    found = apply(images=canvas, pixel_mask=mask)
    tokens = 0 if "class_tokens" in changes else 1
    for row, (height, width) in enumerate(sizes):
        alone = apply(images=canvas[row : row + 1, :height, :width])
        grid = np.zeros((5, 6), bool)
        grid[: height // 2, : width // 2] = True
        own = np.concatenate([np.ones(tokens, bool), grid.reshape(-1)])
        np.testing.assert_allclose(found["hidden"][row][own], alone["hidden"][0], atol=1e-5)
        if head == "classify":
            np.testing.assert_allclose(found["classify"][row], alone["classify"][0], atol=1e-5)
    if head == "classify":
        assert np.abs(found["classify"] - apply(images=canvas)["classify"])[:3].max(axis=1).min() > 1e-3
    whole = apply(images=canvas, pixel_mask=np.ones_like(mask))
    for name, array in apply(images=canvas).items():
        np.testing.assert_allclose(whole[name], array, atol=1e-5)


def test_patches_that_are_kept_on_a_canvas_are_masked_with_it():
    apply = masked_vit(heads={"pixels": {}})
    canvas = np.random.default_rng(1).normal(size=(1, 8, 12, 3)).astype(np.float32)
    mask = np.zeros((1, 8, 12), np.int32)
    mask[:, :8, :8] = 1
    # Patches of the left 4 x 4, numbered on the canvas of 4 x 6 and in the image alone; 5 is masked.
    on_canvas, alone = np.array([[0, 8, 15, 5]]), np.array([[0, 6, 11]])
    found = apply(images=canvas, pixel_mask=mask, patch_keep=on_canvas)
    expected = apply(images=canvas[:, :, :8], patch_keep=alone)
    np.testing.assert_allclose(found["hidden"][:, :4], expected["hidden"], atol=1e-5)
