"""Operations on one image: decoding to uint8 [H,W,C], resizing, and normalization for a model."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from fmjax.contracts import Value
from fmjax.errors import RecordError, UserError

MOST_PIXELS = 64 * 2**20  # per image: a larger one may be a decompression bomb and is not decoded
RESAMPLINGS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
GREY = ("1", "L", "LA")  # Pillow's modes


def decode(data: bytes, where: str) -> np.ndarray:
    """Returns the image in a file's bytes, uint8 [H,W,1] if it is gray and [H,W,3] otherwise,
    without transparency.

    Raises UserError, naming `where`, if it is damaged, too large, or of more than eight bits.
    """
    with whole(where), Image.open(io.BytesIO(data)) as image:
        return pixels(image, where)


@contextmanager
def whole(where: str) -> Iterator[None]:
    """Turns any exception of Pillow for a damaged image into a UserError that names `where`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of exceptions for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        reason = "no known format" if "cannot identify" in reason else reason
        raise RecordError(
            where, f"is not a complete image ({reason}); fetch it again, or leave it out"
        ) from None


def pixels(image: Image.Image, where: str) -> np.ndarray:
    """Returns a Pillow image, rotated according to its EXIF data, as uint8 [H,W,1] or [H,W,3].

    Raises UserError if it is too large or of more than eight bits.
    """
    if image.width * image.height > MOST_PIXELS:
        raise RecordError(
            where,
            f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}; scale the "
            "image down",
        )
    if image.mode.startswith(("I", "F")):
        raise RecordError(
            where,
            f"has more than 8 bits per channel (mode {image.mode}), which is not supported; "
            "convert it",
        )
    image.load()
    image = upright(image)
    mode = "L" if image.mode in GREY else "RGB"
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array if array.ndim == 3 else array[:, :, None]


def upright(image: Image.Image) -> Image.Image:
    """Returns an image in its original orientation, which cameras store in EXIF data. If these
    cannot be read, it is not rotated.
    """
    try:
        return ImageOps.exif_transpose(image) if "exif" in image.info else image
    except Exception:  # invalid EXIF data in an intact image
        return image


def load(image: Value, where: str) -> np.ndarray:
    """Returns an image that is given as a path, the bytes of a file, a Pillow image, or uint8 [H,W]
    or [H,W,C], as uint8 [H,W,C].

    Raises UserError, naming `where`, if it is none of them, or is not there or damaged.
    """
    if isinstance(image, bytes):
        return decode(image, where)
    if isinstance(image, str | Path):
        try:
            return decode(Path(image).expanduser().read_bytes(), str(image))
        except RecordError as error:
            raise RecordError(where, error.problem, shown=str(image)) from None
        except (OSError, ValueError) as error:  # the latter for an invalid file name
            why = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise RecordError(
                where, f'"{image}" cannot be read ({why}); name an image file'
            ) from None
    if isinstance(image, Image.Image):
        with whole(where):
            return pixels(image, where)
    if (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim in (2, 3)
        and image.size
    ):
        return image if image.ndim == 3 else image[:, :, None]
    found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else repr(image)[:60]
    raise RecordError(
        where,
        f"{found} is not an image; give the path of a file, or an array of uint8 [height, width, "
        "channels]",
    )


def with_channels(image: np.ndarray, channels: int, where: str) -> np.ndarray:
    """Returns the image with 1 or 3 channels. Raises UserError for any other change."""
    if image.shape[2] == channels:
        return image
    if (image.shape[2], channels) == (1, 3):
        return np.repeat(image, 3, axis=2)
    if (image.shape[2], channels) == (3, 1):
        return np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    raise RecordError(
        where,
        f"has {image.shape[2]} channels, which cannot be converted to {channels}; change "
        "task.channels",
    )


def resize(image: np.ndarray, height: int, width: int, how: str) -> np.ndarray:
    """Returns the image, uint8, resized by Pillow with antialiasing."""
    if image.shape[:2] == (height, width):
        return image
    # Pillow supports images with one, three or four channels.
    flat = image[:, :, 0] if image.shape[2] == 1 else image
    array = np.asarray(Image.fromarray(flat).resize((width, height), RESAMPLINGS[how]))
    return array if array.ndim == 3 else array[:, :, None]


def inside(size: tuple[int, ...], goal: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size (height, width), with the same aspect ratio, that fits into `goal`.

    Equals `get_image_size_for_max_height_width` of transformers.
    """
    scale = min(goal[0] / size[0], goal[1] / size[1])
    return max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)


def center(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Returns the middle of an image, [height,width,C], padded with black if it is smaller."""
    short = max(height - image.shape[0], 0), max(width - image.shape[1], 0)
    if any(short):
        image = np.pad(image, [((lack + 1) // 2, lack // 2) for lack in short] + [(0, 0)])
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top : top + height, left : left + width]


def normalized(image: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """Returns (image / 255 - mean) / std in fp32; mean and std are one number, or one per
    channel.
    """
    scale, shift = line(mean, std)
    return np.asarray(image * scale + shift)


@functools.cache
def line(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the slope and the intercept, fp32, that normalize a byte."""
    exact = np.asarray(std, np.float64)
    return (1 / (255 * exact)).astype(np.float32), (-np.asarray(mean, np.float64) / exact).astype(
        np.float32
    )
