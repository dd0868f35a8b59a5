"""Prints the table of the README: for each family and output, the largest absolute difference from the reference.

    pip install -e '.[parity]'
    python tests/parity/table.py

Every class of a family is drawn anew three times, in random sizes, with every weight, bias and norm scale at order 0.3, and
once as the reference initialises it; inputs have padding at both ends and holes. fp32 on a CPU. As in the tests, draws in which
rounding takes the reference more than a quarter of 1e-4 away from itself in fp64 are left out.
"""

# ruff: noqa: E402 (run as a file, it has to find the checkout first)
from __future__ import annotations

import itertools
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

for folder in Path(__file__).resolve().parents[1:3]:  # the tests, and the checkout
    sys.path.insert(0, str(folder))

import jax
import numpy as np
from golden import make, make_decoders, make_seq2seq, make_t5, make_vision
from parity import test_decoders, test_encoders, test_t5, test_transformer, test_vit

import fmjax

DRAWS, BOUND = 3, 1e-4
COLUMNS = {
    "hidden": "hidden states", "encoder_hidden": "encoder's", "pooled": "pooled", "mlm": "MLM logits", "lm": "LM logits",
    "nsp": "NSP", "classify": "classes", "tag": "tags", "span": "spans", "choice": "choices", "rtd": "replaced",
    "pixels": "pixels",
}  # fmt: skip
Pair = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]  # inputs and outputs


def text(outputs: Callable[..., Any], inputs: Callable[..., Any], reference: Any, seed: int) -> Pair | None:
    """Returns None of a draw that is left out."""
    arrays = inputs(reference, seed)
    return None if make.rounding(reference, arrays, outputs) > BOUND / 4 else (arrays, outputs(reference, arrays))


def images(reference: Any, seed: int) -> Pair:
    size = reference.config.image_size
    arrays = make_vision.outputs(reference, make_vision.images(reference.config, 3, size, size, seed), seed)
    inputs = {name: arrays.pop(name) for name in ("pixel_values", "patch_keep") if name in arrays}
    return inputs, arrays


def cases() -> Iterator[tuple[str, Callable[..., Any], Callable[[int], dict[str, Any]], Callable[..., Any]]]:
    """Yields a class, what draws a reference, its settings by seed, and what gives inputs and the reference's outputs."""
    for name in test_encoders.CLASSES:
        outputs = partial(make.outputs, body=not name.endswith("MultipleChoice"))
        encoded = partial(text, outputs, lambda model, seed: make.grouped(model, make.inputs(model, 6, 24, seed)))
        yield name, make.reference, partial(test_encoders.varied, name), encoded
    decoded = partial(text, make_decoders.outputs, lambda model, seed: make_decoders.inputs(model, 4, 24, seed))
    for name in test_decoders.CLASSES:
        yield name, make_decoders.reference, partial(test_decoders.varied, name), decoded
    shared = partial(text, make_t5.outputs, lambda model, seed: make_t5.inputs(model, 4, 23, 31, seed))
    for name in test_t5.CLASSES:
        for kind in test_t5.KINDS.values():
            yield name, make_t5.reference, lambda seed, kind=kind: test_t5.varied(seed) | kind, shared
    translated = partial(text, make_seq2seq.outputs, lambda model, seed: make_seq2seq.inputs(model, 4, 24, 17, seed))
    for name in test_transformer.CLASSES:
        yield name, make_seq2seq.reference, partial(test_transformer.varied, name), translated
    for name in test_vit.CLASSES:
        yield name, make.reference, partial(test_vit.varied, name), images


def errors(reference: Any, pair: Pair) -> Iterator[tuple[str, str, float]]:
    """Yields the family, the output by our name, and its error, for each output of one model."""
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(folder)
        model = fmjax.load(folder)
        inputs, outputs = pair
        found = model.apply(**inputs)
    names = model.reference.architectures[type(reference).__name__]
    own = {"last_hidden_state": "hidden", "encoder_last_hidden_state": "encoder_hidden", "pooler_output": "pooled"}
    for kind, theirs in names.items():
        own |= dict.fromkeys((theirs,) if isinstance(theirs, str) else theirs, kind.partition("_")[0])
    for name in set(found) & set(outputs):
        family = model.family.name
        yield family, own[name], float(np.abs(np.asarray(found[name]) - outputs[name]).max())


def main() -> None:
    """Compares every class, and prints the table in Markdown."""
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    for name, reference, settings, compared in cases():
        models = (reference(name, settings(seed), seed) for seed in itertools.count(1))
        pairs = ((model, compared(model, seed)) for seed, model in enumerate(models, start=1))
        drawn = list(itertools.islice((found for found in pairs if found[1]), DRAWS))
        usual = reference(name, settings(4), 4, scale=0.0)
        drawn.append((usual, compared(usual, 4)))
        with jax.disable_jit():
            for model, pair in drawn:
                for family, kind, error in errors(model, pair):
                    worst[family][kind] = max(error, worst[family].get(kind, 0.0))
        print(name, file=sys.stderr)
    kinds = [kind for kind in COLUMNS if any(kind in row for row in worst.values())]
    print(f"| family | {' | '.join(COLUMNS[kind] for kind in kinds)} |\n|{'---|' * (1 + len(kinds))}")
    for family, row in worst.items():
        print(f"| `{family}` | {' | '.join(f'{row[kind]:.1e}' if kind in row else '' for kind in kinds)} |")


if __name__ == "__main__":
    main()
