"""The Transformer, BART and mBART against outputs of the reference, decoding in pieces, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import models, pytree
from fmjax.errors import UserError
from fmjax.hub import families, folders
from fmjax.hub.rules import bind
from fmjax.hub.tensors import Tensor
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained, abstract_params
from fmjax.layers.position import sinusoids

GOLDEN = Path(__file__).parents[1] / "golden" / "seq2seq"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
TOLERANCE = 1e-5  # three times the largest error that was reached
pytestmark = pytest.mark.usefixtures("eager")


@functools.cache
def golden(case: str) -> Pretrained:
    return load(GOLDEN / case)


def expected(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the inputs and the reference's outputs of a golden folder."""
    with np.load(GOLDEN / case / "expected.npz") as stored:
        arrays = dict(stored)
    inputs = {name: array for name, array in arrays.items() if array.dtype.kind == "i"}
    return inputs, {name: array for name, array in arrays.items() if name not in inputs}


def error(model: Pretrained, case: str, **changed: np.ndarray) -> float:
    """Returns the largest absolute error over all outputs."""
    inputs, outputs = expected(case)
    found = model.apply(**inputs | changed)
    assert set(outputs) == set(found)
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in outputs.items())


def changed(model: Pretrained, **settings: object) -> Pretrained:
    settings = dataclasses.replace(model.model.settings, **settings)
    return dataclasses.replace(model, model=model.model.clone(settings=settings))


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_those_of_the_reference(case):
    assert error(golden(case), case) <= TOLERANCE


def test_compiled_and_scanned_are_the_same():
    with jax.disable_jit(False):
        assert error(golden("marian_two_tables"), "marian_two_tables") <= TOLERANCE
    assert error(changed(golden("marian"), scan_layers=True), "marian") <= TOLERANCE


@pytest.mark.parametrize("case", ["marian", "mbart"])
def test_settings_and_inputs_matter(case):
    model = golden(case)
    s = model.model.settings
    mutations = [{"activation": "relu"}, {"activation": "gelu_new"}, {"scale_embedding": not s.scale_embedding}]
    for mutation in mutations:
        assert error(changed(model, **mutation), case) > 4 * TOLERANCE, mutation
    inputs, _ = expected(case)
    for name in ("attention_mask", "decoder_attention_mask"):
        assert error(model, case, **{name: np.ones_like(inputs[name])}) > 4 * TOLERANCE, name
    for name in ("input_ids", "decoder_input_ids"):
        assert error(model, case, **{name: np.roll(inputs[name], 1, axis=1)}) > 4 * TOLERANCE, name


def test_biases_matter():
    model = golden("mbart")
    inputs, _ = expected("mbart")
    batch = model.checked_batch(inputs)
    names = [name for name in pytree.names(model.params) if name.endswith("/bias")]
    assert len(names) >= 20
    with jax.disable_jit(False):
        features = jax.jit(lambda params: model.model.apply({"params": params}, batch))
        right = features(model.params)
        for zeroed in names:
            wrong = features(pytree.map_named(lambda name, leaf, zeroed=zeroed: leaf * (name != zeroed), model.params))
            seen = max(float(abs(wrong[kind] - right[kind]).max()) for kind in right) > 4 * TOLERANCE
            # A key's bias adds the same to all scores of a query, which softmax takes out again.
            assert seen == (not zeroed.endswith(("attention/key/bias", "cross/key/bias"))), zeroed


