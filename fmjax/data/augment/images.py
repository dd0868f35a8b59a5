"""Random changes to images that preserve their class. Each draws from the given generator (a fixed
number of draws per image where possible) and returns a new array.

Dimensions: H, W height and width, C channels or classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from fmjax.data.kinds.pixels import RESAMPLINGS, resize

Rng = np.random.Generator


def flip(image: np.ndarray, rng: Rng, probability: float) -> np.ndarray:
    """Returns the image, flipped horizontally with the given probability."""
    return image[:, ::-1] if rng.random() < probability else image


def shift(image: np.ndarray, rng: Rng, most: int) -> np.ndarray:
    """Returns the image shifted by -most to most pixels in each direction and filled with black,
    like a crop of the padded image."""
    down, right = rng.integers(-most, most + 1, 2).tolist()
    height, width = image.shape[:2]
    moved = np.zeros_like(image)
    if abs(down) < height and abs(right) < width:
        source = image[
            max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)
        ]
        moved[max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = source
    return moved


def resized_crop(image: np.ndarray, rng: Rng, smallest: float, how: str) -> np.ndarray:
    """Returns a random crop of the image, uint8, resized to the full size. Its area is from
    `smallest` to the whole, its aspect ratio from 3:4 to 4:3 (Szegedy et al. 2015,
    arXiv:1409.4842). If no crop fits after ten tries, returns the whole image."""
    height, width = image.shape[:2]
    draws = rng.random((10, 4))
    for area, ratio, top, left in draws.tolist():
        size = height * width * (smallest + area * (1 - smallest))
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        wide, high = round(math.sqrt(size * aspect)), round(math.sqrt(size / aspect))
        if 0 < wide <= width and 0 < high <= height:
            y, x = int(top * (height - high + 1)), int(left * (width - wide + 1))
            return resize(image[y : y + high, x : x + wide], height, width, how)
    return image


def erase(image: np.ndarray, rng: Rng, probability: float) -> np.ndarray:
    """Returns a normalized image in which, with the given probability, a rectangle is replaced by
    noise of the same mean and variance.

    Random erasing (Zhong et al. 2020, arXiv:1708.04896): an area of 2 % to 33 % and an aspect ratio
    of 0.3 to 3.3."""
    if rng.random() >= probability:
        return image
    height, width, channels = image.shape
    for area, ratio, top, left in rng.random((10, 4)).tolist():
        size, aspect = (
            height * width * (0.02 + area * 0.31),
            math.exp((2 * ratio - 1) * math.log(1 / 0.3)),
        )
        wide, high = round(math.sqrt(size / aspect)), round(math.sqrt(size * aspect))
        if 0 < wide < width and 0 < high < height:
            y, x = int(top * (height - high + 1)), int(left * (width - wide + 1))
            erased = image.copy()
            erased[y : y + high, x : x + wide] = rng.standard_normal(
                (high, wide, channels), np.float32
            )
            return erased
    return image


def mixup(
    image: np.ndarray,
    label: np.ndarray,
    other: np.ndarray,
    other_label: np.ndarray,
    rng: Rng,
    alpha: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns a mixture of two normalized images, and the same mixture of their labels [C], with a
    weight drawn from Beta(alpha, alpha) (Zhang et al. 2018, arXiv:1710.09412)."""
    share = np.float32(rng.beta(alpha, alpha))
    return share * image + (1 - share) * other, share * label + (1 - share) * other_label


def cutmix(
    image: np.ndarray,
    label: np.ndarray,
    other: np.ndarray,
    other_label: np.ndarray,
    rng: Rng,
    alpha: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the image with a rectangle replaced by that of another image, and the labels [C]
    mixed in proportion to the areas (Yun et al. 2019, arXiv:1905.04899). The rectangle's area is
    drawn from Beta(alpha, alpha); its center is uniform."""
    height, width = image.shape[:2]
    side = math.sqrt(1 - rng.beta(alpha, alpha))
    y, x = (rng.random(2) * (height, width)).tolist()
    top, bottom = (int(min(max(y + end * side * height / 2, 0), height)) for end in (-1, 1))
    left, right = (int(min(max(x + end * side * width / 2, 0), width)) for end in (-1, 1))
    mixed = image.copy()
    mixed[top:bottom, left:right] = other[top:bottom, left:right]
    share = np.float32((bottom - top) * (right - left) / (height * width))
    return mixed, (1 - share) * label + share * other_label


# RandAugment operations. Each takes a Pillow image, a strength from 0 to 1, and a sign for
# operations that go both ways.

GREY = 128  # fill color for pixels from outside the image
Operation = Callable[[Image.Image, float, int], Image.Image]


def affine(image: Image.Image, *matrix: float) -> Image.Image:
    """Returns the image whose pixel (x, y) is the pixel (a x + b y + c, d x + e y + f) of the given
    image.
    """
    fill = GREY if image.mode == "L" else (GREY,) * 3
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, RESAMPLINGS["bilinear"], fillcolor=fill
    )


def rotate(image: Image.Image, strength: float, sign: int) -> Image.Image:
    """Rotates by up to 30 degrees."""
    fill = GREY if image.mode == "L" else (GREY,) * 3
    return image.rotate(sign * 30 * strength, RESAMPLINGS["bilinear"], fillcolor=fill)


def shear_x(image: Image.Image, strength: float, sign: int) -> Image.Image:
    """Up to 0.3."""
    return affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0)


def shear_y(image: Image.Image, strength: float, sign: int) -> Image.Image:
    """Up to 0.3."""
    return affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0)


def translate_x(image: Image.Image, strength: float, sign: int) -> Image.Image:
    """Shifts by up to 0.45 of the width."""
    return affine(image, 1, 0, sign * 0.45 * strength * image.width, 0, 1, 0)


def translate_y(image: Image.Image, strength: float, sign: int) -> Image.Image:
    """Shifts by up to 0.45 of the height."""
    return affine(image, 1, 0, 0, 0, 1, sign * 0.45 * strength * image.height)


def enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Returns the operation of one of Pillow's enhancers, with a factor from 1 down to 0.1 or up to
    1.9.
    """
    return lambda image, strength, sign: enhancer(image).enhance(1 + sign * 0.9 * strength)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, strength, sign: image,
    "auto_contrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
    "rotate": rotate,
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, round(256 * (1 - strength))),
    "color": enhance(ImageEnhance.Color),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, 8 - round(4 * strength)),
    "contrast": enhance(ImageEnhance.Contrast),
    "brightness": enhance(ImageEnhance.Brightness),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
}


def rand_augment(image: np.ndarray, rng: Rng, count: int, magnitude: float) -> np.ndarray:
    """Returns the image, uint8, after `count` operations drawn from the 14 of RandAugment (Cubuk et
    al. 2020, arXiv:1909.13719), each at `magnitude` of 10."""
    names = list(OPERATIONS)
    chosen, signs = rng.integers(len(names), size=count), rng.integers(2, size=count)
    changed = Image.fromarray(
        image[:, :, 0] if image.shape[2] == 1 else np.ascontiguousarray(image)
    )
    for index, sign in zip(chosen.tolist(), signs.tolist(), strict=True):
        changed = OPERATIONS[names[index]](changed, magnitude / 10, 1 if sign else -1)
    array = np.asarray(changed)
    return array if array.ndim == 3 else array[:, :, None]
