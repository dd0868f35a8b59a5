"""The content of an exported run's Hugging Face files: settings, classes, special tokens, and the
beginning of prompts."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import processors

from fmjax.config.json_files import read_json, write_json
from fmjax.contracts import Config, Encodes, PyTree, Task
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.decoding.settings import special_tokens
from fmjax.hub import families, folders
from fmjax.hub.reference import CLASSED, Reference
from fmjax.inference.folder_task import KINDS, ROWS
from fmjax.tasks import clm


def written_config(
    reference: Reference, model: PyTree, task: Task, tokenizer: Tokenizer | None, run: Config
) -> tuple[Reference, Config]:
    """Returns the counterpart of a run's model, and its config there.

    Args:
      reference: the family's reference; the run may use another of its variants.
      model: the model with its heads and settings.
      task: the run's.
      tokenizer: the run's, if it has one.
      run: the run's config, which has the type of the model that it started from.

    Raises UserError if the reference has no such model.
    """
    reference, name = reference.exported(model.heads, run.get("init", {}).get("model_type", ""))
    pad_id = tokenizer.pad_id if tokenizer and "pad" in tokenizer.roles else None
    config = reference.write_config(model.settings, pad_id) | {"architectures": [name]}
    if not families.is_known(reference.model_types[0]):
        config[families.FAMILY] = run["model"]["name"]
    if tokenizer is not None:
        config = special_ids(tokenizer, model) | config
    if isinstance(task, clm.Task):
        config[ROWS] = task.rows
    if set(CLASSED) & set(model.heads):
        labels = task.labels or ("LABEL_0",)
        config["id2label"] = {str(index): label for index, label in enumerate(labels)}
        config["label2id"] = {label: index for index, label in enumerate(labels)}
    if "classify" in model.heads:
        config["problem_type"] = next(theirs for theirs, ours in KINDS.items() if ours == task.kind)
    return reference, config


def special_ids(tokenizer: Tokenizer, model: PyTree) -> Config:
    """Returns the ids of the tokens that a text begins and ends with, None if there is none.

    The reference's defaults, such as 50256 for GPT-2, belong to another vocabulary.
    """
    ids = {name: number for number, name in enumerate(tokenizer.pieces.tokens)}
    named = tokenizer.settings.get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    # Without another start token, a decoder starts after the end-of-document token.
    usual = None if isinstance(model, Encodes) else tokenizer.end_id
    opening = tokenizer.roles.get("cls") if named not in ids else named
    begin = usual if opening is None else ids[opening]
    return {"bos_token_id": begin, "eos_token_id": tokenizer.end_id}


def special_type(config: Config, family: str) -> str:
    """Returns the `model_type` of a folder's config; empty if its family determines it.

    A run keeps it as `init.model_type`, so that an XLM-RoBERTa is exported as one.
    """
    kind, usual = folders.model_type(config), families.reference(family)
    return "" if kind is None or usual is None or kind in usual.model_types else kind


def written_generation(task: Task, model: PyTree, tokenizer: Tokenizer | None) -> Config:
    """Returns the generation settings of a run in the reference's form; empty if it does not
    generate."""
    if task.generation is None:
        return {}
    special: Config = {}
    if tokenizer is not None:
        special = special_ids(tokenizer, model) | special_tokens(tokenizer, model)
    settings = special | dict(task.generation)
    return {name: value for name, value in settings.items() if value is not None}


def save_prompts(folder: Path, task: Task, tokenizer: Tokenizer) -> None:
    """Configures the reference's tokenizer in a folder to begin texts like a language model's
    prompts, and to append nothing, since a prompt with an end token would not be continued."""
    if not isinstance(task, clm.Task) or not (folder / "tokenizer.json").is_file():
        return
    before = task.before(tokenizer).tolist()
    if before == tokenizer.opening.tolist() and not tokenizer.closing.size:
        return
    whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = [tokenizer.token(number) for number in before]
    whole.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"],
        pair=[*names, "$A", "$B"],
        special_tokens=list(zip(names, before, strict=True)),
    )
    whole.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    # Other classes have their own way to add special tokens.
    own = ("add_bos_token", "add_eos_token", "tokenizer_class")
    settings = {name: value for name, value in read_json(path).items() if name not in own}
    write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
