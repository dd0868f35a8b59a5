"""T5 and mT5 against the reference itself, on fresh random models: outputs, saving, loading, file layouts, mutations.

Needs torch and transformers: `pip install -e '.[parity]'`.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with the reference live: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="compares with the reference live: pip install -e '.[parity]'")

from golden import make, make_t5  # noqa: E402

import fmjax  # noqa: E402
from fmjax import pytree  # noqa: E402
from fmjax.hub.families import table_of  # noqa: E402

CLASSES = list(table_of("t5").classes())
KINDS = {
    "v1_0": {"feed_forward_proj": "relu"},
    "v1_1": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "silu": {"feed_forward_proj": "gated-silu"},
}
# Random weights of order 0.3 carry rounding errors through the layers; those of the usual initialisation, whose words are of
# order 1, hardly.
TOLERANCE, DEFAULT_TOLERANCE = 1e-4, 2e-5


def varied(seed: int) -> dict:
    """Returns settings of random sizes, in which heads do not make up the width."""
    rng = np.random.default_rng(seed)
    buckets = int(rng.integers(4, 20))
    return {
        "vocab_size": int(rng.integers(50, 200)),
        "d_model": int(rng.integers(10, 40)),
        "d_kv": int(rng.integers(3, 12)),
        "num_heads": int(rng.integers(1, 5)),
        "d_ff": int(rng.integers(10, 60)),
        "num_layers": int(rng.integers(1, 3)),
        "num_decoder_layers": int(rng.integers(1, 3)),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": int(rng.integers(buckets, 40)),
        "layer_norm_epsilon": float(rng.choice([1e-6, 1e-5, 1e-2])),
        "decoder_start_token_id": int(rng.integers(0, 3)),
    }


def error(model: fmjax.inference.pretrained.Pretrained, reference, arrays) -> float:
    expected = make_t5.outputs(reference, arrays)
    found = model.apply(**arrays)
    assert set(expected) <= set(found) <= set(expected) | {"last_hidden_state"}
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in expected.items())


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_saving_and_loading(name, kind, seed, tmp_path):
    reference = make_t5.reference(name, varied(seed) | KINDS[kind], seed)
    reference.save_pretrained(tmp_path / "theirs")
    model = fmjax.load(tmp_path / "theirs")
    arrays = make_t5.inputs(reference, 4, 23, 31, seed)
    assert make.rounding(reference, arrays, make_t5.outputs) <= TOLERANCE / 4
    assert error(model, reference, arrays) <= TOLERANCE
    unmasked = {key: array for key, array in arrays.items() if not key.endswith("mask")}
    assert error(model, reference, unmasked) <= TOLERANCE

    model.save(tmp_path / "ours")
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    before, after = make_t5.outputs(reference, arrays), make_t5.outputs(loaded.eval(), arrays)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "ours")) is type(reference.config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "MT5ForConditionalGeneration", "T5EncoderModel"])
def test_usual_initialisation(name, kind, tmp_path):
    reference = make_t5.reference(name, varied(3) | KINDS[kind] | {"layer_norm_epsilon": 1e-6}, seed=3, scale=0.0)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, make_t5.inputs(reference, 4, 23, 31, 3)) <= DEFAULT_TOLERANCE


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "MT5ForConditionalGeneration"])
def test_labels(name, tmp_path):
    reference = make_t5.reference(name, varied(4), seed=4)
    reference.save_pretrained(tmp_path)
    arrays = make_t5.inputs(reference, 3, 12, 9, 4)
    labels = np.where(arrays["decoder_attention_mask"] == 1, arrays["decoder_input_ids"], -100)
    # What an ignored label stands for, the reference fills in with the padding, which is here another token than the first.
    labels = np.where(labels == -100, 0, labels)
    source = {key: arrays[key] for key in ("input_ids", "attention_mask")}
    assert error(fmjax.load(tmp_path), reference, source | {"labels": labels}) <= TOLERANCE


def test_half_precision_and_shards(tmp_path):
    reference = make_t5.reference("T5ForConditionalGeneration", varied(5) | KINDS["v1_1"], seed=5)
    arrays = make_t5.inputs(reference, 3, 12, 9, 5)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert error(fmjax.load(tmp_path / "shards"), reference, arrays) <= TOLERANCE
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        reference.to(dtype).save_pretrained(folder)
        rounded = transformers.T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        assert error(fmjax.load(folder), rounded, arrays) <= TOLERANCE


@pytest.mark.parametrize(
    "mutation",
    [
        {"buckets": 12},
        {"max_distance": 29},
        {"epsilon": 1e-3},
        {"feed_forward": "gated-silu"},
        {"tied": False},
        {"width": 35},
    ],
)
def test_mutations_are_noticed(mutation, tmp_path):
    kind = KINDS["v1_1"] if "feed_forward" in mutation else {}
    given = varied(6) | {"d_model": 34, "relative_attention_num_buckets": 10, "relative_attention_max_distance": 20}
    reference = make_t5.reference("T5ForConditionalGeneration", given | kind | {"layer_norm_epsilon": 1e-5}, seed=6)
    reference.save_pretrained(tmp_path)
    right = fmjax.load(tmp_path)
    arrays = make_t5.inputs(reference, 3, 23, 31, 6)
    params = pytree.names(right.params)
    assert error(right, reference, arrays) <= TOLERANCE
    if "buckets" in mutation:  # the right model has no use for the last rows
        params |= {
            f"{part}/relative": np.resize(params[f"{part}/relative"], (12, given["num_heads"])) for part in ("encoder", "decoder")
        }
    if "tied" in mutation:
        params |= {"head/lm/kernel": params["embed/word/embedding"].T}
    if "width" in mutation:  # scores scaled as everywhere else
        params |= {name: leaf * given["d_kv"] ** -0.5 for name, leaf in params.items() if name.endswith("query/kernel")}
        mutation = {}
    wrong = type(right.model)(right.model.heads, dataclasses.replace(right.model.settings, **mutation))
    assert error(dataclasses.replace(right, model=wrong, params=pytree.unnames(params)), reference, arrays) > 4 * TOLERANCE


def test_ignored_masks_are_noticed(tmp_path):
    reference = make_t5.reference("T5Model", varied(7), seed=7)
    reference.save_pretrained(tmp_path)
    model = fmjax.load(tmp_path)
    arrays = make_t5.inputs(reference, 3, 23, 31, 7)
    expected = make_t5.outputs(reference, arrays)["last_hidden_state"]
    for name in ("attention_mask", "decoder_attention_mask"):
        found = model.apply(**arrays | {name: np.ones_like(arrays[name])})["last_hidden_state"]
        assert float(np.abs(np.asarray(found) - expected).max()) > 4 * TOLERANCE


@pytest.mark.parametrize("kind", ["v1_0", "v1_1"])
def test_cached_steps_are_those_of_the_reference(kind, tmp_path):
    reference = make_t5.reference("T5ForConditionalGeneration", varied(8) | KINDS[kind], seed=8)
    reference.save_pretrained(tmp_path)
    model = fmjax.load(tmp_path)
    arrays = make_t5.inputs(reference, 3, 12, 9, 8) | {"decoder_attention_mask": np.ones((3, 9), np.int64)}
    expected = make_t5.outputs(reference, arrays)["logits"]
    batch = model.checked_batch(arrays)
    apply = jax.jit(
        lambda *args, method: model.model.apply({"params": model.params}, *args, method=method), static_argnames="method"
    )
    memory, cache = apply(batch, method="encode"), model.model.empty_cache(3, 14)
    for step in range(9):
        outputs, cache = apply(
            {"decoder_input_ids": batch["decoder_input_ids"][:, step : step + 1]}, memory, cache, method="decode"
        )
        assert float(np.abs(np.asarray(outputs["lm"])[:, 0] - expected[:, step]).max()) <= TOLERANCE
