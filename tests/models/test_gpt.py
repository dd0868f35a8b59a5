"""GPT-2, Llama, Mistral and Qwen2 against outputs of the reference, mutations that the comparison must notice, decoding with
a cache, packed rows, and their files."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmjax import models, pytree
from fmjax.errors import UserError
from fmjax.hub import families, folders
from fmjax.hub.reference import Reference
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained, abstract_params
from fmjax.models import gpt, llama, mistral, qwen2

GOLDEN = Path(__file__).parents[1] / "golden" / "decoders"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
FAMILIES = (gpt, llama, mistral, qwen2)
SIZE = {"width": 12, "layers": 2, "attention_heads": 3, "mlp_width": 8, "vocab_size": 11}

TOLERANCE = 3e-5  # four times the largest error that was reached
pytestmark = pytest.mark.usefixtures("eager")


@functools.cache
def golden(case: str) -> Pretrained:
    return load(GOLDEN / case)


def expected(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the inputs and the reference's outputs of a golden folder."""
    with np.load(GOLDEN / case / "expected.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    inputs = {name: array for name, array in arrays.items() if array.dtype.kind == "i"}
    return inputs, {name: array for name, array in arrays.items() if name not in inputs}


def error(model: Pretrained, case: str, **changed: np.ndarray) -> float:
    """Returns the largest absolute error over all outputs."""
    inputs, outputs = expected(case)
    found = model.apply(**inputs | changed)
    assert set(outputs) == set(found)
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in outputs.items())


def table(family: ModuleType) -> Reference:
    """Returns the counterpart of a family."""
    return families.table_of(family.__name__.rpartition(".")[2])


def changed(model: Pretrained, **settings: object) -> Pretrained:
    settings = dataclasses.replace(model.model.settings, **settings)
    return dataclasses.replace(model, model=model.model.clone(settings=settings))


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_reference(case):
    assert error(golden(case), case) <= TOLERANCE


def test_compiled_and_scanned_are_the_same():
    with jax.disable_jit(False):
        assert error(golden("gpt2_classify"), "gpt2_classify") <= TOLERANCE
    assert error(changed(golden("llama_biases"), scan_layers=True), "llama_biases") <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "mutation"),
    [
        ("gpt2_lm", {"activation": "gelu"}),
        ("gpt2_lm", {"epsilon": 1e-2}),
        ("llama_lm", {"activation": "gelu"}),
        ("llama_lm", {"epsilon": 1e-2}),
        ("llama_lm", {"rotary_base": 1000.0}),
        ("llama_biases", {"rotary_scaling": "default"}),
        ("llama_biases", {"rotary_scaling": "linear"}),
        ("llama_biases", {"rotary_low": 1.2}),
        ("llama_biases", {"rotary_high": 3.5}),
        ("llama_classify", {"rotary_factor": 2.0}),
        ("llama_classify", {"rotary_scaling": "default"}),
        ("mistral_lm", {"window": 0}),
        ("mistral_lm", {"window": 6}),
        ("mistral_lm", {"window": 4}),
    ],
)
def test_settings_matter(case, mutation):
    assert error(changed(golden(case), **mutation), case) > 4 * TOLERANCE


@pytest.mark.parametrize("case", ["gpt2_lm", "llama_lm", "mistral_lm"])
def test_inputs_matter(case):
    model, (inputs, _) = golden(case), expected(case)
    assert error(model, case, attention_mask=np.ones_like(inputs["attention_mask"])) > 4 * TOLERANCE
    positions = np.arange(inputs["input_ids"].shape[1])[None]
    assert error(model, case, position_ids=positions) <= TOLERANCE
    # Rotary positions count from anywhere: distances alone matter.
    moved = error(model, case, position_ids=positions + 1)
    assert moved > 4 * TOLERANCE if case == "gpt2_lm" else moved <= 4 * TOLERANCE
    assert error(model, case, position_ids=positions[:, ::-1]) > 4 * TOLERANCE


