"""The task of a Hugging Face folder, which holds a model and says no more of what it is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import flax.linen as nn

from fmjax import tasks
from fmjax.contracts import Config, Encodes, Processors, Task, Value
from fmjax.data.kinds import image
from fmjax.errors import UserError
from fmjax.hub.reference import class_names

ROWS = "fmjax_rows"  # the key of config.json for a language model's `task.rows`
KINDS = {
    "single_label_classification": "single",
    "multi_label_classification": "multi",
    "regression": "regression",
}


def folder_task(
    config: Config,
    model: nn.Module,
    processors: Processors,
    class_name: Callable[[], str],
    examples: Iterable[Value] = (),
) -> Task:
    """Returns the task of a Hugging Face folder, by its model's heads and the examples to be
    answered.

    `class_name` returns the reference's name of the model's class, for messages. Raises UserError
    if it has no task."""
    kinds, images = model.heads, processors.get("image")
    if isinstance(images, image.Processor) and (
        head := next((kind for kind in kinds if kind.startswith("classify")), "")
    ):
        labels = class_names(config)
        return tasks.make(
            {"name": "image_classify", "head": head, "labels": labels, **images.settings()}
        )
    if "mlm" in kinds:
        return tasks.make({"name": "mlm", "nsp": "nsp" in kinds})
    if "tag" in kinds:
        return tasks.make({"name": "tag", "labels": class_names(config), "overlong": "split"})
    if "span" in kinds:
        return tasks.make({"name": "qa"})
    if "choice" in kinds:
        return tasks.make({"name": "choice"})
    if "lm" in kinds:
        if not isinstance(model, Encodes):
            return tasks.make({"name": "clm", "rows": config.get(ROWS, "offset")})
        most = min(model.settings.positions or 128, 128)
        return tasks.make(
            {"name": "seq2seq", "source": "text", "scores": (), "max_new_tokens": most}
        )
    if "classify" not in kinds:
        advice = "use .apply, or a model for masked words or classes"
        raise UserError(f"{class_name()} has no human-readable output; {advice}")
    return text_classification(config, examples)


def text_classification(config: Config, examples: Iterable[Value]) -> Task:
    """Returns the task of a model that classifies texts, or pairs if an example is one.

    Raises UserError if its kind of problem is not supported.
    """
    labels = class_names(config)
    problem = config.get("problem_type") or (
        "regression" if len(labels) == 1 else "single_label_classification"
    )
    if problem not in KINDS:
        raise UserError(
            f'config.json: problem_type="{problem}" is not supported; supported: {", ".join(KINDS)}'
        )
    kind = KINDS[problem]
    if kind == "regression" and len(labels) > 1:
        raise UserError(
            f"config.json: a regression with {len(labels)} outputs has no human-readable output; "
            "use .apply"
        )
    paired = any(is_pair(example) for example in examples)
    return tasks.make(
        {
            "name": "classify",
            "kind": kind,
            "labels": labels,
            "text_pair": "text_pair" if paired else "",
        }
    )


def is_pair(example: Value) -> bool:
    """Returns whether an example of classification has two texts."""
    return (
        "text_pair" in example
        if isinstance(example, Mapping)
        else isinstance(example, list | tuple)
    )
