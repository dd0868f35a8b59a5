"""Masked autoencoding: how many patches are seen and which, what is to be predicted, the loss, and what the encoder sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.processors import images_of
from support.sources import MemoryRecords

from fmjax.data.stream.batches import TrainBatches
from fmjax.errors import UserError
from fmjax.inference.load import load
from fmjax.models.vit_embed import patches
from fmjax.tasks import make

GOLDEN = Path(__file__).parents[1] / "golden" / "vision"
RNG = np.random.default_rng(0)
MAE = {"name": "mae", "patch_size": 2, "image_size": 8, "channels": 3}


class Records(MemoryRecords):
    place, first = "image", 0


ANIMALS = Records({"image": picture} for picture in RNG.integers(0, 256, (12, 8, 8, 3), np.uint8))


def refused(message: str, call, *args) -> None:
    with pytest.raises(UserError, match=message) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_ratio": 0.0}, "task.mask_ratio=0.0: must be above 0 and less than 1"),
        ({"mask_ratio": float("nan")}, "task.mask_ratio=nan"),
        ({"mask_ratio": 0.95}, "task.mask_ratio=0.95 of 16 patches leaves none to see"),
        ({"patch_size": 8}, "task.mask_ratio=0.75 of 1 patches leaves none"),
        ({"patch_size": 3}, "task.image_size=8 does not divide into task.patch_size=3"),
        ({"patch_size": 0}, "task.patch_size=0"),
        ({"target": "pixel"}, r'task.target="pixel" \(did you mean "pixels"\?\): choose one of normalised, pixels'),
        ({"std": (-1.0,)}, "task.std=-1.0"),
    ],
    ids=str,
)
def test_settings_of_masking_out_of_range_are_refused(settings, message):
    refused(message, make, MAE | settings)


@pytest.mark.parametrize(
    ("size", "patch", "ratio", "kept"), [(8, 2, 0.75, 4), (8, 2, 0.5, 8), (12, 2, 0.6, 14), (224, 16, 0.75, 49)]
)
def test_the_share_of_patches_that_are_masked_is_exact(size, patch, ratio, kept):
    task = make(MAE | {"image_size": size, "patch_size": patch, "mask_ratio": ratio})
    draws = np.stack([task.keep(np.random.default_rng(seed)) for seed in range(60)])
    assert draws.shape == (60, kept) and draws.dtype == np.int32
    assert (np.diff(draws, axis=1) > 0).all() and draws.min() >= 0 and draws.max() < task.patches
    hidden = np.asarray(task.hidden({"patch_keep": draws}))
    assert (hidden.sum(axis=1) == task.patches - kept).all() and set(np.unique(hidden)) == {0, 1}
    assert all(not hidden[row, draws[row]].any() for row in range(60))
    seen = np.bincount(draws.ravel(), minlength=task.patches) / 60
    assert np.array_equal(draws, np.stack([task.keep(np.random.default_rng(seed)) for seed in range(60)]))
    assert abs(seen - kept / task.patches).max() < 0.3


@pytest.mark.parametrize("train", [True, False])
def test_masks_are_drawn_anew_and_the_same_for_a_seed_and_step(train):
    task = make(MAE | {"flip": 1.0})
    examples = task.examples(ANIMALS, images_of(task), 0, train=train)
    first, second = (TrainBatches(examples, batch_size=12, seed=0) for _ in range(2))
    batch, after, again = next(first), next(first), next(second)
    assert set(batch) == {"images", "patch_keep"} and batch["images"].dtype == np.float32
    assert all(np.array_equal(again[name], batch[name]) for name in batch)
    expected = [record["image"][:, :: -1 if train else 1] / np.float32(127.5) - 1 for record in ANIMALS]
    np.testing.assert_allclose(sorted(batch["images"].tolist()), sorted(np.stack(expected).tolist()), atol=1e-6)
    assert not np.array_equal(batch["patch_keep"], after["patch_keep"]) and len(np.unique(batch["patch_keep"], axis=0)) > 6


def test_patches_are_those_of_the_model_and_make_the_image_again():
    images = RNG.normal(size=(3, 8, 8, 3)).astype(np.float32)
    task = make(MAE | {"target": "pixels"})
    targets = np.asarray(task.targets(images))
    assert np.array_equal(targets, np.asarray(patches(images, 2)).reshape(3, 16, 12))
    again = targets.reshape(3, 4, 4, 2, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(3, 8, 8, 3)
    assert np.array_equal(again, images)


@pytest.mark.parametrize("target", ["normalised", "pixels"])
def test_the_loss_of_masked_patches_by_hand(target):
    task = make(MAE | {"target": target})
    images, predicted = RNG.normal(size=(3, 8, 8, 3)).astype(np.float32), RNG.normal(size=(3, 16, 12)).astype(np.float32)
    keep = np.stack([task.keep(np.random.default_rng(seed)) for seed in range(3)])
    total, each, count = 0.0, np.zeros(3), 0
    for row in range(3):
        for number in set(range(16)) - set(keep[row].tolist()):
            y, x = 2 * (number // 4), 2 * (number % 4)
            wanted = images[row, y : y + 2, x : x + 2].reshape(-1).astype(np.float64)
            if target == "normalised":
                wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-6)
            error = np.square(predicted[row, number] - wanted).mean()
            total, count, each[row] = total + error, count + 1, each[row] + error
    batch, outputs = {"images": images, "patch_keep": keep}, {"pixels": predicted}
    assert float(task.loss(outputs, batch)["pixels"]) == pytest.approx(total, rel=1e-5)
    assert float(task.weights(batch)["pixels"]) == count == 36
    arrays = {name: np.asarray(array) for name, array in task.predictions(outputs, batch).items()}
    np.testing.assert_allclose(arrays["errors"], each, rtol=1e-5)
    assert task.metrics(arrays, np.array([1.0, 1, 0])) == {"loss": pytest.approx(each[:2].sum() / 24, rel=1e-5)}
    assert float(task.loss({"pixels": task.targets(images)}, batch)["pixels"]) == 0
    described = task.describe(outputs, batch, None)
    assert [one["seen"] for one in described] == keep.tolist()
    assert [one["error"] for one in described] == pytest.approx((each / 12).tolist(), rel=1e-5)
    other = make(MAE | {"patch_size": 4})
    refused("the model predicts 16 patches of 12 numbers, but task.patch_size=4 gives 4 of 48", other.loss, outputs, batch)


def test_the_encoder_sees_the_visible_patches_alone():
    model = load(GOLDEN / "vit_mae")
    changed = [0, 5, 15, 1, 6, 12]
    keep = np.array([[1, 6, 11, 12]] * 7)
    pixels = np.repeat(RNG.normal(size=(1, 3, 20, 20)).astype(np.float32), 7, axis=0)
    for row, number in enumerate(changed, start=1):
        y, x = 5 * (number // 4), 5 * (number % 4)
        pixels[row, :, y : y + 5, x : x + 5] += 1
    found = model.apply(pixel_values=pixels, patch_keep=keep)
    assert found["last_hidden_state"].shape == (7, 1 + 4, 24) and found["logits"].shape == (7, 16, 75)
    for array in found.values():
        moved = np.abs(np.asarray(array)[1:] - np.asarray(array)[0]).max(axis=(1, 2))
        assert (moved[:3] < 1e-5).all() and (moved[3:] > 1e-2).all()
