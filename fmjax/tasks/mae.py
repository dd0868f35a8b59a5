"""Masked autoencoding of images (MAE, He et al. 2022, arXiv:2111.06377): the encoder sees a random
quarter of the patches, a light decoder predicts the pixels of the others, each patch normalized by
its own mean and variance.

Dimensions: B batch, S image size, P patch size, N patches, K patches that are seen, E numbers of a
patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts
from fmjax.contracts import (
    Arrays,
    Batch,
    Config,
    Example,
    Heads,
    HostBatch,
    Measures,
    Processors,
    Record,
    Source,
    Value,
    Where,
)
from fmjax.data.kinds import image as image_kind
from fmjax.data.sources.open import check_columns
from fmjax.errors import UserError, in_range, one_of
from fmjax.metrics import classes as class_metrics
from fmjax.tasks.images import ImageTask, processor_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(ImageTask):
    """Settings of masked autoencoding. `patch_size` is that of the model; labels are not read."""

    patch_size: int = 16
    mask_ratio: float = 0.75
    target: str = "normalised"  # or "pixels", in the scale that the model reads

    def __post_init__(self) -> None:
        self.check_images()
        in_range("task.mask_ratio", self.mask_ratio, above=0, below=1, hint="MAE uses 0.75")
        one_of("task.target", self.target, ("normalised", "pixels"))
        if not isinstance(self.image_size, int):
            raise UserError(
                f"task.image_size={self.image_size}: masked autoencoding reads square images; use "
                "one number"
            )
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                f"task.image_size={self.image_size} does not divide into "
                f"task.patch_size={self.patch_size}; change one of them"
            )
        if self.image_size and not 0 < self.kept < self.patches:
            raise UserError(
                f"task.mask_ratio={self.mask_ratio} of {self.patches} patches leaves none to see "
                "or none to predict; change it"
            )

    @property
    def heads(self) -> Heads:
        return {"pixels": {}}

    @property
    def measures(self) -> Measures:
        return class_metrics.LOSS

    @property
    def model_settings(self) -> Mapping[str, Value]:
        return {"patch_size": self.patch_size}

    @property
    def patches(self) -> int:
        side = self.image_size
        return (side // self.patch_size) ** 2 if isinstance(side, int) else 0

    @property
    def kept(self) -> int:
        return int(self.patches * (1 - self.mask_ratio))

    def resolve(self, source: Source) -> Config:
        """Returns the image size and channels in the training data, unless they are given."""
        return self.remembered(source, partial(self.find_images, source))

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> MaskedImages:
        """Returns a source's images."""
        check_columns(source, self.columns)
        return MaskedImages(self, source, processor_of(processors), train)

    def keep(self, rng: np.random.Generator) -> np.ndarray:
        """Returns the indices of the visible patches, int32 [K], in order."""
        return np.sort(rng.permutation(self.patches)[: self.kept]).astype(np.int32)

    def targets(self, images_BSSC: jax.Array) -> jax.Array:
        """Returns the targets [B,N,E]: the pixels of each patch, with the channels of a pixel
        adjacent.
        """
        rows, size, _, channels = images_BSSC.shape
        side = size // self.patch_size
        split = images_BSSC.reshape(
            rows, side, self.patch_size, side, self.patch_size, channels
        ).transpose(0, 1, 3, 2, 4, 5)
        pixels = split.reshape(rows, side * side, -1).astype(jnp.float32)
        if self.target == "pixels":
            return pixels
        centred = pixels - pixels.mean(axis=-1, keepdims=True)
        # The unbiased variance, as in the reference.
        variance = jnp.square(centred).sum(axis=-1, keepdims=True) / (pixels.shape[-1] - 1)
        return centred / jnp.sqrt(variance + 1e-6)

    def hidden(self, batch: Mapping[str, Value]) -> jax.Array:
        """Returns fp32 [B,N]: 1 for hidden patches."""
        return 1.0 - jax.nn.one_hot(batch["patch_keep"], self.patches).sum(axis=1)

    def errors(self, outputs: Mapping[str, Value], batch: Mapping[str, Value]) -> jax.Array:
        """Returns the mean squared error of each hidden patch, 0 for the others: [B,N].

        Raises UserError if the model has patches of another size.
        """
        predicted, targets = outputs["pixels"], self.targets(batch["images"])
        if predicted.shape != targets.shape:
            raise UserError(
                f"the model predicts {predicted.shape[1]} patches of {predicted.shape[2]} numbers, "
                f"but task.patch_size={self.patch_size} gives {targets.shape[1]} of "
                f"{targets.shape[2]}; set it to the value of model.patch_size"
            )
        return jnp.square(predicted.astype(jnp.float32) - targets).mean(axis=-1) * self.hidden(
            batch
        )

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of hidden patches."""
        return {"pixels": self.hidden(batch).sum()}

    def loss(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns the sum of their errors."""
        return {"pixels": self.errors(outputs, batch).sum()}

    def predictions(self, outputs: Batch, batch: Batch) -> Arrays:
        """Returns each image's sum of errors, and the number of patches."""
        return {
            "errors": self.errors(outputs, batch).sum(axis=-1),
            "weights": self.hidden(batch).sum(axis=-1),
        }

    def metrics(
        self, arrays: HostBatch, valid: np.ndarray, examples: contracts.Examples | None = None
    ) -> dict[str, float]:
        """Returns the mean error of hidden patches."""
        real = valid > 0
        return {
            "loss": float(
                arrays["errors"][real].sum(dtype=np.float64) / arrays["weights"][real].sum()
            )
        }

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from images, as in classification, with the same visible patches each
        time.
        """
        keep = [self.keep(np.random.default_rng(number)) for number in range(len(examples))]
        return self.batch(examples, processors, where) | {"patch_keep": np.stack(keep)}

    def describe(
        self, outputs: HostBatch, batch: HostBatch, processors: Processors
    ) -> list[Record]:
        """Returns the mean squared error of each image over the hidden patches, and the visible
        patches.
        """
        errors = np.asarray(self.errors(outputs, batch)).sum(axis=-1) / (self.patches - self.kept)
        return [
            {"error": float(error), "seen": keep.tolist()}
            for error, keep in zip(errors, batch["patch_keep"], strict=True)
        ]


class MaskedImages(contracts.Examples):
    """Images; `draw` augments them, in training, and chooses the visible patches."""

    def __init__(self, task: Task, source: Source, processor: image_kind.Processor, train: bool):
        self.task, self.source, self.processor, self.train = task, source, processor, train

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        return self.source.where(index)

    def __getitem__(self, index: int) -> Example:
        """Returns `images`, uint8 [S,S,C]."""
        return {
            "images": self.processor.resized(
                self.source[index][self.task.image], self.source.where(index)
            )
        }

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns `images`, fp32 [S,S,C], and `patch_keep`, int32 [K]."""
        image = self.task.augmented(example["images"], rng) if self.train else example["images"]
        return {"images": self.processor.normalized(image), "patch_keep": self.task.keep(rng)}