@pytest.mark.parametrize("case", ["gpt2_lm", "llama_biases", "qwen2_lm"])
def test_biases_matter(case):
    model, (inputs, _) = golden(case), expected(case)
    names = [name for name in pytree.names(model.params) if name.endswith("/bias")]
    assert len(names) == {"gpt2_lm": 9, "llama_biases": 7, "qwen2_lm": 3}[case]
    batch = model.checked_batch(inputs)
    with jax.disable_jit(False):
        logits = jax.jit(lambda params: model.model.apply({"params": params}, batch)["lm"])
        right = logits(model.params)
        for zeroed in names:
            wrong = logits(pytree.map_named(lambda name, leaf, zeroed=zeroed: leaf * (name != zeroed), model.params))
            # A key's bias adds the same to all scores of a query, which softmax takes out, unless positions turn it.
            seen = float(abs(wrong - right).max()) > 4 * TOLERANCE
            assert seen == (case != "gpt2_lm" or not zeroed.endswith("key/bias")), zeroed


def test_the_future_is_not_seen():
    for case in ("gpt2_lm", "mistral_lm"):
        model, (inputs, _) = golden(case), expected(case)
        ids = inputs["input_ids"]
        other = np.concatenate([ids[:, :9], (ids[:, 9:] + 1) % 41], axis=1)
        one, two = (np.asarray(model.apply(input_ids=given)["logits"]) for given in (ids, other))
        assert np.abs(one - two)[:, :9].max() < 1e-6 < np.abs(one - two)[:, 9:].max()


def pieces(model: Pretrained, ids: np.ndarray, mask: np.ndarray, cuts: tuple[int, ...]) -> np.ndarray:
    """Returns the logits of tokens that are decoded piece by piece."""
    cache, found, length = model.model.empty_cache(len(ids), ids.shape[1] + 3), [], ids.shape[1]
    decode = jax.jit(lambda batch, cache: model.model.apply({"params": model.params}, batch, None, cache, method="decode"))
    for begin, end in zip((0, *cuts), (*cuts, length), strict=True):
        batch = {"input_ids": jnp.asarray(ids[:, begin:end]), "attention_mask": jnp.asarray(mask[:, begin:end])}
        outputs, cache = decode(batch, cache)
        found.append(outputs["lm"])
    assert int(cache["index"]) == length and cache["next"].tolist() == mask.sum(axis=1).tolist()
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("case", ["gpt2_lm", "mistral_lm"])
def test_decoding_with_a_cache_is_decoding_at_once(case):
    """A prompt of 8 places with padding right of it, none, or left, then 3 tokens; Mistral's window is 5."""
    model, rng = changed(golden(case), scan_layers=True), np.random.default_rng(0)
    texts = rng.integers(3, 41, (3, 11))
    mask = np.ones((3, 11), np.int64)
    mask[0, 5:8], mask[2, :2] = 0, 0
    ids = np.zeros((3, 11), np.int64)
    ids[mask == 1] = np.concatenate([text[:count] for text, count in zip(texts, mask.sum(axis=1), strict=True)])
    with jax.disable_jit(False):
        found, at_once = pieces(model, ids, mask, (8, 9, 10)), np.asarray(model.apply(input_ids=texts)["logits"])
    for row, count in enumerate(mask.sum(axis=1)):
        np.testing.assert_allclose(found[row, mask[row] == 1], at_once[row, :count], atol=TOLERANCE)


