"""Classification of images and masked autoencoding: what is found in the data, examples, losses, metrics, and predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.special import log_softmax
from support.processors import images_of
from support.sources import MemoryRecords

from fmjax import models
from fmjax.config import write_config
from fmjax.data.stream.batches import TrainBatches, eval_batches
from fmjax.errors import UserError
from fmjax.inference.evaluate import evaluate
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained, abstract_params
from fmjax.runs.checkpoint import Checkpoints
from fmjax.tasks import make

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (12, 8, 8, 3), np.uint8)
SIZED = {"image_size": 8, "channels": 3}
CLASSIFY = {"name": "image_classify", "labels": ("cat", "dog", "owl"), **SIZED}
MAE = {"name": "mae", "patch_size": 2, **SIZED}
SETTINGS = {"width": 12, "layers": 1, "attention_heads": 3, "mlp_width": 8, "image_size": 8, "patch_size": 2, "channels": 3}
SETTINGS |= {"decoder_width": 8, "decoder_layers": 1, "decoder_heads": 2, "decoder_mlp_width": 8}


class Records(MemoryRecords):
    place, first = "image", 0


def source(*labels: object, shape: tuple[int, ...] = (8, 8, 3)) -> Records:
    pictures = RNG.integers(0, 256, (len(labels), *shape), np.uint8)
    return Records({"image": picture, "label": label} for picture, label in zip(pictures, labels, strict=True))


ANIMALS = Records({"image": picture, "label": ("cat", "dog", "owl")[number % 3]} for number, picture in enumerate(PICTURES))


def refused(message: str, call, *args) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["image_classify", "mae"])
def test_settings_are_found_in_the_training_data(name):
    task = make({"name": name} | ({"patch_size": 2} if name == "mae" else {}))
    labels = {"labels": ("0", "1", "2")} if name == "image_classify" else {}
    assert task.resolve(source(2, 0, 1, 1)) == {"image_size": 8, "channels": 3} | labels
    assert task.resolve(source(0, 1, 2, shape=(6, 6, 1))) == {"image_size": 6, "channels": 1} | labels
    given = dataclasses.replace(task, image_size=4, channels=1)
    assert given.resolve(source(0, 1, 2, shape=(5, 7, 3))) == labels
    unlike = Records([*source(0, 1), *source(2, shape=(8, 9, 3))])
    refused("image 2: is 8 x 9 pixels, but image 0 is 8 x 8; resize all of them with task.image_size", task.resolve, unlike)
    unlike = Records([*source(0, 1), *source(2, shape=(8, 8, 1))])
    refused("image 2: has 1 channels, but image 0 has 3; convert all of them with task.channels", task.resolve, unlike)
    refused("image 0: is 8 x 9 pixels, not square; set task.image_size", task.resolve, source(0, shape=(8, 9, 3)))
    refused('no column "image"', task.resolve, Records([{"picture": 1, "label": 0}]))


def test_labels_and_class_weights():
    task = make({"name": "image_classify", "weighting": "balanced"} | SIZED)
    assert task.resolve(source("b", "a", "b", "b")) == {"labels": ("a", "b"), "class_weights": (2.0, round(2 / 3, 6))}
    assert make(CLASSIFY).heads == {"classify": {"classes": 3}}
    assert make(CLASSIFY | {"head": "classify_distilled"}).heads == {"classify_distilled": {"classes": 3}}
    assert "f1" in make(CLASSIFY | {"labels": ("a", "b")}).measures and "f1" not in make(CLASSIFY).measures
    refused(
        r'image 1: label "dgo" is out of range \(did you mean "dog"\?\)',
        make(CLASSIFY).examples,
        source("cat", "dgo"),
        None,
        0,
        True,
    )
    refused("image 1: .* holds None, not a label", task.resolve, source("a", None))
    examples = make(CLASSIFY).examples(ANIMALS, images_of(make(CLASSIFY)), 0, True)
    assert examples.classes.tolist() == [0, 1, 2] * 4 and examples.classes.dtype == np.int32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "bilinera"}, r'task.resize="bilinera" \(did you mean "bilinear"\?\)'),
        ({"fit": "crop"}, 'task.fit="crop".*stretch, shortest'),
        ({"image_size": -1}, "task.image_size=-1: must not be negative"),
        ({"shift": -1}, "task.shift=-1"),
        ({"channels": 2}, "task.channels=2"),
        ({"resize_size": 4}, "task.resize_size=4 needs a task.image_size that is not larger"),
        ({"mean": (0.1, 0.2)}, "task.mean=0.1,0.2: use one number, or one per channel"),
        ({"mean": (float("nan"),)}, "task.mean=nan"),
        ({"std": (0.0,)}, "task.std=0.0: must be above 0"),
        ({"flip": 1.1}, "task.flip=1.1: must be from 0 to 1; a probability"),
        ({"crop": 0.0}, "task.crop=0.0: must be above 0 and at most 1; a fraction"),
        ({"rand_augment": -1}, "task.rand_augment=-1"),
        ({"rand_magnitude": 10.5}, "task.rand_magnitude=10.5"),
        ({"erase": -0.1}, "task.erase=-0.1"),
        ({"mixup": -1.0}, "task.mixup=-1.0: must not be negative"),
        ({"cutmix": float("inf")}, "task.cutmix=inf"),
        ({"cutmix": float("nan")}, "task.cutmix=nan"),
        ({"mixup": 1.0, "focal_gamma": 2.0}, "task.focal_gamma needs unmixed labels"),
        ({"label_smoothing": 1.0}, "task.label_smoothing=1.0"),
        ({"class_weights": (1.0,)}, "task.class_weights has 1 numbers for 3 labels"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings, message):
    refused(message, make, CLASSIFY | settings)


RESIZED = {"image_size": 4, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.2)}


@pytest.mark.parametrize("name", ["image_classify", "mae"])
def test_examples_are_resized_and_evaluated_as_they_are(name):
    task = make((CLASSIFY if name == "image_classify" else MAE) | RESIZED | {"flip": 0.5, "shift": 1, "crop": 0.5})
    examples = task.examples(ANIMALS, images_of(task), 0, train=False)
    small = np.asarray(Image.fromarray(PICTURES[4]).resize((4, 4), Image.Resampling.BILINEAR))
    assert len(examples) == 12 and np.array_equal(examples[4]["images"], small)
    drawn = [examples.draw(examples[4], np.random.default_rng(seed))["images"] for seed in range(3)]
    for array in drawn:
        np.testing.assert_allclose(array, (small / 255 - RESIZED["mean"]) / RESIZED["std"], atol=1e-6)
        assert array.dtype == np.float32
    shortest = dataclasses.replace(task, fit="shortest", resize_size=6)
    tall = RNG.integers(0, 256, (20, 10, 3), np.uint8)
    whole = np.asarray(Image.fromarray(tall).resize((6, 12), Image.Resampling.BILINEAR))
    assert np.array_equal(images_of(shortest)["image"].resized(tall, "here"), whole[4:8, 1:5])


CHANGES = {
    "flip": {"flip": 0.5},
    "shift": {"shift": 2},
    "crop": {"crop": 0.3},
    "rand_augment": {"rand_augment": 2, "rand_magnitude": 9.0},
    "erase": {"erase": 0.5},
    "mixup": {"mixup": 0.5},
    "cutmix": {"cutmix": 1.0},
    "both": {"mixup": 0.5, "cutmix": 1.0},
    "all": {"flip": 0.5, "shift": 1, "crop": 0.5, "rand_augment": 1, "erase": 0.5, "mixup": 0.5, "cutmix": 1.0},
}


@pytest.mark.parametrize("change", CHANGES)
def test_training_changes_images_anew_and_the_same_for_a_seed_and_step(change):
    task = make(CLASSIFY | CHANGES[change])
    epochs = []
    for seed in (0, 0, 1):
        batches = TrainBatches(task.examples(ANIMALS, images_of(task), 0, train=True), batch_size=12, seed=seed)
        epochs.append([next(batches) for _ in range(2)])
    again = TrainBatches(task.examples(ANIMALS, images_of(task), 0, train=True), batch_size=12, seed=0)
    fresh = again.state()
    next(again)
    state = again.state()
    assert fresh != state
    again.restore(state)
    resumed = next(again)
    for name in ("images", "labels"):
        assert all(one[name].tobytes() == other[name].tobytes() for one, other in zip(*epochs[:2], strict=True))
        assert resumed[name].tobytes() == epochs[0][1][name].tobytes()
    first, second, other = epochs[0][0]["images"], epochs[0][1]["images"], epochs[2][0]["images"]
    assert first.shape == (12, 8, 8, 3) and first.dtype == np.float32
    rows = [{row.tobytes() for row in images} for images in (first, second, other)]
    assert rows[0] != rows[1] and rows[0] != rows[2]
    labels = epochs[0][0]["labels"]
    if task.mixes:
        assert labels.shape == (12, 3) and labels.dtype == np.float32 and labels.min() >= 0
        np.testing.assert_allclose(labels.sum(axis=1), 1, atol=1e-6)
        assert ((labels > 0) & (labels < 1)).any()
    else:
        assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4 and labels.dtype == np.int32
    evaluated = task.examples(ANIMALS, images_of(task), 0, train=False)
    [*_, last] = eval_batches(evaluated, batch_size=8, seed=0)
    np.testing.assert_allclose(last["images"][:4], PICTURES[8:] / 127.5 - 1, atol=1e-6)
    # The rows that fill up the batch are the first again, and do not count.
    assert last["labels"].tolist() == [2, 0, 1, 2] + [2] * 4 and last["valid"].tolist() == [1] * 4 + [0] * 4


def test_probability_0_is_the_identity():
    examples = make(CLASSIFY).examples(ANIMALS, images_of(make(CLASSIFY)), 0, train=True)
    for index in range(12):
        drawn = examples.draw(examples[index], np.random.default_rng(index))
        np.testing.assert_allclose(drawn["images"], PICTURES[index] / 127.5 - 1, atol=1e-6)
        assert drawn["labels"] == index % 3


def test_cutmix_labels_are_the_shares_of_the_pixels():
    black = Records({"image": np.full((8, 8, 3), 255 * (number % 2), np.uint8), "label": "ab"[number % 2]} for number in range(8))
    task = make({"name": "image_classify", "labels": ("a", "b"), "cutmix": 1.0, "mean": (0.0,), "std": (1.0,)} | SIZED)
    examples = task.examples(black, images_of(task), 0, train=True)
    for number in range(40):
        drawn = examples.draw(examples[number % 8], np.random.default_rng(number))
        assert drawn["labels"][1] == pytest.approx(drawn["images"].mean(dtype=np.float64), abs=1e-6)


LOGITS = RNG.normal(size=(4, 3)).astype(np.float32) * 2
HARD = np.array([0, 2, 1, 2], np.int32)
SOFT = RNG.dirichlet(np.ones(3), 4).astype(np.float32)


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 0.5)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
def test_the_loss_by_hand(labels, smoothing, weights):
    task = make(CLASSIFY | {"label_smoothing": smoothing, "class_weights": weights})
    batch, outputs = {"labels": labels}, {"classify": LOGITS}
    shares = np.eye(3)[HARD] if labels is HARD else labels.astype(np.float64)
    each = np.array(weights or (1, 1, 1))
    losses = -((1 - smoothing) * shares + smoothing / 3) * log_softmax(LOGITS.astype(np.float64), axis=1)
    expected = losses.sum(axis=1) * (shares @ each)
    assert float(task.loss(outputs, batch)["classify"]) == pytest.approx(expected.sum(), rel=1e-5)
    assert float(task.weights(batch)["classify"]) == pytest.approx((shares @ each).sum(), rel=1e-6)
    half = [{"labels": labels[part]} for part in (slice(2), slice(2, 4))]
    parts = [
        task.loss({"classify": LOGITS[part]}, own)["classify"] for part, own in zip((slice(2), slice(2, 4)), half, strict=True)
    ]
    assert float(sum(parts)) == pytest.approx(expected.sum(), rel=1e-5)


def test_metrics_of_a_perfect_prediction_and_of_rows_that_do_not_count():
    task = make(CLASSIFY | {"label_smoothing": 0.2, "class_weights": (1.0, 5.0, 1.0), "mixup": 1.0})
    examples = task.examples(ANIMALS, images_of(task), 0, train=False)
    batches = eval_batches(examples, batch_size=8, seed=0)

    def perfect(params, batch):
        return task.predictions({"classify": 30 * jax.nn.one_hot(batch["labels"], 3)}, batch)

    metrics = evaluate(perfect, task, {}, batches, examples)
    assert set(metrics) == set(task.measures) and metrics.pop("loss") < 1e-6  # neither smoothed nor weighted
    assert all(value == pytest.approx(1) for value in metrics.values())
    valid = np.array([1.0, 1, 1, 0])
    arrays = {name: np.asarray(array) for name, array in task.predictions({"classify": LOGITS}, {"labels": HARD}).items()}
    expected = -log_softmax(LOGITS.astype(np.float64), axis=1)[np.arange(4), HARD]
    np.testing.assert_allclose(arrays["losses"], expected, rtol=1e-5)
    found = task.metrics(arrays, valid)
    assert found["loss"] == pytest.approx(expected[:3].mean(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((LOGITS.argmax(axis=1) == HARD)[:3].mean())


@pytest.mark.parametrize("settings", [CLASSIFY, CLASSIFY | {"mixup": 1.0}, MAE], ids=["classify", "mixed", "mae"])
def test_a_model_and_a_task_fit_each_other_in_shape(settings):
    task = make(settings)
    model = models.family("vit").build(heads=task.heads, **SETTINGS)
    batch = next(TrainBatches(task.examples(ANIMALS, images_of(task), 0, train=True), batch_size=4, seed=0))
    spec = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
    outputs = jax.eval_shape(lambda params, batch: model.apply({"params": params}, batch), abstract_params(model), spec)
    for found in (jax.eval_shape(task.loss, outputs, spec), jax.eval_shape(task.weights, spec)):
        assert {name: (leaf.shape, leaf.dtype) for name, leaf in found.items()} == {next(iter(found)): ((), jnp.float32)}
    predicted = jax.eval_shape(task.predictions, outputs, spec)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(predicted)} == {4}


def make_run(folder: Path, settings: dict, **model: object) -> Pretrained:
    """Writes a run with random parameters, as training does, and loads it."""
    task = make(settings)
    built = models.family("vit").build(heads=task.heads, **SETTINGS | model)
    config = {
        "model": {"name": "vit"} | dataclasses.asdict(built.settings),
        "task": settings,
        "data": {"max_length": 8},
        "checkpoint": {"mode": "max"},
    }
    write_config(folder, config)
    params = jax.tree.map(lambda leaf: RNG.normal(0, 0.3, leaf.shape).astype(np.float32), abstract_params(built))
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(3, {"params": params, "step": np.int32(3)}, {})
    checkpoints.close()
    return load(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """Images of several sizes and modes."""
    folder = tmp_path_factory.mktemp("files")
    pictures = [Image.fromarray(PICTURES[0]), Image.fromarray(RNG.integers(0, 256, (11, 17), np.uint8))]
    pictures.append(Image.fromarray(RNG.integers(0, 256, (20, 9, 4), np.uint8)))
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    return [str(folder / f"{number}.png") for number in range(3)]


def test_a_classifier_reads_files_and_stays_itself_when_it_is_exported(tmp_path, files):
    settings = CLASSIFY | {"mean": [0.1, 0.2, 0.3], "std": [0.5], "resize": "bicubic", "resize_size": 9, "fit": "shortest"}
    run = make_run(tmp_path / "run", settings)
    assert run.tokenizer is None and run.step == 3 and run.task == make(settings)
    found = run.predict(files)
    images = run.processors["image"].arrays(files, str)["images"]
    logits = np.asarray(run.apply(pixel_values=images.transpose(0, 3, 1, 2))["logits"])
    scores = np.exp(log_softmax(logits, axis=1))
    for row, one in zip(scores, found, strict=True):
        assert one["label"] == CLASSIFY["labels"][row.argmax()] and one["score"] == pytest.approx(row.max(), rel=1e-5)
        assert list(one["scores"]) == list(CLASSIFY["labels"]) and list(one["scores"].values()) == pytest.approx(row, rel=1e-5)
    again = run.predict([Image.open(files[0]), {"image": files[0]}, PICTURES[0]])
    assert all(one["scores"] == pytest.approx(found[0]["scores"], rel=1e-5) for one in again)

    run.save(tmp_path / "folder")
    folder = load(tmp_path / "folder")
    assert folder.config["architectures"] == ["ViTForImageClassification"] and folder.processors["image"].resize_size == 9
    assert np.array_equal(folder.apply(pixel_values=images.transpose(0, 3, 1, 2))["logits"], logits)
    assert [one["scores"] for one in folder.predict(files)] == [pytest.approx(one["scores"], rel=1e-5) for one in found]
    folder.save(tmp_path / "again")
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def test_a_masked_autoencoder_reads_files_and_stays_itself_when_it_is_exported(tmp_path, files):
    run = make_run(tmp_path / "run", MAE, position_init="sinusoids", width=24)
    first, again = run.predict(files), run.predict(files)
    assert first == again and all(set(one) == {"error", "seen"} and one["error"] > 0 for one in first)
    batch = run.task.inputs(files, run.processors, 0, str)
    assert [one["seen"] for one in first] == batch["patch_keep"].tolist() and batch["patch_keep"].shape == (3, 4)
    run.save(tmp_path / "folder")
    folder = load(tmp_path / "folder")
    assert folder.config["architectures"] == ["ViTMAEForPreTraining"]
    # The same model with the same parameters: logits need not be computed to be the same.
    assert folder.model == run.model and jax.tree.all(jax.tree.map(np.array_equal, folder.params, run.params))
    refused("ViTMAEForPreTraining has no human-readable output", folder.predict, files)


def test_what_is_no_image_is_named(tmp_path, files):
    (tmp_path / "cut.png").write_bytes(Path(files[0]).read_bytes()[:-30])
    model = load(GOLDEN / "vit_classify")
    for wrong, message in (
        ("nowhere.png", 'example 1: "nowhere.png" cannot be read'),
        (str(tmp_path / "cut.png"), "cut.png: is not a complete image"),
        ({"picture": files[0]}, 'example 1: lacks "image", which the task reads; add it'),
        (5, "example 1: 5 is not an image"),
        (RNG.integers(0, 256, (8, 8, 4), np.uint8), "example 1: has 4 channels, which cannot be converted to 3"),
    ):
        refused(message, model.predict, [files[0], wrong])
