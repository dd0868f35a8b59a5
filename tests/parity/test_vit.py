"""ViT, DeiT and the masked autoencoder against the reference itself, on fresh random models: outputs at any image size,
saving, loading, and images read from files.

Needs torch and transformers: `pip install -e '.[parity]'`.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with the reference live: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="compares with the reference live: pip install -e '.[parity]'")

from golden import make, make_vision  # noqa: E402
from PIL import Image  # noqa: E402

import fmjax  # noqa: E402
from fmjax import tasks  # noqa: E402
from fmjax.hub.families import table_of  # noqa: E402
from fmjax.layers.grid import sinusoids_2d  # noqa: E402
from fmjax.tasks import mae  # noqa: E402

pytestmark = pytest.mark.optimized

CLASSES = [name for family in ("vit", "deit") for name in table_of(family).classes()]
TOLERANCE, DEFAULT_TOLERANCE = 1e-4, 5e-6


@pytest.fixture(autouse=True)
def eager():
    with jax.disable_jit():
        yield


def varied(name: str, seed: int) -> dict:
    """Returns settings of random sizes."""
    rng = np.random.default_rng(seed)
    heads, patch = int(rng.integers(1, 5)), int(rng.integers(2, 6))
    sizes = {
        "hidden_size": heads * int(rng.integers(4, 12)) * (4 if "MAE" in name else 1),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(10, 90)),
        "patch_size": patch,
        "image_size": patch * int(rng.integers(2, 6)),
        "num_channels": int(rng.choice([1, 3])),
        "qkv_bias": bool(rng.integers(2)),
        "layer_norm_eps": float(rng.choice([1e-12, 1e-5, 1e-2])),
    }
    labels = make.LABELS if "Classification" in name else {}
    return sizes | labels | (make_vision.DECODER if "MAE" in name else {})


def error(model: fmjax.inference.pretrained.Pretrained, reference, height: int, width: int, seed: int) -> float:
    arrays = make_vision.outputs(reference, make_vision.images(reference.config, 3, height, width, seed), seed)
    inputs = {name: arrays.pop(name) for name in ("pixel_values", "patch_keep") if name in arrays}
    arrays.pop("loss", None)
    found = model.apply(**inputs)
    assert set(found) <= set(arrays)
    return max(float(np.abs(np.asarray(found[name]) - arrays[name]).max()) for name in found)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_saving_and_loading(name, seed, tmp_path):
    reference = make.reference(name, varied(name, seed), seed)
    reference.save_pretrained(tmp_path / "theirs")
    model = fmjax.load(tmp_path / "theirs")
    size, patch = reference.config.image_size, reference.config.patch_size
    for height, width in ((size, size), (size + 3 * patch, size + 3 * patch), (2 * patch, 3 * patch)):
        assert error(model, reference, height, width, seed) <= TOLERANCE

    model.save(tmp_path / "ours")
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    assert all(torch.equal(a, b) for a, b in zip(reference.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "ours")) is type(reference.config)
    # What a run would write is the same config.
    config, written = model.config, model.reference.write_config(model.model.settings)
    assert {key: config[key] for key in written} == written


@pytest.mark.parametrize("name", CLASSES)
def test_usual_initialisation(name, tmp_path):
    settings = make_vision.SMALL | {"layer_norm_eps": 1e-12} | (make_vision.DECODER if "MAE" in name else {})
    reference = make.reference(name, settings, seed=3, scale=0.0)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, 20, 20, 3) <= DEFAULT_TOLERANCE
    assert error(fmjax.load(tmp_path), reference, 30, 15, 3) <= DEFAULT_TOLERANCE


@pytest.mark.parametrize("act", ["gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"])
def test_activations(act, tmp_path):
    reference = make.reference("ViTModel", make_vision.SMALL | {"hidden_act": act, "pooler_act": act}, seed=4)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, 20, 20, 4) <= TOLERANCE


def test_mae_loss(tmp_path):
    settings = make_vision.SMALL | make_vision.DECODER | {"norm_pix_loss": False}
    for wanted in (True, False):
        reference = make.reference("ViTMAEForPreTraining", settings | {"norm_pix_loss": wanted}, seed=5, scale=0.0)
        reference.save_pretrained(tmp_path / str(wanted))
        model = fmjax.load(tmp_path / str(wanted))
        arrays = make_vision.outputs(reference, make_vision.images(reference.config, 4, 20, 20, 5), 5)
        inputs = {name: arrays[name] for name in ("pixel_values", "patch_keep")}
        batch = model.checked_batch(inputs)
        task = mae.Task(image_size=20, patch_size=5, channels=3, target="normalised" if wanted else "pixels")
        loss = task.loss({"pixels": model.apply(**inputs)["logits"]}, batch)["pixels"] / task.weights(batch)["pixels"]
        assert abs(float(loss) - float(arrays["loss"])) <= 1e-5


def test_fixed_positions_are_those_of_the_published_weights():
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    rows_first = build_2d_sinusoidal_position_embedding(5, 5, 24).numpy()
    # The published weights have the columns first.
    assert np.abs(sinusoids_2d(5, 24) - np.roll(rows_first, 12, axis=1)).max() <= 1e-6


PROCESSORS = {
    "vit": ("ViTImageProcessorPil", {"size": {"height": 20, "width": 20}}),
    "deit": ("DeiTImageProcessorPil", {"size": {"height": 26, "width": 26}, "crop_size": {"height": 20, "width": 20}}),
    "shortest": (
        "DeiTImageProcessorPil",
        {"size": {"shortest_edge": 23}, "crop_size": {"height": 20, "width": 20}, "resample": 2, "image_mean": [0.1, 0.2, 0.3]},
    ),
    "plain": ("ViTImageProcessorPil", {"size": {"height": 20, "width": 20}, "do_normalize": False, "resample": 0}),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_images_of_files_are_read_as_the_reference_does(case, tmp_path):
    name, settings = PROCESSORS[case]
    reference = make.reference("ViTForImageClassification", make_vision.SMALL | make.LABELS, seed=6)
    reference.save_pretrained(tmp_path)
    processor = getattr(transformers, name)(**settings)
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(6)
    paths = []
    for number, shape in enumerate(((31, 47, 3), (20, 20, 3), (64, 24, 3))):
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(paths[-1])
    pixels = [processor(Image.open(path), return_tensors="pt").pixel_values for path in paths]
    with torch.no_grad():
        scores = reference(torch.cat(pixels)).logits.softmax(-1).numpy()

    model = fmjax.load(tmp_path)
    assert model.processors["image"].settings()["image_size"] == 20
    task = tasks.make({"name": "image_classify", "labels": ("no", "yes", "maybe"), **model.processors["image"].settings()})
    ours = task.inputs(paths, model.processors, 0, str)["images"].transpose(0, 3, 1, 2)
    assert np.abs(ours - torch.cat(pixels).numpy()).max() <= 1e-5
    for row, prediction in zip(scores, model.predict(paths), strict=True):
        assert prediction["label"] == ("no", "yes", "maybe")[row.argmax()]
        assert abs(prediction["score"] - row.max()) <= TOLERANCE

    model.save(tmp_path / "ours")
    again = fmjax.load(tmp_path / "ours")
    assert np.allclose([one["score"] for one in again.predict(paths)], scores.max(axis=1), atol=TOLERANCE)
    theirs = transformers.ViTImageProcessorPil.from_pretrained(tmp_path / "ours")
    found = torch.cat([theirs(Image.open(path), return_tensors="pt").pixel_values for path in paths])
    assert np.abs(found.numpy() - ours).max() <= 1e-5
