"""T5 against outputs of the reference, mutations that the comparison must notice, decoding with a cache, and its files."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmjax import models, pytree
from fmjax.errors import UserError
from fmjax.hub import families, folders
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained, abstract_params
from fmjax.layers.cache import shift_right
from fmjax.models import t5

GOLDEN = Path(__file__).parents[1] / "golden" / "t5"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
SIZE = {"width": 12, "layers": 1, "decoder_layers": 1, "attention_heads": 3, "head_width": 5, "mlp_width": 8, "vocab_size": 11}

TOLERANCE = 2e-5  # four times the largest error that was reached


@functools.cache
def golden(case: str) -> Pretrained:
    return load(GOLDEN / case)


def read_settings(config: dict) -> dict:
    """Returns our settings of a config of T5 or mT5."""
    return families.reference_of(config["model_type"])[1].read_settings(config)


def expected(case: str, part: str = "short") -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the inputs and the reference's outputs of one set of a golden folder."""
    with np.load(GOLDEN / case / "expected.npz") as stored:
        arrays = {name.partition(".")[2]: stored[name] for name in stored.files if name.startswith(part)}
    inputs = {name: array for name, array in arrays.items() if array.dtype.kind == "i"}
    return inputs, {name: array for name, array in arrays.items() if name not in inputs}


def error(model: Pretrained, case: str, part: str = "short", **changed: np.ndarray) -> float:
    """Returns the largest absolute error over all outputs."""
    inputs, outputs = expected(case, part)
    found = model.apply(**inputs | changed)
    assert set(outputs) <= set(found) <= set(outputs) | {"last_hidden_state"}
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in outputs.items())


def changed(model: Pretrained, **settings: object) -> Pretrained:
    settings = dataclasses.replace(model.model.settings, **settings)
    return dataclasses.replace(model, model=model.model.clone(settings=settings))


@pytest.mark.parametrize(("case", "part"), [*((case, "short") for case in CASES), ("v1_0", "long")])
def test_outputs_are_those_of_the_reference(case, part):
    assert error(golden(case), case, part) <= TOLERANCE


def test_scanned_is_the_same():
    assert error(changed(golden("v1_0"), scan_layers=True), "v1_0") <= TOLERANCE


@pytest.mark.parametrize(
    ("case", "mutation"),
    [
        ("encoder", {"buckets": 12}),
        ("encoder", {"max_distance": 24}),
        ("encoder", {"epsilon": 1e-2}),
        ("v1_0", {"max_distance": 24}),
        ("v1_0", {"tied": False}),
        ("mt5", {"feed_forward": "gated-silu"}),
    ],
)
def test_settings_matter(case, mutation):
    model = changed(golden(case), **mutation)
    grown: dict[str, np.ndarray] = {}
    if "buckets" in mutation:  # the right model has no use for the last rows
        grown["encoder/relative"] = np.resize(model.params["encoder"]["relative"], (12, 3))
    if "tied" in mutation:  # unscaled
        grown["head/lm/kernel"] = model.params["embed"]["word"]["embedding"].T
    model = dataclasses.replace(model, params=pytree.unnames(pytree.names(model.params) | grown))
    assert error(model, case) > 4 * TOLERANCE


@pytest.mark.parametrize("case", ["v1_0", "v1_1", "body", "encoder"])
def test_masks_matter(case):
    inputs, _ = expected(case)
    for name in (name for name in inputs if name.endswith("mask")):
        assert error(golden(case), case, **{name: np.ones_like(inputs[name])}) > 4 * TOLERANCE


@pytest.mark.parametrize("case", ["v1_0", "v1_1"])
def test_every_weight_matters(case):
    model = golden(case)
    inputs, _ = expected(case)
    batch = model.checked_batch(inputs)
    logits = jax.jit(lambda params: model.model.apply({"params": params}, batch)["lm"])
    right = logits(model.params)
    for zeroed in pytree.names(model.params):
        wrong = logits(pytree.map_named(lambda name, leaf, zeroed=zeroed: leaf * (name != zeroed), model.params))
        assert float(abs(wrong - right).max()) > 4 * TOLERANCE, zeroed


