"""Classification of images: one label each. In training, images are changed anew each time that they are seen, and mixed
with others, labels along with pixels."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import losses
from fmjax.contracts import Examples
from fmjax.data.augment import images
from fmjax.data.sources.open import Source, check_columns
from fmjax.errors import UserError
from fmjax.metrics import classes as class_metrics
from fmjax.tasks import Batch, Example, Where, classify
from fmjax.tasks.balance import Balance
from fmjax.tasks.images import Pictures


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(Balance, Pictures):
    """Settings of image classification; `labels` are found in the training data where they are not given.

    `rand_augment` operations of RandAugment at `rand_magnitude` of 10; random erasing with probability `erase`; `mixup` and
    `cutmix` are the parameters of their Beta distributions, 0 for never; of both, one is chosen at random.
    """

    reads: ClassVar[str] = "images"
    kind: ClassVar[str] = "single"

    label: str = "label"
    labels: tuple[str, ...] = ()
    head: str = "classify"
    rand_augment: int = 0
    rand_magnitude: float = 5.0
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        self.check_images()
        self.check_balance(self.labels)
        if self.rand_augment < 0 or not 0 <= self.rand_magnitude <= 10:
            raise UserError(
                f"task.rand_augment={self.rand_augment}, task.rand_magnitude={self.rand_magnitude}: give a number of operations, "
                "and a magnitude from 0 to 10"
            )
        if not 0 <= self.erase <= 1:
            raise UserError(f"task.erase={self.erase}: is a probability, from 0 to 1")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"task.{name}={getattr(self, name)}: must not be negative; 0 is never, 1 uniform")
        if self.mixes and self.focal_gamma:
            raise UserError("task.focal_gamma is of one label, which mixup and cutmix mix; set it, or those, to 0")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def heads(self) -> dict[str, dict[str, Any]]:
        return {self.head: {"classes": len(self.labels)}}

    @property
    def measures(self) -> tuple[str, ...]:
        return ("loss", *class_metrics.CLASSIFICATION, *(class_metrics.TWO_CLASSES if len(self.labels) == 2 else ()))

    @property
    def labelled(self) -> classify.Task:
        """Labels are read and checked as those of texts are."""
        return classify.Task(label=self.label, labels=self.labels)

    def resolve(self, source: Source) -> dict[str, Any]:
        """Returns the image size, channels and label names found in the training data, unless they are given, and the class
        weights, if they are to follow from the data."""
        check_columns(source, (self.image, self.label))
        found: dict[str, Any] = dict(self.find_images(source))
        if self.labels and not self.weighs:
            return found
        first: dict[str, int] = {}
        counts: Counter[str] = Counter()
        reader = self.labelled
        for index in range(len(source)):
            [value] = reader.values(source, index)
            counts[value] += 1
            first.setdefault(value, index)
        labels = self.labels or reader.names(source, first)
        weights = self.find_weights(labels, np.array([counts[label] for label in labels])) if self.weighs else {}
        return found | {"labels": labels} | weights

    def examples(self, source: Source, tokenizer: None, max_length: int, train: bool) -> Photographs:
        """Returns a source's labelled images. Raises UserError, naming the record, for a label that is not known."""
        check_columns(source, (self.image, self.label))
        reader = self.labelled
        targets = np.stack([reader.target(source, index) for index in range(len(source))])
        return Photographs(self, source, targets, train)

    def changed(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns an image, uint8, as it is seen this time in training, normalised."""
        image = self.augmented(image, rng)
        if self.rand_augment:
            image = images.rand_augment(image, rng, self.rand_augment, self.rand_magnitude)
        numbers = self.normalised(image)
        return images.erase(numbers, rng, self.erase) if self.erase else numbers

    def weights(self, batch: Batch) -> dict[str, jax.Array]:
        """Returns the number of examples, or the sum of their class weights."""
        return {"classify": self.label_weights(batch["labels"]).sum()}

    def label_weights(self, labels: jax.Array) -> jax.Array:
        """Returns the weight of each example [B]: its class's, or that of the classes [B,C] it is mixed of."""
        if labels.ndim == 1:
            return self.weight(labels)
        weights = jnp.asarray(self.class_weights or (1.0,) * labels.shape[-1], jnp.float32)
        return labels @ weights

    def losses(self, outputs: Batch, labels: jax.Array) -> jax.Array:
        """Returns the loss of each example [B], times its weight; `labels` are classes [B], or shares of classes [B,C]."""
        logits = outputs[self.head]
        if labels.ndim == 1:
            return self.cross_entropy(logits, labels) * self.label_weights(labels)
        return losses.soft_cross_entropy(logits, labels, self.label_smoothing) * self.label_weights(labels)

    def loss(self, outputs: Batch, batch: Batch) -> dict[str, jax.Array]:
        """Returns the sum of the examples' losses."""
        return {"classify": self.losses(outputs, batch["labels"]).sum()}

    def predictions(self, outputs: Batch, batch: Batch) -> dict[str, jax.Array]:
        """Returns each example's logits, target and plain loss: without smoothing, weights and focus."""
        plain = dataclasses.replace(self, label_smoothing=0.0, weighting="none", class_weights=(), focal_gamma=0.0)
        return {"logits": outputs[self.head], "labels": batch["labels"], "losses": plain.losses(outputs, batch["labels"])}

    def metrics(self, arrays: Mapping[str, np.ndarray], valid: np.ndarray, examples: Any = None) -> dict[str, float]:
        """Returns the loss and the metrics of one label an example."""
        loss = {"loss": float(arrays["losses"][valid > 0].mean())}
        return loss | class_metrics.classification(arrays["logits"], arrays["labels"], valid)

    def inputs(self, examples: Sequence[Any], tokenizer: None, max_length: int, where: Where) -> dict[str, np.ndarray]:
        """Returns a batch from paths of image files, Pillow images, arrays of uint8 [H,W,C], or records with such."""
        return self.batch(examples, where)

    def describe(self, outputs: Batch, batch: Batch, tokenizer: None) -> list[dict[str, Any]]:
        """Returns the label and score of each image."""
        scores = np.asarray(jax.nn.softmax(np.asarray(outputs[self.head], np.float32), axis=-1))
        best = scores.argmax(axis=1)
        return [
            {
                "label": self.labels[index],
                "score": float(row[index]),
                "scores": {label: float(score) for label, score in zip(self.labels, row, strict=True)},
            }
            for index, row in zip(best.tolist(), scores, strict=True)
        ]


class Photographs(Examples):
    """Labelled images; in training `draw` changes them at random and mixes them with others."""

    def __init__(self, task: Task, source: Source, targets: np.ndarray, train: bool):
        self.task, self.source, self.targets, self.train = task, source, targets, train

    def __len__(self) -> int:
        return len(self.source)

    @property
    def classes(self) -> np.ndarray:
        """The class of each example [N], by which data.balance resamples."""
        return self.targets

    def where(self, index: int) -> str:
        return self.source.where(index)

    def __getitem__(self, index: int) -> Example:
        """Returns `images`, uint8 [S,S,C], and `labels`, a class."""
        image = self.task.prepared(self.source[index][self.task.image], self.source.where(index))
        return {"images": image, "labels": self.targets[index]}

    def draw(self, example: Example, rng: np.random.Generator) -> Example:
        """Returns `images`, fp32 [S,S,C], and `labels`: a class or, where training mixes them, shares of classes [C]."""
        task = self.task
        if not self.train:
            return {"images": task.normalised(example["images"]), "labels": example["labels"]}
        image = task.changed(example["images"], rng)
        if not task.mixes:
            return {"images": image, "labels": example["labels"]}
        other = self[int(rng.integers(len(self)))]
        one_hot = np.eye(len(task.labels), dtype=np.float32)
        pair = (image, one_hot[example["labels"]], task.changed(other["images"], rng), one_hot[other["labels"]])
        cut = rng.random() < (0.5 if task.mixup else 1.0) if task.cutmix else False
        image, label = images.cutmix(*pair, rng, task.cutmix) if cut else images.mixup(*pair, rng, task.mixup)
        return {"images": image, "labels": label}
