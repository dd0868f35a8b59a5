"""Image classification with one label per image. In training, images are augmented at random each
time they are seen, and may be mixed with others, including their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import contracts, losses
from fmjax.contracts import (
    Arrays,
    Batch,
    Config,
    Example,
    HostBatch,
    Processors,
    Record,
    Source,
    Value,
    Where,
)
from fmjax.data.augment import images
from fmjax.data.kinds import image as image_kind
from fmjax.data.sources.open import check_columns
from fmjax.data.storage.tables import Table, Values
from fmjax.errors import UserError, in_range
from fmjax.tasks.images import ImageTask, processor_of
from fmjax.tasks.labels import LabelTask
from fmjax.tasks.row_tables import Part, row_table, settings

# The settings on which the targets depend.
OF_TARGETS = ("task", "label", "labels", "label_columns")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(LabelTask, ImageTask):
    """Settings of image classification; `labels` are inferred from the training data by default.

    `rand_augment` operations of RandAugment at `rand_magnitude` of 10; random erasing with
    probability `erase`; `mixup` and `cutmix` are the parameters of their Beta distributions, 0 for
    never; if both are on, one is chosen at random."""

    head: str = "classify"
    rand_augment: int = 0
    rand_magnitude: float = 5.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        self.check_images()
        self.check_balance(self.labels)
        self.check_layout()
        in_range("task.rand_augment", self.rand_augment, least=0, hint="a number of operations")
        in_range("task.rand_magnitude", self.rand_magnitude, least=0, most=10)
        in_range("task.erase", self.erase, least=0, most=1, hint="a probability")
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            in_range(f"task.{name}", alpha, least=0, hint="0 means off, 1 is uniform")
        if self.mixes and self.focal_gamma:
            raise UserError(
                "task.focal_gamma needs unmixed labels, but mixup and cutmix mix them; set it or "
                "those to 0"
            )

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def resolve(self, source: Source) -> Config:
        """Returns the image size, channels and label names in the training data, unless they are
        given, and the class weights, if they are inferred from the data."""

        def find() -> Config:
            return self.find_images(source) | self.find_labels(source, range(len(source)))

        return self.remembered(source, find)

    def examples(
        self, source: Source, processors: Processors, max_length: int, train: bool
    ) -> LabeledImages:
        """Returns a source's labeled images. Raises UserError, naming the record, for an unknown
        label.
        """
        check_columns(source, self.columns)

        def make(part: Part) -> Values:
            return {"target": self.targets(part, range(len(part)))}

        key = {name: it for name, it in settings(self).items() if name in OF_TARGETS}
        table = row_table(source, {"target": self.target_column}, key, make)
        return LabeledImages(self, source, table, processor_of(processors), train)

    def changed(
        self, image: np.ndarray, processor: image_kind.Processor, rng: np.random.Generator
    ) -> np.ndarray:
        """Returns a randomly augmented, normalized image from uint8."""
        image = self.augmented(image, rng)
        if self.rand_augment:
            image = images.rand_augment(image, rng, self.rand_augment, self.rand_magnitude)
        numbers = processor.normalized(image)
        return images.erase(numbers, rng, self.erase) if self.erase else numbers

    def weights(self, batch: Batch) -> Arrays:
        """Returns the number of examples, or the sum of their class weights."""
        return {"classify": self.label_weights(batch["labels"]).sum()}

    def label_weights(self, labels: jax.Array) -> jax.Array:
        """Returns the weight of each example [B]: that of its class, or of the classes [B,C] that
        it mixes.
        """
        if labels.ndim == 1:
            return self.weight(labels)
        weights = jnp.asarray(self.class_weights or (1.0,) * labels.shape[-1], jnp.float32)
        return labels @ weights

    def losses(self, outputs: Batch, labels: jax.Array) -> jax.Array:
        """Returns the loss of each example [B], times its weight; `labels` are classes [B], or
        mixtures of classes [B,C].
        """
        logits = outputs[self.head]
        if labels.ndim == 1:
            return self.cross_entropy(logits, labels) * self.label_weights(labels)
        return losses.soft_cross_entropy(logits, labels, self.label_smoothing) * self.label_weights(
            labels
        )

    def inputs(
        self, examples: Sequence[Value], processors: Processors, max_length: int, where: Where
    ) -> dict[str, Value]:
        """Returns a batch from paths of image files, Pillow images, arrays of uint8 [H,W,C], or
        records that contain these.
        """
        return dict(self.batch(examples, processors, where))

    def describe(
        self, outputs: HostBatch, batch: HostBatch, processors: Processors
    ) -> list[Record]:
        """Returns the label and score of each image."""
        return self.described(outputs[self.head])


class LabeledImages(contracts.Examples):
    """Labeled images; in training, `draw` augments them at random and mixes them with others."""

    targets: np.ndarray

    def __init__(
        self,
        task: Task,
        source: Source,
        table: Table,
        processor: image_kind.Processor,
        train: bool,
    ):
        self.task, self.source, self.processor, self.train = task, source, processor, train
        self.table = table
        self.targets = self.classes = self.labels = table.numbers("target")

    def __reduce__(self) -> tuple[type[LabeledImages], tuple[Value, ...]]:
        own = (self.task, self.source, self.table, self.processor, self.train)
        return LabeledImages, own

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        return self.source.where(index)

    def __getitem__(self, index: int) -> Example:
        """Returns `images`, uint8 [S,S,C], and `labels`, a class."""
        image = self.processor.resized(
            self.source[index][self.task.image], self.source.where(index)
        )
        return {"images": image, "labels": self.targets[index]}

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns `images`, fp32 [S,S,C], and `labels`: a class or, if training mixes them, a
        mixture of classes [C].
        """
        task, processor = self.task, self.processor
        if not self.train:
            return {"images": processor.normalized(example["images"]), "labels": example["labels"]}
        image = task.changed(example["images"], processor, rng)
        if not task.mixes:
            return {"images": image, "labels": example["labels"]}
        other = self[int(rng.integers(len(self)))]
        one_hot = np.eye(len(task.labels), dtype=np.float32)
        pair = (
            image,
            one_hot[example["labels"]],
            task.changed(other["images"], processor, rng),
            one_hot[other["labels"]],
        )
        cut = rng.random() < (0.5 if task.mixup else 1.0) if task.cutmix else False
        image, label = (
            images.cutmix(*pair, rng, task.cutmix) if cut else images.mixup(*pair, rng, task.mixup)
        )
        return {"images": image, "labels": label}