def test_labels_are_shifted_and_read_as_padding_where_they_are_ignored():
    model = golden("v1_0")
    inputs, _ = expected("v1_0")
    labels = np.where(inputs["decoder_attention_mask"] == 1, inputs["decoder_input_ids"], -100)
    source = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    shifted = np.asarray(shift_right(jnp.where(labels == -100, 0, labels), 0))
    mask = np.ones_like(shifted)
    found = model.apply(**source, labels=labels)["logits"]
    right = model.apply(**source, decoder_input_ids=shifted, decoder_attention_mask=mask)["logits"]
    np.testing.assert_allclose(found, right, atol=1e-6)


def test_decoding_with_a_cache_is_decoding_at_once():
    model = golden("v1_0")
    inputs, _ = expected("v1_0")
    batch = model.checked_batch(inputs)
    batch["decoder_attention_mask"] = mask = np.ones((3, 9), bool)
    mask[0, :3] = False  # a prompt that is filled up on its left
    apply = jax.jit(functools.partial(model.model.apply, {"params": model.params}), static_argnames="method")
    whole, memory = model.apply(**batch)["logits"], apply(batch, method="encode")
    cache = model.model.empty_cache(3, 12)
    pieces = []
    for begin, end in ((0, 7), (7, 8), (8, 9)):
        piece = {name: batch[name][:, begin:end] for name in ("decoder_input_ids", "decoder_attention_mask")}
        # Once the prompt is read, the cache holds what is needed of the memory's hidden states.
        seen = memory if begin == 0 else memory | {"hidden": jnp.zeros_like(memory["hidden"])}
        outputs, cache = apply(piece, seen, cache, method="decode")
        pieces.append(outputs["lm"])
    np.testing.assert_allclose(np.concatenate(pieces, axis=1)[mask], np.asarray(whole)[mask], atol=1e-5)
    assert int(cache["index"]) == 9 and all(set(layer) == {"attention", "cross"} for layer in cache["layers"])


def test_tables_cover_every_parameter():
    family, table = models.family("t5"), families.table_of("t5")
    assert len({rule.spellings for rule in table.weights}) == len(table.weights)
    ours = {name for rule in table.weights for name in rule.params}
    gated = family.build(heads={"lm": {}}, **SIZE, tied=False, feed_forward="gated-gelu")
    assert set(pytree.names(abstract_params(gated))) == ours
    plain = family.build(heads={"lm": {}}, **SIZE)
    assert set(pytree.names(abstract_params(plain))) == {
        name for name in ours if "/gate/" not in name and not name.startswith("head/")
    }


@pytest.mark.parametrize(
    ("size", "vocabulary", "count"),
    [("small", 32128, 60_506_624), ("v1_1-base", 32128, 247_577_856), ("v1_1-small", 250112, 300_176_768)],
)
def test_published_sizes(size, vocabulary, count):
    abstract = abstract_params(t5.build(heads={"lm": {}}, size=size, vocab_size=vocabulary, scan_layers=True))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract)) == count


