"""BERT and its descendants against the reference itself, on fresh random models: outputs, saving, loading, file layouts.

Needs torch and transformers: `pip install -e '.[parity]'`.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with the reference live: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="compares with the reference live: pip install -e '.[parity]'")

from golden import make  # noqa: E402

import fmjax  # noqa: E402
from fmjax.errors import UserError  # noqa: E402
from fmjax.hub.families import table_of  # noqa: E402

pytestmark = pytest.mark.optimized

CONFIGS = {
    "Bert": make.SMALL,
    "Roberta": make.ROBERTA,
    "XLMRoberta": make.ROBERTA,
    "Camembert": make.ROBERTA,
    "DistilBert": make.DISTIL,
    "Electra": make.ELECTRA,
}
CLASSES = [name for family in ("bert", "roberta", "distilbert", "electra") for name in table_of(family).classes()]
# Random weights of order 0.3 carry rounding errors through two layers; those of the usual initialisation do not.
TOLERANCE, DEFAULT_TOLERANCE = 1e-4, 2e-6


@pytest.fixture(autouse=True)
def eager():
    with jax.disable_jit():
        yield


def settings(name: str) -> dict:
    stem = next(stem for stem in CONFIGS if name.startswith(stem))
    return CONFIGS[stem] | (make.LABELS if "Classification" in name else {})


def varied(name: str, seed: int) -> dict:
    """Returns settings of random sizes; RoBERTa's positions begin after its padding id, wherever that is."""
    rng = np.random.default_rng(seed)
    heads, padding = int(rng.integers(1, 5)), int(rng.integers(0, 3))
    sizes = {
        "vocab_size": int(rng.integers(50, 200)),
        "hidden_size": heads * int(rng.integers(4, 12)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": heads,
        "intermediate_size": int(rng.integers(10, 90)),
        "max_position_embeddings": int(rng.integers(30, 60)),
        "pad_token_id": padding,
    }
    given = settings(name)
    if name.startswith("DistilBert"):
        distil = ("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings", "pad_token_id")
        return given | dict(zip(distil, sizes.values(), strict=True))
    if name.startswith("Electra"):
        sizes["embedding_size"] = int(rng.choice([sizes["hidden_size"], 12]))  # the same width has no projection
    return given | sizes | {"type_vocab_size": int(rng.integers(1, 5)), "layer_norm_eps": float(rng.choice([1e-12, 1e-5, 1e-2]))}


def error(model: fmjax.inference.pretrained.Pretrained, reference, arrays) -> float:
    choice = "choice" in model.model.heads
    arrays = make.grouped(reference, arrays)
    expected = make.outputs(reference, arrays, body=not choice)
    found = model.apply(**arrays)
    assert set(expected) <= set(found)
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in expected.items())


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_saving_and_loading(name, seed, tmp_path):
    reference = make.reference(name, varied(name, seed), seed)
    reference.save_pretrained(tmp_path / "theirs")
    model = fmjax.load(tmp_path / "theirs")
    arrays = make.inputs(reference, 4, 24, seed)
    assert error(model, reference, arrays) <= TOLERANCE
    assert error(model, reference, {"input_ids": arrays["input_ids"]}) <= TOLERANCE

    model.save(tmp_path / "ours")
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    arrays, body = make.grouped(reference, arrays), not name.endswith("MultipleChoice")
    before, after = make.outputs(reference, arrays, body), make.outputs(loaded.eval(), arrays, body)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "ours")) is type(reference.config)


@pytest.mark.parametrize("name", CLASSES)
def test_usual_initialisation(name, tmp_path):
    given = settings(name) | ({} if name.startswith("DistilBert") else {"layer_norm_eps": 1e-12})
    reference = make.reference(name, given, seed=3, scale=0.0)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, make.inputs(reference, 4, 24, 3)) <= DEFAULT_TOLERANCE


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh"])
@pytest.mark.parametrize("name", ["BertForPreTraining", "ElectraForPreTraining", "RobertaForMaskedLM"])
def test_activations(name, act, tmp_path):
    reference = make.reference(name, settings(name) | {"hidden_act": act}, seed=4)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, make.inputs(reference, 4, 24, 4)) <= TOLERANCE


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaModel", "DistilBertForMaskedLM", "ElectraForMaskedLM"])
def test_shards_and_half_precision(name, tmp_path):
    reference = make.reference(name, settings(name), seed=5)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    arrays = make.inputs(reference, 4, 24, 5)
    assert error(fmjax.load(tmp_path / "shards"), reference, arrays) <= TOLERANCE
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        reference.to(dtype).save_pretrained(folder)
        rounded = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
        model = fmjax.load(folder)
        assert error(model, rounded, arrays) <= TOLERANCE
        model.save(tmp_path / "back" / str(dtype))
        assert getattr(transformers, name).from_pretrained(tmp_path / "back" / str(dtype)).dtype == torch.float32


@pytest.mark.parametrize("name", ["BertForMaskedLM", "RobertaForMaskedLM", "ElectraForMaskedLM", "DistilBertForMaskedLM"])
def test_positions_can_be_given(name, tmp_path):
    reference = make.reference(name, settings(name), seed=6)
    reference.save_pretrained(tmp_path)
    arrays = make.inputs(reference, 4, 24, 6)
    positions = np.random.default_rng(0).integers(0, reference.config.max_position_embeddings, (4, 24))
    assert error(fmjax.load(tmp_path), reference, arrays | {"position_ids": positions}) <= TOLERANCE
    assert error(fmjax.load(tmp_path), reference, arrays | {"position_ids": positions[:1]}) <= TOLERANCE


def test_rows_without_any_key_average_the_values(tmp_path):
    name = "BertModel"
    reference = make.reference(name, settings(name), seed=7)
    reference.set_attn_implementation("eager")
    reference.save_pretrained(tmp_path)
    arrays = make.inputs(reference, 3, 8, 7)
    arrays["attention_mask"][1] = 0
    assert error(fmjax.load(tmp_path), reference, arrays) <= TOLERANCE


def test_a_pickle_is_converted_by_the_recipe(tmp_path, monkeypatch):
    reference = make.reference("BertForMaskedLM", settings("BertForMaskedLM"), seed=8)
    reference.config.save_pretrained(tmp_path)
    reference.config.architectures = ["BertForMaskedLM"]
    reference.config.save_pretrained(tmp_path)
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as caught:
        fmjax.load(tmp_path)
    recipe = str(caught.value).partition('python -c "')[2].removesuffix('"')
    exec(recipe, {})
    assert error(fmjax.load(tmp_path), reference, make.inputs(reference, 3, 8, 8)) <= TOLERANCE


def test_a_body_loads_into_another_class(tmp_path):
    reference = make.reference("BertForPreTraining", settings("BertForPreTraining"), seed=9)
    reference.save_pretrained(tmp_path / "theirs")
    fmjax.load(tmp_path / "theirs").save(tmp_path / "ours")
    body = transformers.BertModel.from_pretrained(tmp_path / "ours").eval()
    arrays = make.inputs(reference, 3, 8, 9)
    before, after = make.outputs(reference.base_model, arrays), make.outputs(body, arrays)
    assert all(np.array_equal(before[key], after[key]) for key in before)
