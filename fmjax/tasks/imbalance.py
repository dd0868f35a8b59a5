"""Options for class imbalance: class weights from the training data, focal loss."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fmjax import losses
from fmjax.config.numbers import number_of
from fmjax.contracts import Config
from fmjax.errors import UserError, in_range, one_of

WEIGHTINGS = ("none", *losses.WEIGHTINGS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
    """The settings of a loss over classes, from which a task of classes inherits.

    `weighting` says how class weights follow from the training data where `class_weights` does not
    list them: "balanced" or "effective". The loss is the weighted mean: the sum of weight x loss
    over the sum of weights.
    """

    label_smoothing: float = 0.0
    weighting: str = "none"
    # In the order of the labels; numbers, or as a command line gives them.
    class_weights: tuple[float | str, ...] = ()
    effective_beta: float = 0.999
    focal_gamma: float = 0.0  # 0: cross entropy

    def check_balance(self, labels: tuple[str, ...]) -> None:
        """Raises UserError for settings that are out of range, or do not fit each other or the
        labels.
        """
        one_of("task.weighting", self.weighting, WEIGHTINGS)
        in_range("task.label_smoothing", self.label_smoothing, least=0, below=1)
        in_range("task.effective_beta", self.effective_beta, least=0, below=1)
        in_range(
            "task.focal_gamma", self.focal_gamma, least=0, hint="0 means cross-entropy, 2 is usual"
        )
        if self.focal_gamma and self.label_smoothing:
            raise UserError(
                "task.focal_gamma and task.label_smoothing work against each other; set one of "
                "them to 0"
            )
        try:
            above = all(number_of(weight) > 0 for weight in self.class_weights)
        except ValueError:
            above = False
        if not above:
            listed = ",".join(map(str, self.class_weights))
            raise UserError(f"task.class_weights={listed}: must be numbers above 0, one per label")
        if self.class_weights and labels and len(self.class_weights) != len(labels):
            raise UserError(
                f"task.class_weights has {len(self.class_weights)} numbers for {len(labels)} "
                f"labels ({', '.join(labels[:10])}); give one for each, in that order"
            )

    @property
    def weighs(self) -> bool:
        """Whether class weights are still to be found in the training data."""
        return self.weighting != "none" and not self.class_weights

    @property
    def numbers(self) -> np.ndarray:
        """The class weights [C], none if there are none."""
        return np.array(self.class_weights, np.float32)

    def find_weights(
        self, labels: tuple[str, ...], counts: np.ndarray, total: int | None = None
    ) -> Config:
        """Returns the setting `class_weights` for the number of times that each label occurs in the
        training data.

        Of `total` examples that have any number of labels, a weight is that of the label present
        over that of it absent. Raises UserError for a label that never occurs, or always.
        """
        counts = np.asarray(counts, np.float64)
        absent = counts if total is None else total - counts
        for label, count, other in zip(labels, counts, absent, strict=True):
            if not count or not other:
                often = "no" if not count else "every"
                raise UserError(
                    f"task.weighting={self.weighting}: {often} example of the training data has "
                    f'the label "{label}"; leave it out of task.labels, or give task.class_weights'
                )
        weigh = losses.WEIGHTINGS[self.weighting]
        if total is None:
            weights = weigh(counts, self.effective_beta)
        else:
            pairs = [
                weigh(np.array(pair), self.effective_beta)
                for pair in zip(counts, absent, strict=True)
            ]
            weights = np.array([present / other for present, other in pairs])
        return {"class_weights": tuple(round(float(weight), 6) for weight in weights)}

    def weight(self, labels: jax.Array) -> jax.Array:
        """Returns the weight of each item [...] that has one label of C: its class's, or 1."""
        if not self.class_weights:
            return jnp.ones(labels.shape, jnp.float32)
        return jnp.asarray(self.numbers)[jnp.clip(labels, 0, len(self.class_weights) - 1)]

    def label_weight(self, labels: jax.Array) -> jax.Array:
        """Returns a weight for each item and class [..., C] of labels (0 or 1) [..., C]: a present
        one's weight; else 1.
        """
        if not self.class_weights:
            return jnp.ones(labels.shape, jnp.float32)
        weights = self.numbers.reshape((1,) * (labels.ndim - 1) + (-1,))
        return jnp.where(labels > 0.5, weights, 1.0)

    def cross_entropy(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Returns the training loss of each item [...], before its weight, of logits [..., C] and
        labels [...].
        """
        if self.focal_gamma:
            return losses.softmax_focal(logits, labels, self.focal_gamma)
        return losses.softmax_cross_entropy(logits, labels, self.label_smoothing)


LOSS = tuple(field.name for field in dataclasses.fields(Balance))  # settings of a loss alone
