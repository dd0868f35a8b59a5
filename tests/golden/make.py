"""Makes the golden folders beside this file: tiny random models of the reference, with inputs and its outputs.

    pip install -e '.[parity]'
    python tests/golden/make.py

Each folder is a Hugging Face folder plus `expected.npz`, whose arrays are named `<set>.<input or output>`. Every weight,
bias and norm scale is drawn at order 0.3: at the usual initialisation, biases are zero and a wrong activation hardly
shows. Made with torch 2.13.0 and transformers 5.23.0; the tests in `tests/parity` do the same live.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

Outputs = Callable[[Any, dict[str, np.ndarray]], dict[str, np.ndarray]]
SMALL = {
    "vocab_size": 97,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 130,
    "layer_norm_eps": 1e-5,  # at 1e-12 a wrong epsilon would not show
}
DISTIL = {"vocab_size": 97, "dim": 36, "n_layers": 2, "n_heads": 3, "hidden_dim": 50, "max_position_embeddings": 130}
ROBERTA = SMALL | {"max_position_embeddings": 132, "type_vocab_size": 2}
ELECTRA = SMALL | {"embedding_size": 20}
# Where only the head is new, a smaller body carries it.
LESS = {"vocab_size": 41, "hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 31, "max_position_embeddings": 40}
DISTIL_LESS = DISTIL | {"vocab_size": 41, "dim": 24, "n_layers": 1, "hidden_dim": 31, "max_position_embeddings": 40}
LABELS = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}

# Folder -> the reference's class and settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert_pretraining": ("BertForPreTraining", SMALL),
    "bert_classify": ("BertForSequenceClassification", SMALL | LABELS),
    "roberta_mlm": ("RobertaForMaskedLM", ROBERTA),
    "roberta_classify": ("RobertaForSequenceClassification", ROBERTA | LABELS),
    "distilbert_mlm": ("DistilBertForMaskedLM", DISTIL),
    "distilbert_classify": ("DistilBertForSequenceClassification", DISTIL | LABELS),
    "electra_mlm": ("ElectraForMaskedLM", ELECTRA),
    "electra_rtd": ("ElectraForPreTraining", ELECTRA),
    "electra_classify": ("ElectraForSequenceClassification", ELECTRA | LABELS),
    "bert_tag": ("BertForTokenClassification", SMALL | LESS | LABELS),
    "bert_span": ("BertForQuestionAnswering", SMALL | LESS),
    "bert_choice": ("BertForMultipleChoice", SMALL | LESS),
    "roberta_tag": ("RobertaForTokenClassification", ROBERTA | LESS | LABELS),
    "roberta_span": ("RobertaForQuestionAnswering", ROBERTA | LESS),
    "roberta_choice": ("RobertaForMultipleChoice", ROBERTA | LESS),
    "distilbert_tag": ("DistilBertForTokenClassification", DISTIL_LESS | LABELS),
    "distilbert_span": ("DistilBertForQuestionAnswering", DISTIL_LESS),
    "distilbert_choice": ("DistilBertForMultipleChoice", DISTIL_LESS),
    "electra_tag": ("ElectraForTokenClassification", ELECTRA | LESS | LABELS),
    "electra_span": ("ElectraForQuestionAnswering", ELECTRA | LESS),
    "electra_choice": ("ElectraForMultipleChoice", ELECTRA | LESS),
}


def reference(name: str, settings: dict[str, Any], seed: int, scale: float = 0.3) -> Any:
    """Returns a model of the reference in evaluation mode, its parameters drawn anew; scale 0: as it initialises them."""
    torch.manual_seed(seed)
    model = getattr(transformers, name)
    model = model(model.config_class(**settings)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters() if scale else ():
            drawn = scale * torch.randn_like(parameter)
            norm = key.endswith("weight") and "norm" in key.lower()
            parameter.copy_(1 + drawn if norm else drawn)
    return model


def inputs(model: Any, rows: int, length: int, seed: int, masked: bool = True) -> dict[str, np.ndarray]:
    """Returns inputs with padding at both ends and holes in the middle; RoBERTa's padding stands in the ids too."""
    rng = np.random.default_rng(seed)
    config = model.config
    ids = rng.integers(3, config.vocab_size, (rows, length))
    mask = np.ones((rows, length), np.int64)
    if masked:
        mask[0, length - 5 :] = 0
        mask[1, :3] = 0
        mask[2:] = rng.random((rows - 2, length)) < 0.7
        mask[:, length // 2] = 1  # the reference gives a row without any key another meaning from one kernel to the next
        ids[mask == 0] = config.pad_token_id
    arrays = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0):
        arrays["token_type_ids"] = rng.integers(0, config.type_vocab_size, (rows, length))
    return arrays


def grouped(model: Any, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the inputs as the model reads them: of multiple choice, [rows, choices, length]; every other is [rows, length]."""
    if not type(model).__name__.endswith("MultipleChoice"):
        return arrays
    return {name: array.reshape(2, -1, array.shape[-1]) for name, array in arrays.items()}


def outputs(model: Any, arrays: dict[str, np.ndarray], body: bool = True) -> dict[str, np.ndarray]:
    """Returns the reference's outputs, with those of its body, as numpy arrays."""
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    with torch.no_grad():
        found = (dict(model.base_model(**tensors)) if body else {}) | dict(model(**tensors))
    return {name: value.float().numpy() for name, value in found.items() if isinstance(value, torch.Tensor)}


def rounding(
    model: Any, arrays: dict[str, np.ndarray], outputs: Callable[[Any, dict[str, np.ndarray]], dict[str, np.ndarray]]
) -> float:
    """Returns how far fp32 takes the reference from itself in fp64: a draw that its rounding takes near a bound tests nothing."""
    exact = outputs(copy.deepcopy(model).double(), arrays)
    return max(float(np.abs(array - exact[name]).max()) for name, array in outputs(model, arrays).items())


def main() -> None:
    """Writes all folders."""
    for seed, (case, (name, settings)) in enumerate(CASES.items()):
        folder = Path(__file__).parent / case
        model = reference(name, settings, seed)
        model.save_pretrained(folder)
        sets = {"short": grouped(model, inputs(model, 6 if case.endswith("choice") else 3, 20, seed))}
        body = case.endswith(("mlm", "pretraining"))  # once a family: the files are to stay small
        if body:
            sets["full"] = inputs(model, 1, 130, seed, masked=False)
        expected = {
            f"{label}.{key}": array
            for label, arrays in sets.items()
            for key, array in (arrays | outputs(model, arrays, body)).items()
        }
        np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main()
