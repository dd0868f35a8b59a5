"""Random changes of images: the same for the same random numbers, of the same shape, and each what its paper says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from fmjax.data.augment import images

SHAPES = [(9, 12, 1), (9, 12, 3)]
DRAWS = 200


def image(shape: tuple[int, ...] = (9, 12, 3), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def drawn(change: Callable, count: int = DRAWS) -> list:
    """Returns what a change makes with the first random numbers of as many generators."""
    return [change(np.random.default_rng(seed)) for seed in range(count)]


CHANGES: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "flip": lambda image, rng: images.flip(image, rng, 0.5),
    "shift": lambda image, rng: images.shift(image, rng, 2),
    "resized_crop": lambda image, rng: images.resized_crop(image, rng, 0.2, "bilinear"),
    "rand_augment": lambda image, rng: images.rand_augment(image, rng, 2, 5.0),
    "erase": lambda image, rng: images.erase(image.astype(np.float32), rng, 0.5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_those_of_their_random_numbers(change, shape):
    given = image(shape)
    before = given.copy()
    found = drawn(lambda rng: CHANGES[change](given, rng), 20)
    again = drawn(lambda rng: CHANGES[change](given, rng), 20)
    assert all(one.tobytes() == other.tobytes() for one, other in zip(found, again, strict=True))
    assert {one.shape for one in found} == {shape}
    assert {one.dtype for one in found} == {np.dtype(np.float32 if change == "erase" else np.uint8)}
    assert len({one.tobytes() for one in found}) > 1 and np.array_equal(given, before)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_flipping(probability):
    given = image()
    flipped = [np.array_equal(one, given[:, ::-1]) for one in drawn(lambda rng: images.flip(given, rng, probability))]
    kept = [np.array_equal(one, given) for one in drawn(lambda rng: images.flip(given, rng, probability))]
    assert sum(flipped) + sum(kept) == DRAWS and abs(sum(flipped) - probability * DRAWS) <= 0.1 * DRAWS * (probability % 1 > 0)


@pytest.mark.parametrize("most", [0, 1, 2, 30])
def test_shifting(most):
    given = image()
    padded = np.pad(given, [(most, most), (most, most), (0, 0)])
    places = [(down, right) for down in range(2 * most + 1) for right in range(2 * most + 1)]
    wanted = {padded[down : down + 9, right : right + 12].tobytes() for down, right in places}
    found = {one.tobytes() for one in drawn(lambda rng: images.shift(given, rng, most))}
    assert found <= wanted and (most == 30 or found == wanted)


@pytest.mark.parametrize("smallest", [0.1, 0.5])
def test_crops_are_parts_of_any_size_and_place(smallest, monkeypatch):
    parts = []
    monkeypatch.setattr(images, "resize", lambda part, height, width, how: parts.append(part) or np.zeros((height, width, 2)))
    places = np.stack(np.mgrid[0:90, 0:120], axis=-1)  # each pixel holds its place
    assert {one.shape for one in drawn(lambda rng: images.resized_crop(places, rng, smallest, "box"))} == {(90, 120, 2)}
    areas = np.array([part[..., 0].size / 10800 for part in parts])
    ratios = np.array([part.shape[1] / part.shape[0] for part in parts])
    assert len(parts) > 0.9 * DRAWS and smallest - 0.01 <= areas.min() and areas.max() <= 1 and areas.max() > 0.8
    assert 0.73 <= ratios.min() < 0.8 and 1.25 < ratios.max() <= 1.37
    firsts, lasts = np.stack([part[0, 0] for part in parts]), np.stack([part[-1, -1] for part in parts])
    assert (firsts.min(axis=0) == 0).all() and (lasts.max(axis=0) >= [88, 118]).all()
    assert all(
        np.array_equal(part, places[part[0, 0, 0] : part[-1, -1, 0] + 1, part[0, 0, 1] : part[-1, -1, 1] + 1]) for part in parts
    )


def test_erasing():
    given = np.full((40, 50, 3), 9, np.float32)
    assert all(one is given for one in drawn(lambda rng: images.erase(given, rng, 0.0), 5))
    found = np.stack(drawn(lambda rng: images.erase(given, rng, 1.0)))
    changed = (found != given).all(axis=-1)
    assert np.array_equal(changed, (found != given).any(axis=-1))
    sizes = np.stack([changed.any(axis=2).sum(axis=1), changed.any(axis=1).sum(axis=1)], axis=1)
    assert np.array_equal(sizes.prod(axis=1), changed.sum(axis=(1, 2)))  # rectangles
    shares, ratios = sizes.prod(axis=1) / 2000, sizes[:, 0] / sizes[:, 1]
    assert 0.015 <= shares.min() < 0.05 and 0.28 < shares.max() <= 0.34
    assert 0.25 <= ratios.min() < 0.5 and 2 < ratios.max() <= 3.8
    noise = found[changed]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert changed.any(axis=0).mean() > 0.9


PAIR = (np.zeros((7, 9, 3), np.float32), np.float32([1, 0, 0]), np.ones((7, 9, 3), np.float32), np.float32([0, 0, 1]))


@pytest.mark.parametrize("mix", [images.mixup, images.cutmix])
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_labels_are_mixed_as_the_pixels_are(mix, alpha):
    found = drawn(lambda rng: mix(*PAIR, rng, alpha))
    for mixed, label in drawn(lambda rng: mix(*PAIR, rng, alpha), 5):
        assert any(np.array_equal(mixed, one) and np.array_equal(label, other) for one, other in found[:5])
    shares = []
    for mixed, label in found:
        assert mixed.dtype == label.dtype == np.float32 and mixed.shape == (7, 9, 3)
        assert label.sum() == pytest.approx(1) and label[1] == 0 and label.min() >= 0
        assert label[2] == pytest.approx(mixed.mean(dtype=np.float64), abs=1e-6)
        shares.append(label[2])
        if mix is images.mixup:
            assert np.ptp(mixed) == 0
        else:
            rows, columns = mixed.any(axis=(1, 2)), mixed.any(axis=(0, 2))
            assert np.array_equal(mixed, np.broadcast_to((rows[:, None] & columns)[:, :, None], mixed.shape))
    assert min(shares) < 0.1 and max(shares) > 0.9
    # Of a square of side s, s^2 drawn from Beta, (s - s^2 / 4)^2 lie inside on average.
    means = {images.mixup: 0.5, images.cutmix: 0.321 if alpha == 1 else 0.299}
    assert abs(np.mean(shares) - means[mix]) < 0.06
    if mix is images.mixup:
        assert abs(np.mean([0.1 < share < 0.9 for share in shares]) - (0.8 if alpha == 1 else 0.327)) < 0.1


def test_mixing_with_itself_changes_nothing():
    same = (*PAIR[2:], *PAIR[2:])
    for mix in (images.mixup, images.cutmix):
        mixed, label = mix(*same, np.random.default_rng(0), 1.0)
        np.testing.assert_allclose(mixed, PAIR[2], atol=1e-6)
        np.testing.assert_allclose(label, PAIR[3], atol=1e-6)


def applied(name: str, given: np.ndarray, strength: float, sign: int = 1) -> np.ndarray:
    return np.asarray(images.OPERATIONS[name](Image.fromarray(given), strength, sign))


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_of_no_strength_change_nothing(channels):
    assert len(images.OPERATIONS) == 14
    given = image((40, 50, channels)).squeeze() // 2
    for name in images.OPERATIONS:
        assert np.array_equal(applied(name, given, 0.0), given) != (name in ("auto_contrast", "equalize")), name  # have none
        found = applied(name, given, 1.0)
        assert found.shape == given.shape and found.dtype == np.uint8
    assert np.array_equal(images.rand_augment(image(), np.random.default_rng(0), 0, 9.0), image())


@pytest.mark.parametrize("shape", [(10, 20), (10, 20, 3)])
def test_operations_by_hand(shape):
    given = image(shape)
    filled = np.full((10, 9, *shape[2:]), 128, np.uint8)  # 0.45 of 20 pixels; across, 0.45 of 10 are no whole number
    expected = {
        ("identity", 1.0, 1): given,
        ("solarize", 1.0, 1): 255 - given,
        ("solarize", 0.5, 1): np.where(given < 128, given, 255 - given),
        ("posterize", 1.0, 1): given & 0xF0,
        ("posterize", 0.5, 1): given & 0xFC,
        ("translate_x", 1.0, 1): np.concatenate([given[:, 9:], filled], axis=1),
        ("translate_x", 1.0, -1): np.concatenate([filled, given[:, :-9]], axis=1),
        ("brightness", 1.0, 1): np.minimum(given * 1.9, 255),
        ("brightness", 1.0, -1): given * 0.1,
    }
    for (name, strength, sign), wanted in expected.items():
        assert np.abs(applied(name, given, strength, sign) - np.asarray(wanted, np.float64)).max() < 1, (name, strength, sign)
    stretched = applied("auto_contrast", given // 2 + 30, 1.0)
    assert stretched.min() == 0 and stretched.max() == 255
    turned = applied("rotate", np.full(shape, 10, np.uint8), 1.0)
    assert turned[0, 0].max() == 128 == turned[-1, -1].min() and turned[5, 10].max() == 10


def test_operations_are_drawn_at_random(monkeypatch):
    called = []
    spies = {
        name: lambda image, strength, sign, name=name: called.append((name, strength, sign)) or image
        for name in images.OPERATIONS
    }
    monkeypatch.setattr(images, "OPERATIONS", spies)
    drawn(lambda rng: images.rand_augment(image(), rng, 3, 7.0))
    assert len(called) == 3 * DRAWS and {name for name, _, _ in called} == set(spies)
    assert {strength for _, strength, _ in called} == {0.7} and {sign for _, _, sign in called} == {-1, 1}