@pytest.mark.parametrize("case", CASES)
def test_settings_go_there_and_back(case):
    config = folders.read_config(GOLDEN / case)
    settings = read_settings(config)
    written = families.table_of("t5").write_config(t5.Settings(**settings)) | {"architectures": config["architectures"]}
    assert read_settings(written) == settings
    differing = {key for key, value in written.items() if config[key] != value}
    assert differing <= {"tie_word_embeddings", "model_type"}  # the reference always writes true, and mT5 is T5 v1.1


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_what_was_loaded(case, tmp_path):
    golden(case).save(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(GOLDEN / case / "model.safetensors")
    assert set(theirs) == set(ours)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_files_of_several_ages_are_read(tmp_path):
    right = pytree.names(golden("v1_0").params)
    tensors = load_file(GOLDEN / "v1_0" / "model.safetensors")
    words, unused = tensors["shared.weight"], "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    copies = dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), words)
    config = json.loads((GOLDEN / "v1_0" / "config.json").read_text())
    old = {key: value for key, value in config.items() if key not in ("scale_decoder_outputs", "dense_act_fn", "is_gated_act")}
    for number, held in enumerate((tensors | copies | {unused: tensors["decoder.final_layer_norm.weight"]}, tensors | copies)):
        folder = tmp_path / str(number)
        shutil.copytree(GOLDEN / "v1_0", folder)
        if number:
            del held["shared.weight"]
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(old | {"n_positions": 512}))
        read = pytree.names(load(folder).params)
        assert set(read) == set(right) and all(np.array_equal(read[name], right[name]) for name in right)

    folder = tmp_path / "other"
    shutil.copytree(GOLDEN / "v1_0", folder)
    save_file(tensors | {"lm_head.weight": words + 1}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight differs"):
        load(folder)


def test_a_head_that_never_parted_from_the_words_is_read(tmp_path):
    shutil.copytree(GOLDEN / "v1_1", tmp_path / "tied")
    tensors = load_file(GOLDEN / "v1_1" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    read = load(tmp_path / "tied").params
    np.testing.assert_array_equal(read["head"]["lm"]["kernel"], tensors["shared.weight"].T)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"feed_forward_proj": "gelu"}, 'feed_forward_proj="gelu"'),
        ({"feed_forward_proj": "gated-relu"}, 'feed_forward_proj="gated-relu"'),
        ({"dense_act_fn": "gelu"}, 'dense_act_fn="gelu"'),
        ({"is_gated_act": True}, "is_gated_act=true"),
        ({"is_decoder": True}, "is_decoder=true"),
        ({"decoder_start_token_id": 41}, "decoder_start_token_id=41"),
        ({"decoder_start_token_id": "0"}, 'decoder_start_token_id="0"'),
        ({"num_layers": 0}, "num_layers=0"),
        ({"d_kv": "5"}, 'd_kv="5"'),
        ({"position_scheme": "rope"}, "position_scheme"),
    ],
)
def test_settings_not_handled_are_refused_by_name(change, named):
    config = json.loads((GOLDEN / "v1_0" / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        read_settings(config | change)
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_defaults_are_those_of_the_reference():
    assert dataclasses.asdict(t5.Settings(**read_settings({"model_type": "t5"}))) == dataclasses.asdict(
        t5.build(heads={}, size="small", vocab_size=32128).settings
    )
    assert dataclasses.asdict(t5.Settings(**read_settings({"model_type": "mt5"}))) == dataclasses.asdict(
        t5.build(heads={}, size="v1_1-small", vocab_size=250112).settings
    )
    flan = {"model_type": "t5", "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu", "num_decoder_layers": None}
    assert not read_settings(flan)["tied"] and read_settings(flan)["decoder_layers"] == 6
    with pytest.raises(UserError, match='model_type="umt5"'):
        families.reference_of("umt5")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"feed_forward": "gated-gelo"}, 'did you mean "gated-gelu"'),
        ({"buckets": 2}, "model.buckets=2"),
        ({"buckets": 32, "max_distance": 16}, "model.max_distance=16"),
        ({"decoder_layers": 0}, 'needs a head "lm"'),
        ({"dtype": "float16"}, "float16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        t5.build(heads={"lm": {}}, **SIZE | given)


def test_older_configs_have_another_name_for_the_greatest_distance():
    sizes = {"size": "tiny", "vocab_size": 11, "heads": {}}
    assert t5.build(**sizes, furthest=24) == t5.build(**sizes, max_distance=24) != t5.build(**sizes)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("v1_0", {"decoder_input_ids": None, "decoder_attention_mask": None}, "decoder_input_ids is missing"),
        ("v1_0", {"decoder_input_ids": [[41]] * 3, "decoder_attention_mask": None}, "41 is out of range"),
        ("v1_0", {"decoder_input_ids": [[1]] * 2, "decoder_attention_mask": None}, "has 2 rows"),
        ("v1_0", {"labels": [[-1]] * 3, "decoder_input_ids": None, "decoder_attention_mask": None}, "-1 is out of range"),
        ("v1_0", {"labels": [[1]] * 3}, r"labels: has shape \(3, 1\)"),
        ("encoder", {"decoder_input_ids": [[1]] * 3}, "only an encoder"),
        ("encoder", {"token_type_ids": [[1]] * 3}, "not an input"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(case, change, message):
    inputs, _ = expected(case)
    with pytest.raises(UserError, match=message):
        golden(case).apply(**{name: value for name, value in (inputs | change).items() if value is not None})


def test_an_encoder_alone_classifies():
    model = t5.build(heads={"classify_mean": {"classes": 3}}, **SIZE | {"decoder_layers": 0})
    names = pytree.names(abstract_params(model))
    assert not any(name.startswith("decoder/") for name in names) and "head/classify_mean/kernel" in names


def test_a_fresh_model_starts_as_the_reference_does():
    model = t5.build(heads={}, **SIZE | {"width": 64, "head_width": 16, "mlp_width": 256, "vocab_size": 99, "decoder_layers": 0})
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), model.one_row_batch())["params"])
    params = {name: np.asarray(leaf) for name, leaf in pytree.names(params).items()}
    deviations = {
        "embed/word/embedding": 1.0,
        "encoder/layers/attention/query/kernel": (64 * 16) ** -0.5,
        "encoder/layers/attention/key/kernel": 64**-0.5,
        "encoder/layers/attention/out/kernel": (3 * 16) ** -0.5,
        "encoder/layers/mlp/up/kernel": 64**-0.5,
        "encoder/layers/mlp/down/kernel": 256**-0.5,
    }
    for name, deviation in deviations.items():
        assert params[name].std() == pytest.approx(deviation, rel=0.06), name


