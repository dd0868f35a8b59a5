"""Code shared by image tasks: the settings for reading images, which configure the image processor,
and random augmentation in training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fmjax import contracts
from fmjax.contracts import Column, Config, Processors, Source, Value, Where
from fmjax.data.augment import images
from fmjax.data.kinds import image as image_kind
from fmjax.data.kinds.pixels import RESAMPLINGS
from fmjax.data.sources.open import check_columns
from fmjax.errors import UserError, in_range, one_of
from fmjax.tasks.row_tables import remembered, settings

FITS = ("stretch", "shortest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageTask(contracts.Task):
    """A task that reads one column of images. Sizes and channels of 0 are inferred from the data.

    How an image is resized and normalized is described in `data/kinds/image.py`. In training,
    images are shifted by up to `shift` pixels, flipped with probability `flip`, and cropped to at
    least `crop` of the area and resized."""

    image: str = "image"
    image_size: int | tuple[int, int] = 0  # one side length, or (height, width)
    resize_size: int = 0
    resize: str = "bilinear"
    fit: str = "stretch"
    channels: int = 0
    mean: tuple[float, ...] = (0.5,)  # one number, or one per channel
    std: tuple[float, ...] = (0.5,)
    flip: float = 0.0
    shift: int = 0
    crop: float = 1.0

    def check_images(self) -> None:
        """Raises UserError for settings that are out of range, or contradict each other."""
        for name, value, choices in (("resize", self.resize, RESAMPLINGS), ("fit", self.fit, FITS)):
            one_of(f"task.{name}", value, choices)
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        for name, number in (
            ("image_size", min(sides)),
            ("resize_size", self.resize_size),
            ("shift", self.shift),
        ):
            in_range(f"task.{name}", number, least=0)
        if self.channels not in (0, 1, 3):
            raise UserError(
                f"task.channels={self.channels}: must be 1 (gray), 3 (color), or 0 (as in the "
                "images)"
            )
        if self.resize_size and not 0 < min(sides) <= max(sides) <= self.resize_size:
            raise UserError(
                f"task.resize_size={self.resize_size} needs a task.image_size that is not larger; "
                "set one"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels or len(values)) or not all(
                map(math.isfinite, values)
            ):
                raise UserError(
                    f"task.{name}={','.join(map(str, values))}: use one number, or one per channel"
                )
        if min(self.std) <= 0:
            raise UserError(f"task.std={','.join(map(str, self.std))}: must be above 0")
        in_range("task.flip", self.flip, least=0, most=1, hint="a probability")
        in_range(
            "task.crop",
            self.crop,
            above=0,
            most=1,
            hint="a fraction of the area; 1 means no crop",
        )

    @property
    def reads(self) -> Mapping[str, str]:
        return {self.image: "image"}

    @property
    def processing(self) -> Mapping[str, Config]:
        names = ("image_size", "resize_size", "fit", "resize", "channels", "mean", "std")
        return {"image": {name: value for name, value in vars(self).items() if name in names}}

    def remembered(self, source: Source, find: Callable[[], Config]) -> Config:
        """Returns settings that `find` finds in the records, or found in an earlier start, unless
        sizes are read from files that the records name: these may change while the records do not.
        """
        check_columns(source, self.columns)
        looks = not (self.image_size and self.channels)
        if looks and isinstance(source.value(0, self.image), str | Path):
            return find()
        return remembered(source, settings(self), find)

    def find_images(self, source: Source) -> Config:
        """Returns the settings `image_size` and `channels` that are inferred from the data.

        Raises UserError if a column is missing, or images, which it names, differ from the first or
        are not square."""
        check_columns(source, self.columns)
        if self.image_size and self.channels:
            return {}
        return image_kind.sizes_in([Column(source, self.image)], self.image_size, self.channels)

    def augmented(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns a randomly augmented image, uint8."""
        if self.crop < 1:
            image = images.resized_crop(image, rng, self.crop, self.resize)
        if self.shift:
            image = images.shift(image, rng, self.shift)
        return images.flip(image, rng, self.flip) if self.flip else image

    def batch(
        self, examples: Sequence[Value], processors: Processors, where: Where
    ) -> dict[str, np.ndarray]:
        """Returns the batch `images [B,H,W,C]` from images, or from records that have them in the
        task's column.
        """
        values: list[Value] = []
        for number, example in enumerate(examples):
            if isinstance(example, Mapping):
                if self.image not in example:
                    raise UserError(
                        f'{where(number)}: lacks "{self.image}", which the task reads; add it'
                    )
                example = example[self.image]
            values.append(example)
        return processor_of(processors).arrays(values, where)


def processor_of(processors: Processors) -> image_kind.Processor:
    """Returns the image processor among the processors of a task that reads images."""
    return processors.of(image_kind.Processor)