@pytest.mark.parametrize("case", ["gpt2_lm", "mistral_lm"])
def test_packed_rows_are_single_rows(case):
    model, rng = golden(case), np.random.default_rng(1)
    texts = rng.integers(3, 41, (3, 17))
    batch = {
        "input_ids": np.concatenate([texts[0, :8], texts[1, :7], [0, 0]])[None].repeat(3, axis=0),
        "segment_ids": np.repeat([1, 2, 0], [8, 7, 2])[None].repeat(3, axis=0),
        "position_ids": np.concatenate([np.arange(8), np.arange(7), [0, 0]])[None].repeat(3, axis=0),
    }
    found = model.model.apply({"params": model.params}, jax.tree.map(jnp.asarray, batch))["lm"][0]
    alone = np.asarray(model.apply(input_ids=texts)["logits"])
    np.testing.assert_allclose(found[:15], np.concatenate([alone[0, :8], alone[1, :7]]), atol=TOLERANCE)


def test_a_classifier_reads_the_last_token_that_is_not_padding():
    hidden, rng = np.random.default_rng(2).normal(size=(3, 4, 5)).astype(np.float32), {"params": jax.random.key(0)}
    batch = {"input_ids": jnp.array([[3, 0, 4, 0], [3, 4, 5, 6], [0, 0, 0, 3]])}
    mask = {"attention_mask": jnp.array([[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])}
    for pad_id, given, last in (
        (0, batch, (2, 3, 3)),  # as the reference: by the ids
        (0, batch | mask, (2, 1, 3)),
        (-1, batch | mask, (2, 1, 3)),
        (-1, batch, (3, 3, 3)),
    ):
        logits, params = gpt.ClassifyLast(pad_id).init_with_output(rng, {"hidden": jnp.array(hidden)}, given)
        kernel = jax.tree.leaves(params)[0]
        np.testing.assert_allclose(logits, hidden[np.arange(3), last] @ kernel, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__.rpartition(".")[2])
def test_tables_cover_every_architecture(family):
    reference = table(family)
    heads = {kind: {} for kinds in reference.architectures.values() for kind in kinds}
    biases = {"qkv_bias": True, "out_bias": True, "mlp_bias": True} if family is llama else {}
    sizes = SIZE | {"kv_heads": 1} | biases if family is not gpt else SIZE
    seen = set(pytree.names(abstract_params(family.build(heads=heads, tied=False, **sizes))))
    ours = [name for rule in reference.weights for name in rule.params]
    assert seen == set(ours) and len(ours) == len(seen)
    assert len({rule.spellings for rule in reference.weights}) == len(reference.weights)
    assert set(reference.tied.values()) <= seen
    tied = set(pytree.names(abstract_params(family.build(heads=heads, tied=True, **sizes))))
    assert seen - tied == {"head/lm/kernel"}


@pytest.mark.parametrize(
    ("name", "size", "settings", "count"),
    [
        ("gpt", "base", {"vocab_size": 50257}, 124_439_808),
        ("gpt", "xl", {"vocab_size": 50257}, 1_557_611_200),
        ("llama", "tiny", {"vocab_size": 512, "tied": True}, 260_032),
        ("llama", "7b", {"vocab_size": 32000}, 6_738_415_616),
        ("llama", "8b", {"vocab_size": 128256}, 8_030_261_248),
        ("mistral", "7b", {"vocab_size": 32000}, 7_241_732_096),
        ("qwen2", "base", {"vocab_size": 151936, "tied": True}, 494_032_768),
    ],
)
def test_published_sizes(name, size, settings, count):
    model = models.family(name).build(heads={"lm": {}}, size=size, scan_layers=True, **settings)
    with jax.disable_jit(False):  # which would trace every layer
        shapes = abstract_params(model)
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == count


def test_flops_are_those_of_the_matrices():
    batch = {"input_ids": np.zeros((2, 5))}
    for model in (gpt.build(heads={"lm": {}}, **SIZE), llama.build(heads={"lm": {}}, kv_heads=1, tied=False, **SIZE)):
        flat = pytree.names(abstract_params(model))
        kernels = sum(int(np.prod(leaf.shape)) for name, leaf in flat.items() if name.endswith("kernel"))
        kernels += 11 * 12 * model.settings.tied
        assert model.forward_flops(batch) == 2 * 10 * (kernels + 2 * 2 * 12 * 5)


def test_what_is_added_to_the_residual_stream_starts_smaller():
    model = gpt.build(heads={}, width=64, layers=2, attention_heads=1, mlp_width=64, vocab_size=9, positions=4, scan_layers=True)
    with jax.disable_jit(False):
        params = pytree.names(nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), model.one_row_batch()))["params"])
    spread = {name: float(np.std(leaf)) for name, leaf in params.items() if name.endswith("kernel")}
    for name, value in spread.items():
        small = name.endswith(("out/kernel", "down/kernel"))
        assert value == pytest.approx(0.02 / 2 if small else 0.02, rel=0.05), name