def test_the_formula_counts_what_the_compiler_counts():
    model = t5.build(heads={"lm": {}}, **SIZE | {"width": 48, "mlp_width": 96, "vocab_size": 200})
    batch = {"input_ids": jnp.zeros((2, 16), jnp.int32), "labels": jnp.zeros((2, 8), jnp.int32)}
    params = jax.eval_shape(model.init, jax.random.key(0), batch)
    compiled = jax.jit(model.apply).lower(params, batch).compile()
    assert compiled.cost_analysis()["flops"] == pytest.approx(model.forward_flops(batch), rel=0.15)


def test_attention_weights_have_the_dropout_of_the_rest_unless_it_is_set():
    batch = {"input_ids": jnp.ones((2, 4), jnp.int32), "labels": jnp.ones((2, 3), jnp.int32)}

    def run(**rates: float) -> None:
        model = t5.build(heads={"lm": {}}, **SIZE | rates, attention="chunked")  # which drops none
        params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch)["params"])
        keys = {"dropout": jax.random.key(0)}
        jax.eval_shape(lambda params, rngs: model.apply({"params": params}, batch, rngs=rngs), params, keys)

    run(dropout=0.1, attention_dropout=0.0)
    run(dropout=0.0)
    for rates in ({"dropout": 0.1}, {"dropout": 0.0, "attention_dropout": 0.1}):
        with pytest.raises(UserError, match=r"attention weights are dropped.* set model.attention_dropout=0"):
            run(**rates)


def test_dropout_acts_in_training_alone():
    model = golden("encoder")
    run = jax.jit(
        lambda rngs: model.model.apply({"params": model.params}, {"input_ids": np.full((1, 4), 5)}, rngs=rngs)["hidden"]
    )
    assert not np.allclose(run({"dropout": jax.random.key(0)}), run({"dropout": jax.random.key(1)}))
    assert np.array_equal(run({}), run({}))
