"""Images: decoding, conversion to one size and number of channels, and normalization.

Dimensions: B batch, H and W height and width that a model reads, h and w those of a file, C
channels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np

from fmjax import contracts
from fmjax.contracts import Column, Config, Value, Where
from fmjax.data.kinds import pixels, preprocessor_config
from fmjax.errors import RecordError, UserError

FITS = ("stretch", "shortest", "pad")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processor(contracts.Processor):
    """The size, channels and normalization of images.

    An image is resized to `resize_size` (0: to `image_size`): both sides (`fitting="stretch"`) or
    the shorter one ("shortest"), and its middle of `image_size` is cut out. With "pad" it is scaled
    to fit into `image_size`, at the top left, and the rest is padding, which is 0 in `pixel_mask`.
    `mean` and `std` refer to pixels from 0 to 1."""

    kind: ClassVar[str] = "image"
    what: ClassVar[str] = "image processor"
    reads: ClassVar[str] = "images"
    file: ClassVar[str] = preprocessor_config.PROCESSOR
    unit: ClassVar[str] = "images"
    model_settings: ClassVar[tuple[str, ...]] = ("image_size", "channels")
    at_root: ClassVar[bool] = True

    image_size: tuple[int, int]  # (H, W)
    channels: int = 3
    resize_size: int = 0
    resample: str = "bilinear"
    fitting: str = "stretch"
    mean: tuple[float, ...] = (0.5,)  # one number, or one per channel
    std: tuple[float, ...] = (0.5,)

    def __post_init__(self) -> None:
        if self.image_size[0] != self.image_size[1] and (
            self.resize_size or self.fitting == "shortest"
        ):
            raise UserError(
                f"task.image_size={self.image_size}: only square crops are supported; set "
                "task.resize_size=0 and task.fit=stretch"
            )

    @classmethod
    def fit(cls, columns: Sequence[Column], settings: Config, added: Sequence[Value] = ()) -> Self:
        """Returns the processor of a task's settings (`image_size`, a side or (H, W), `channels`,
        ...).

        A size or number of channels of 0 is inferred from the data. Raises UserError, naming the
        record, if images differ from the first or are not square."""
        sizes = {name: settings[name] for name in ("image_size", "channels")}
        if not all(sizes.values()):
            sizes = sizes_in(columns, **sizes)
        return cls.of(dict(settings) | sizes)

    @classmethod
    def of(cls, settings: Mapping[str, Value]) -> Self:
        """Returns the processor of a task's complete settings."""
        names = {"resize": "resample", "fit": "fitting"}
        values = {names.get(name, name): value for name, value in settings.items()}
        side = values["image_size"]
        values["image_size"] = (side, side) if isinstance(side, int) else tuple(side)
        for name in ("mean", "std"):
            values[name] = tuple(values[name]) * (
                values["channels"] if len(values[name]) == 1 else 1
            )
        return cls(**values)

    @classmethod
    def restore(cls, folder: Path) -> Self:
        """Raises UserError if there is no `preprocessor_config.json`, or it has unsupported
        settings.
        """
        if not (folder / cls.file).exists():
            raise UserError(
                f"{folder / cls.file}: no such file; restore it from the run that this one was "
                "copied from"
            )
        return cls.of(preprocessor_config.read(folder, 0, 0))

    def save(self, folder: Path) -> None:
        preprocessor_config.write(folder, self.settings())

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.settings()).encode()).hexdigest()

    def settings(self) -> Config:
        """Returns the settings of a task that reads images this way."""
        height, width = self.image_size
        return {
            "image_size": height if height == width else (height, width),
            "resize_size": self.resize_size,
            "fit": self.fitting,
            "resize": self.resample,
            "channels": self.channels,
            "mean": self.mean,
            "std": self.std,
        }

    def sizes(self) -> dict[str, int]:
        """Returns the side of images, if they are square, and their channels."""
        height, width = self.image_size
        return ({"image_size": height} if height == width else {}) | {"channels": self.channels}

    def load(self, value: Value, where: str) -> np.ndarray:
        """Returns an image, uint8 [h,w,c], from a path, the bytes of a file, a Pillow image, or an
        array.
        """
        return pixels.load(value, where)

    def resized(self, value: Value, where: str) -> np.ndarray:
        """Returns an image as uint8 [H,W,C]; with "pad" it may be smaller. Raises UserError if it
        cannot be read or converted.
        """
        image = pixels.with_channels(self.load(value, where), self.channels, where)
        height, width = self.image_size
        if not self.resize_size and image.shape[:2] == (height, width):
            return image
        if self.fitting == "pad":
            return pixels.resize(
                image, *pixels.inside(image.shape[:2], self.image_size), self.resample
            )
        high, wide = self.resize_size or height, self.resize_size or width
        if self.fitting == "shortest":
            high, wide = (int(high * side / min(image.shape[:2])) for side in image.shape[:2])
        return pixels.center(pixels.resize(image, high, wide, self.resample), height, width)

    def normalized(self, image: np.ndarray) -> np.ndarray:
        """Returns an image of uint8 as the model reads it, fp32."""
        return pixels.normalized(image, self.mean, self.std)

    def arrays(self, values: Sequence[Value], where: Where) -> dict[str, np.ndarray]:
        """Returns a batch for prediction: `images`, fp32 [B,H,W,C], and with "pad" `pixel_mask`,
        int32 [B,H,W].
        """
        images = [
            self.normalized(self.resized(value, where(number)))
            for number, value in enumerate(values)
        ]
        if self.fitting != "pad":
            return {"images": np.stack(images)}
        batch = np.zeros((len(images), *self.image_size, self.channels), np.float32)
        mask = np.zeros((len(images), *self.image_size), np.int32)
        for row, image in enumerate(images):
            height, width = image.shape[:2]
            batch[row, :height, :width] = image
            mask[row, :height, :width] = 1
        return {"images": batch, "pixel_mask": mask}


def sizes_in(columns: Sequence[Column], image_size: int | tuple[int, int], channels: int) -> Config:
    """Returns the size and channels of images; those that are 0 are inferred from the data.

    Raises UserError, naming the record, if images differ from the first or are not square.
    """
    first: tuple[int, ...] = ()
    began = ""
    for column in columns:
        for value, where in column.values():  # one at a time
            shape = pixels.load(value, where).shape
            if not first:
                first, began = shape, where
            if not image_size and shape[:2] != first[:2]:
                raise RecordError(
                    where,
                    f"is {shape[0]} x {shape[1]} pixels, but {began} is {first[0]} x {first[1]}; "
                    "resize all of them with task.image_size",
                )
            if not channels and shape[2] != first[2]:
                problem = (
                    f"has {shape[2]} channels, but {began} has {first[2]}; convert all of them "
                    "with task.channels"
                )
                raise RecordError(where, problem)
    if not image_size and first[0] != first[1]:
        raise UserError(
            f"{began}: is {first[0]} x {first[1]} pixels, not square; set task.image_size"
        )
    return {"image_size": image_size or first[0], "channels": channels or first[2]}