@pytest.mark.parametrize("case", CASES)
def test_settings_go_there_and_back(case):
    config = folders.read_config(GOLDEN / case)
    name, reference = families.reference_of(config["model_type"])
    settings = reference.read_settings(config)
    written = reference.write_config(models.family(name).Settings(**settings))
    assert reference.read_settings(written) == settings
    assert all(config.get(key) in (value, None) for key, value in written.items())


@pytest.mark.parametrize("case", CASES)
def test_written_files_are_those_that_were_read(case, tmp_path):
    golden(case).save(tmp_path / "new")
    theirs, ours = load_file(GOLDEN / case / folders.WEIGHTS), load_file(tmp_path / "new" / folders.WEIGHTS)
    assert set(theirs) == set(ours)
    assert all(np.array_equal(theirs[name], ours[name]) and ours[name].flags.c_contiguous for name in theirs)
    assert folders.read_config(tmp_path / "new") == folders.read_config(GOLDEN / case)


def test_old_files_of_gpt2(tmp_path):
    """The first files have no prefix, and the causal mask among the weights."""
    folder = shutil.copytree(GOLDEN / "gpt2_lm", tmp_path / "old")
    tensors = {name.removeprefix("transformer."): array for name, array in load_file(folder / folders.WEIGHTS).items()}
    for layer in range(2):
        tensors |= {f"h.{layer}.attn.bias": np.ones((1, 1, 40, 40), bool), f"h.{layer}.attn.masked_bias": np.float32([-1e4])}
    save_file(tensors, folder / folders.WEIGHTS)
    assert error(load(folder), "gpt2_lm") <= TOLERANCE
    tensors["h.0.attn.c_attn.weight"] = np.ones((24, 70), np.float32)
    save_file(tensors, folder / folders.WEIGHTS)
    with pytest.raises(UserError, match=r"misshapen.*h.0.attn.c_attn.weight ours \(24, 72\) theirs \(24, 70\)"):
        load(folder)


