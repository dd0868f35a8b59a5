"""What tasks of images share: which images they read, at what size, how pixels become numbers, and changes in training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fmjax.data.augment import images
from fmjax.data.kinds.pixels import RESAMPLINGS, centre, load, normalised, resize, with_channels
from fmjax.data.sources.open import Source, check_columns
from fmjax.errors import RecordError, UserError, nearest
from fmjax.tasks import Where

FITS = ("stretch", "shortest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pictures:
    """The settings of images, from which a task of images inherits. Sizes and channels that are 0 are found in the data.

    An image is resized to `resize_size` (0: `image_size`), both sides (`fit="stretch"`) or the shorter one ("shortest"), of
    which the middle of `image_size` is cut out. `mean` and `std` are of pixels from 0 to 1. In training, images are moved by
    up to `shift` pixels, mirrored with probability `flip`, and parts of them, of `crop` of the area and more, blown up.
    """

    image: str = "image"
    image_size: int = 0
    resize_size: int = 0
    resize: str = "bilinear"
    fit: str = "stretch"
    channels: int = 0
    mean: tuple[float, ...] = (0.5,)  # one number, or one a channel
    std: tuple[float, ...] = (0.5,)
    flip: float = 0.0
    shift: int = 0
    crop: float = 1.0

    def check_images(self) -> None:
        """Raises UserError for settings that are out of range, or do not fit each other."""
        for name, choices in (("resize", RESAMPLINGS), ("fit", FITS)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f'task.{name}="{value}"{nearest(value, choices)}: choose one of {", ".join(choices)}')
        for name in ("image_size", "resize_size", "shift"):
            if getattr(self, name) < 0:
                raise UserError(f"task.{name}={getattr(self, name)}: must not be negative")
        if self.channels not in (0, 1, 3):
            raise UserError(f"task.channels={self.channels}: must be 1 (grey), 3 (colours), or 0 (as the images are)")
        if self.resize_size and not 0 < self.image_size <= self.resize_size:
            raise UserError(f"task.resize_size={self.resize_size} needs a task.image_size that is not larger; give one")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels or len(values)) or not all(map(math.isfinite, values)):
                raise UserError(f"task.{name}={','.join(map(str, values))}: give one number, or one for each channel")
        if min(self.std) <= 0:
            raise UserError(f"task.std={','.join(map(str, self.std))}: must be above 0")
        if not 0 <= self.flip <= 1:
            raise UserError(f"task.flip={self.flip}: is a probability, from 0 to 1")
        if not 0 < self.crop <= 1:
            raise UserError(f"task.crop={self.crop}: is a share of the area, above 0 and at most 1, which leaves images whole")

    def find_images(self, source: Source) -> dict[str, int]:
        """Returns the settings `image_size` and `channels` that are to be found in the data.

        Raises UserError, naming the record, if images differ from the first or are not square.
        """
        check_columns(source, (self.image,))
        if self.image_size and self.channels:
            return {}
        first = load(source[0][self.image], source.where(0))
        height, width, channels = first.shape
        for index in range(1, len(source)):  # one at a time
            shape = load(source[index][self.image], source.where(index)).shape
            if not self.image_size and shape[:2] != (height, width):
                raise RecordError(
                    source.where(index),
                    f"is {shape[0]} x {shape[1]} pixels, where {source.where(0)} is {height} x {width}; "
                    "give them one size with task.image_size",
                    index,
                )
            if not self.channels and shape[2] != channels:
                raise RecordError(
                    source.where(index),
                    f"has {shape[2]} channels, where {source.where(0)} has {channels}; "
                    "choose for all with task.channels",
                    index,
                )
        if not self.image_size and height != width:
            raise UserError(f"{source.where(0)}: is {height} x {width} pixels, not square; give task.image_size")
        return {"image_size": self.image_size or height, "channels": self.channels or channels}

    def prepared(self, image: Any, where: str) -> np.ndarray:
        """Returns an image as uint8 [S,S,C]. Raises UserError, naming `where`, if it cannot be read or made so."""
        pixels = with_channels(load(image, where), self.channels, where)
        if not self.resize_size and pixels.shape[:2] == (self.image_size, self.image_size):
            return pixels
        size = self.resize_size or self.image_size
        height = width = size
        if self.fit == "shortest":
            height, width = (int(size * side / min(pixels.shape[:2])) for side in pixels.shape[:2])
        return centre(resize(pixels, height, width, self.resize), self.image_size)

    def augmented(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the image, uint8, as it is seen this time in training."""
        if self.crop < 1:
            image = images.resized_crop(image, rng, self.crop, self.resize)
        if self.shift:
            image = images.shift(image, rng, self.shift)
        return images.flip(image, rng, self.flip) if self.flip else image

    def normalised(self, image: np.ndarray) -> np.ndarray:
        """Returns the image as the model reads it: fp32 [S,S,C]."""
        return normalised(image, self.mean, self.std)

    def batch(self, examples: Sequence[Any], where: Where) -> dict[str, np.ndarray]:
        """Returns the batch `images [B,S,S,C]` of images, or of records that have them in the task's column."""
        rows = []
        for number, example in enumerate(examples):
            if isinstance(example, Mapping):
                if self.image not in example:
                    raise UserError(f'{where(number)}: lacks "{self.image}", which the task reads; add it')
                example = example[self.image]
            rows.append(self.normalised(self.prepared(example, where(number))))
        return {"images": np.stack(rows)}