def test_decoding_in_pieces_with_a_cache_is_decoding_at_once():
    loaded = golden("marian_body")
    inputs, _ = expected("marian_body")
    apply = functools.partial(loaded.model.apply, {"params": loaded.params})
    # Without padding among the target's tokens: the reference's forward counts it, where a cache does not.
    del inputs["decoder_attention_mask"]
    batch = loaded.checked_batch(inputs)
    ids = batch["decoder_input_ids"]
    with jax.disable_jit(False):
        decode = jax.jit(lambda ids, memory, cache: apply({"decoder_input_ids": ids}, memory, cache, method="decode"))
        memory = jax.jit(lambda: apply(batch, method="encode"))()
        whole, _ = decode(ids, memory, None)
        first, cache = decode(ids[:, :3], memory, apply(ids.shape[0], 12, method="empty_cache"))
        pieces = [first["hidden"]]
        lost = memory | {"hidden": memory["hidden"] * jnp.nan}  # of which the cache has all
        for place in range(3, ids.shape[1]):
            features, cache = decode(ids[:, place : place + 1], lost, cache)
            pieces.append(features["hidden"])
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole["hidden"], atol=TOLERANCE)
    assert [layer["cross"]["key"].shape[::2] for layer in cache["layers"]] == [(3, inputs["input_ids"].shape[1])]


def test_labels_stand_for_what_the_decoder_reads(monkeypatch):
    model = golden("marian").model
    monkeypatch.setattr(type(model), "encode", lambda self, batch: {"hidden": batch["input_ids"]})
    monkeypatch.setattr(type(model), "decode", lambda self, batch, memory, cache: ({"read": batch["decoder_input_ids"]}, None))
    batch = {"input_ids": jnp.zeros((1, 5), jnp.int32), "labels": jnp.array([[3, 4, 5, 6, 7]])}
    assert model.apply({}, batch)["read"].tolist() == [[40, 3, 4, 5, 6]]
    packed = batch | {"decoder_position_ids": jnp.array([[0, 1, 0, 1, 2]])}
    assert model.apply({}, packed)["read"].tolist() == [[40, 3, 40, 5, 6]]


def test_packed_pairs_do_not_see_each_other():
    model = golden("marian_body")
    rng = np.random.default_rng(0)
    apply = functools.partial(model.model.apply, {"params": model.params})
    lengths = ((4, 3), (6, 5))  # of source and target
    pairs = [{"input_ids": rng.integers(0, 40, (1, s)), "labels": rng.integers(0, 40, (1, t))} for s, t in lengths]
    packed = {name: jnp.concatenate([pair[name] for pair in pairs], axis=1) for name in pairs[0]}
    for side, prefix in enumerate(("", "decoder_")):
        packed[f"{prefix}segment_ids"] = jnp.array([[1] * lengths[0][side] + [2] * lengths[1][side]])
        packed[f"{prefix}position_ids"] = jnp.array([[*range(lengths[0][side]), *range(lengths[1][side])]])
    with jax.disable_jit(False):
        run = jax.jit(apply)
        whole, alone = run(packed), [run(pair) for pair in pairs]
    for name in ("hidden", "encoder_hidden"):
        np.testing.assert_allclose(whole[name], jnp.concatenate([found[name] for found in alone], axis=1), atol=TOLERANCE)


def test_dropout_acts_in_training_alone():
    model = changed(golden("marian_body"), activation_dropout=0.1, attention_dropout=0.1)
    ids = jnp.full((1, 4), 5, jnp.int32)
    batch = {"input_ids": ids, "decoder_input_ids": ids}

    with jax.disable_jit(False):
        run = jax.jit(lambda rngs: model.model.apply({"params": model.params}, batch, rngs=rngs)["hidden"])
        assert not np.allclose(run({"dropout": jax.random.key(0)}), run({"dropout": jax.random.key(1)}))
        assert np.array_equal(run({}), run({}))


@pytest.mark.parametrize("name", ["transformer", "bart", "mbart"])
def test_tables_cover_every_architecture(name):
    family, table = models.family(name), families.table_of(name)
    sizes = {"width": 12, "layers": 2, "attention_heads": 3, "mlp_width": 8, "vocab_size": 11}
    own = {"target_vocab_size": 9, "tied": False} if name == "transformer" else {}
    seen = set(pytree.names(abstract_params(family.build(heads={"lm": {}}, **sizes, **own))))
    bindings = bind(table.weights, dict.fromkeys(seen, (2,)))
    ours = [name for one in bindings for name in one.rule.params]
    assert seen == set(ours) == {name for rule in table.weights for name in rule.params}
    assert len(ours) == len(seen) == len({one.names for one in bindings})
    tied = [(of,) if isinstance(of, str) else of for of in table.tied.values()]
    assert {name for names in tied for name in names} <= seen