def test_old_and_new_ways_to_write_rotary_positions():
    read = table(llama).read_settings
    assert read({"rope_theta": 5e5})["rotary_base"] == 5e5 == read({"rope_parameters": {"rope_theta": 5e5}})["rotary_base"]
    old = {"rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}}
    assert read(old) == read(new) and (read(new)["rotary_scaling"], read(new)["rotary_factor"]) == ("linear", 2.0)
    assert read({"rope_scaling": None}) == read({})


def test_defaults_of_the_reference():
    assert table(gpt).read_settings({"n_embd": 24})["mlp_width"] == 96
    assert table(llama).read_settings({"num_attention_heads": 16})["kv_heads"] == 16
    assert table(llama).read_settings({"hidden_size": 64, "num_attention_heads": 4, "head_dim": None})["head_width"] == 16
    assert table(mistral).read_settings({})["window"] == 4096
    assert [table(mistral).read_settings({"sliding_window": window})["window"] for window in (None, 7)] == [0, 7]
    assert table(mistral).read_settings({})["kv_heads"] == 8
    assert table(qwen2).read_settings({"layer_types": ["full_attention"] * 32, "sliding_window": 4096})["window"] == 0


@pytest.mark.parametrize(
    ("family", "change", "named"),
    [
        (gpt, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
        (gpt, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=true"),
        (gpt, {"add_cross_attention": True}, "add_cross_attention=true"),
        (gpt, {"scale_attn_weights": False}, "scale_attn_weights=false"),
        (gpt, {"activation_function": "gelu_fast"}, 'activation_function="gelu_fast"'),
        (gpt, {"rope_theta": 1.0}, "rope_theta=1.0"),
        (gpt, {"n_inner": "50"}, 'n_inner="50"'),
        (gpt, {"pad_token_id": 50257}, "pad_token_id=50257"),
        (gpt, {"tie_word_embeddings": 1}, "tie_word_embeddings=1"),
        (llama, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope_type="yarn"'),
        (llama, {"rope_scaling": {"type": "linear"}}, "needs factor"),
        (llama, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        (llama, {"rope_parameters": [1]}, "rope_parameters"),
        (llama, {"rope_theta": "1e4"}, 'rope_theta="1e4"'),
        (llama, {"num_key_value_heads": 0}, "num_key_value_heads=0"),
        (llama, {"sliding_window": 5}, "sliding_window=5"),
        (mistral, {"attention_bias": True}, "attention_bias=true"),
        (qwen2, {"use_sliding_window": True}, "use_sliding_window=true"),
        (qwen2, {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
    ],
)
def test_settings_not_handled_are_refused_by_name(family, change, named):
    with pytest.raises(UserError) as caught:
        table(family).read_settings(change)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_settings_the_reference_lacks_are_refused():
    for family, setting in (
        (llama, {"window": 5}),
        (llama, {"qkv_bias": True}),
        (mistral, {"mlp_bias": True}),
        (qwen2, {"qkv_bias": False}),
    ):
        name = "out_bias" if family is llama and "qkv_bias" in setting else next(iter(setting))
        with pytest.raises(UserError, match=name):
            table(family).write_config(family.Settings(**SIZE, **setting))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_heads": 2}, "kv_heads=2"),
        ({"head_width": 3}, "odd width"),
        ({"positions": 5}, "model.positions=5"),
        ({"rotary_scaling": "linaer"}, 'did you mean "linear"'),
        ({"width": 13}, "width=13"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        llama.build(heads={}, **SIZE | settings)
    with pytest.raises(UserError, match='head "mlm"'):
        gpt.build(heads={"mlm": {}}, **SIZE)


def test_inputs_out_of_range_are_refused():
    model = golden("gpt2_lm")
    with pytest.raises(UserError, match="41 tokens exceed the 40 positions"):
        model.apply(input_ids=np.zeros((1, 41), np.int32))
    with pytest.raises(UserError, match=r"position_ids: 40 is out of range"):
        model.apply(input_ids=np.zeros((1, 1), np.int32), position_ids=np.full((1, 1), 40))
    with pytest.raises(UserError, match=r"input_ids: 41 is out of range"):
        golden("llama_lm").apply(input_ids=np.full((1, 3), 41))
    # Rotary positions have no limit, whatever length the model was meant for.
    assert llama.checked_batch({"input_ids": np.full((1, 50), 3)}, golden("llama_lm").model.settings)["input_ids"].size == 50


def test_a_fresh_model_follows_its_tokenizer():
    class Padded:
        roles: dict = {"pad": "[PAD]"}  # noqa: RUF012
        pad_id = 3

    class Bare:
        roles: dict = {}  # noqa: RUF012

    assert gpt.settings_from_tokenizer(Padded()) == {"pad_id": 3} and llama.settings_from_tokenizer(Bare()) == {}
    settings = gpt.Settings(**SIZE)
    assert [table(gpt).write_config(settings, pad_id)["pad_token_id"] for pad_id in (None, 3)] == [None, 3]
    assert table(gpt).write_config(dataclasses.replace(settings, pad_id=5))["pad_token_id"] == 5
    assert json.dumps(table(llama).write_config(llama.Settings(**SIZE)))
