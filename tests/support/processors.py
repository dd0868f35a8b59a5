"""Processors for tests of tasks."""

from __future__ import annotations

from fmjax.contracts import Processors, Task
from fmjax.data.kinds import lifecycle, text
from fmjax.data.tokenizers.tokenizer import Tokenizer


def using(tokenizer: Tokenizer) -> Processors:
    """Returns the processors of a task that reads texts."""
    return Processors(text.Processor(tokenizer))


def images_of(task: Task) -> Processors:
    """Returns the processors of a task of images whose settings leave nothing open."""
    return lifecycle.from_settings(task)