def test_published_size():
    """That of opus-mt-en-de, without its tables of sinusoids."""
    model = models.family("transformer").build(heads={"lm": {}}, size="base", vocab_size=58101, scan_layers=True)
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract_params(model))) == 73_944_309


@pytest.mark.parametrize("case", CASES)
def test_settings_go_there_and_back(case):
    config = folders.read_config(GOLDEN / case)
    name, table = families.reference_of(config["model_type"])
    settings = table.read_settings(config)
    written = table.write_config(models.family(name).Settings(**settings), config["pad_token_id"])
    assert table.read_settings(written) == settings
    assert all(config[key] in (value, None) for key, value in written.items() if key in config)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_goes_there_and_back(case, tmp_path):
    golden(case).save(tmp_path)
    again = load(tmp_path)
    assert again.model == golden(case).model
    assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (again.params, golden(case).params)), strict=True))


@pytest.mark.parametrize(
    ("case", "change", "named"),
    [
        ("marian", {"normalize_before": True}, "normalize_before=true"),
        ("marian", {"static_position_embeddings": False}, "static_position_embeddings=false"),
        ("marian", {"activation_function": "mish"}, 'activation_function="mish"'),
        ("marian", {"decoder_vocab_size": 30}, "decoder_vocab_size=30"),
        ("marian", {"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ("marian", {"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
        ("marian", {"decoder_start_token_id": "a"}, "decoder_start_token_id='a'"),
        ("marian", {"rope_theta": 1.0}, "rope_theta=1.0"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ("bart", {"normalize_before": True}, "normalize_before=true"),
        ("mbart", {"normalize_before": False}, "normalize_before=false"),
    ],
)
def test_settings_not_handled_are_refused_by_name(case, change, named):
    config = json.loads((GOLDEN / case / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        families.reference_of(config["model_type"])[1].read_settings(config | change)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused():
    sizes = {"width": 12, "layers": 1, "attention_heads": 3, "mlp_width": 8, "vocab_size": 11}
    build = functools.partial(models.family("transformer").build, heads={"lm": {}}, **sizes)
    with pytest.raises(UserError, match="model.decoder_attention_heads=5"):
        build(decoder_attention_heads=5)
    with pytest.raises(UserError, match="model.start_id=11 is not in the target's vocabulary of 11 tokens"):
        build(start_id=11)
    with pytest.raises(UserError, match="5 tokens exceed model.positions=4"):
        abstract = build(positions=4)
        ids = jnp.zeros((1, 5), jnp.int32)
        jax.eval_shape(abstract.init, jax.random.key(0), {"input_ids": ids, "labels": ids})
    with pytest.raises(UserError, match="decoder_input_ids is missing"):
        golden("marian").apply(input_ids=np.zeros((1, 3), np.int32))
    with pytest.raises(UserError, match="40 is out of range; the vocabulary has 37"):
        golden("marian_two_tables").apply(input_ids=np.full((1, 3), 40), decoder_input_ids=np.full((1, 3), 40))
    with pytest.raises(UserError, match="model.tied=false has no counterpart"):
        families.table_of("transformer").write_config(build(tied=False).settings)


def test_positions_that_are_not_sinusoids_are_refused():
    reference = families.table_of("transformer")
    name, table = "model.encoder.embed_positions.weight", sinusoids(5, 4)
    assert folders.canonical({name: Tensor(table.shape, lambda: table)}, reference) == {}
    with pytest.raises(UserError, match="not a sinusoidal table"):
        folders.canonical({name: Tensor(table.shape, lambda: table[::-1])}, reference)
