"""BERT and its descendants against outputs of the reference, and against mutations that the comparison must notice."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest

from fmjax import models, pytree
from fmjax.errors import UserError
from fmjax.hub import families, folders
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained, abstract_params

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("bert", "roberta", "distilbert", "electra")
CASES = sorted(path.parent.name for name in FAMILIES for path in GOLDEN.glob(f"{name}_*/expected.npz"))
BODIES = ("bert_pretraining", "roberta_mlm", "distilbert_mlm", "electra_mlm")

# Four times the largest error that was reached.
TOLERANCE = {"bert": 3e-5, "roberta": 3.5e-5, "distilbert": 3.5e-5, "electra": 7e-5}
pytestmark = pytest.mark.usefixtures("eager")


@functools.cache
def golden(case: str) -> Pretrained:
    return load(GOLDEN / case)


def expected(case: str, part: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the inputs and the reference's outputs of one set of a golden folder."""
    with np.load(GOLDEN / case / "expected.npz") as stored:
        arrays = {name.partition(".")[2]: stored[name] for name in stored.files if name.startswith(part)}
    inputs = {name: array for name, array in arrays.items() if array.dtype.kind == "i"}
    return inputs, {name: array for name, array in arrays.items() if name not in inputs}


def error(model: Pretrained, case: str, part: str = "short", **changed: np.ndarray) -> float:
    """Returns the largest absolute error over all outputs."""
    inputs, outputs = expected(case, part)
    found = model.apply(**inputs | changed)
    assert set(outputs) <= set(found) <= set(outputs) | {"last_hidden_state", "pooler_output"}
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in outputs.items())


def changed(model: Pretrained, **settings: object) -> Pretrained:
    settings = dataclasses.replace(model.model.settings, **settings)
    return dataclasses.replace(model, model=model.model.clone(settings=settings))


@pytest.mark.parametrize(("case", "part"), [(case, "short") for case in CASES] + [(case, "full") for case in BODIES])
def test_outputs_are_those_of_the_reference(case, part):
    assert error(golden(case), case, part) <= TOLERANCE[case.partition("_")[0]]


def test_compiled_and_scanned_are_the_same():
    case = "bert_classify"
    with jax.disable_jit(False):
        assert error(golden(case), case) <= TOLERANCE["bert"]
    assert error(changed(golden(case), scan_layers=True), case) <= TOLERANCE["bert"]


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("mutation", [{"activation": "gelu_new"}, {"activation": "relu"}, {"epsilon": 1e-2}])
def test_settings_matter(case, mutation):
    # 1e-2 is a thousand times BERT's epsilon here. DistilBERT's is 1e-12, of which a thousand is still nothing in fp32.
    assert error(changed(golden(case), **mutation), case) > 4 * TOLERANCE[case.partition("_")[0]]


@pytest.mark.parametrize("case", BODIES)
def test_inputs_matter(case):
    model, tolerance = golden(case), 4 * TOLERANCE[case.partition("_")[0]]
    inputs, _ = expected(case, "short")
    assert error(model, case, attention_mask=np.ones_like(inputs["attention_mask"])) > tolerance
    if "token_type_ids" in inputs:
        assert error(model, case, token_type_ids=np.zeros_like(inputs["token_type_ids"])) > tolerance
    first = 2 if case.startswith("roberta") else 0
    positions = np.arange(inputs["input_ids"].shape[1])[None] + first
    assert error(model, case, position_ids=positions + 1) > tolerance
    if first:  # padding inside and before the text does not count
        assert error(model, case, position_ids=positions) > tolerance


@pytest.mark.parametrize("case", BODIES)
def test_biases_matter(case):
    model = golden(case)
    names = [name for name in pytree.names(model.params) if name.endswith("/bias")]
    assert len(names) >= 10
    inputs, _ = expected(case, "short")
    batch = model.checked_batch(inputs)
    with jax.disable_jit(False):
        features = jax.jit(lambda params: model.model.apply({"params": params}, batch))
        right = features(model.params)
        for zeroed in names:
            wrong = features(pytree.map_named(lambda name, leaf, zeroed=zeroed: leaf * (name != zeroed), model.params))
            seen = max(float(abs(wrong[kind] - right[kind]).max()) for kind in right) > 4 * TOLERANCE[case.partition("_")[0]]
            # A key's bias adds the same to all scores of a query, which softmax takes out again.
            assert seen == (not zeroed.endswith("attention/key/bias")), zeroed


def head_of(name: str) -> str:
    """Returns the kind of the head that a parameter belongs to, "" for the body's."""
    return name.split("/")[1] if name.startswith("head/") else ""


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_tables_cover_every_architecture(name):
    family, table = models.family(name), families.table_of(name)
    ours = [rule.params for rule in table.weights]
    assert len(set(ours)) == len(ours)
    for kinds in table.architectures.values():  # each has names of its own; heads of two kinds may share theirs
        own = [rule.spellings for rule in table.weights if head_of(rule.params[0]) in ("", *kinds)]
        assert len(set(own)) == len(own)
    heads = {kind: {} for kinds in table.architectures.values() for kind in kinds}
    sizes = {"width": 12, "layers": 2, "attention_heads": 3, "mlp_width": 8, "vocab_size": 11}
    projected = {"embedding_width": 6} if name == "electra" else {}
    seen = set(pytree.names(abstract_params(family.build(heads=heads, **sizes, **projected))))
    assert seen == {name for rule in table.weights for name in rule.params}
    assert set(table.tied.values()) <= seen


@pytest.mark.parametrize(
    ("name", "size", "vocabulary", "count"),
    [("bert", "base", 30522, 109_482_240), ("roberta", "base", 50265, 124_645_632), ("distilbert", "base", 30522, 66_362_880)],
)
def test_published_sizes(name, size, vocabulary, count):
    family = models.family(name)
    heads = {} if name == "distilbert" else {"pooled": {}}
    abstract = abstract_params(family.build(heads=heads, size=size, vocab_size=vocabulary, scan_layers=True))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(abstract)) == count


@pytest.mark.parametrize("case", CASES)
def test_settings_go_there_and_back(case):
    config = folders.read_config(GOLDEN / case)
    name, table = families.reference_of(config["model_type"])
    settings = table.read_settings(config)
    written = table.write_config(models.family(name).Settings(**settings))
    assert table.read_settings(written) == settings
    assert all(config[key] in (value, None) for key, value in written.items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"is_decoder": True}, "is_decoder=true"),
        ({"add_cross_attention": True}, "add_cross_attention=true"),
        ({"position_embedding_type": "relative_key"}, 'position_embedding_type="relative_key"'),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ({"hidden_act": "gelu_fast"}, 'hidden_act="gelu_fast"'),
        ({"hidden_act": 3}, "hidden_act=3"),
        ({"rope_theta": 10000.0}, "rope_theta=10000.0"),
        ({"quantization_config": {"bits": 8}}, "quantization_config"),
        ({"hidden_size": "36"}, 'hidden_size="36"'),
        ({"hidden_size": True}, "hidden_size=true"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps=-1e-05"),
    ],
)
def test_settings_not_handled_are_refused_by_name(change, named):
    config = json.loads((GOLDEN / "bert_classify" / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        families.table_of("bert").read_settings(config | change)
    assert named in str(caught.value)


def test_all_settings_not_handled_are_named_at_once():
    config = json.loads((GOLDEN / "bert_classify" / "config.json").read_text())
    with pytest.raises(UserError, match=r"rope_theta.*is_decoder"):
        families.table_of("bert").read_settings(config | {"is_decoder": True, "rope_theta": 1.0, "pruned_heads": {}, "x": None})


def test_settings_the_reference_lacks_are_refused():
    for name, setting in (("bert", {"position_offset": 2}), ("bert", {"embedding_width": 8}), ("distilbert", {"token_types": 2})):
        family = models.family(name)
        settings = family.Settings(width=12, layers=1, attention_heads=2, mlp_width=8, vocab_size=11, **setting)
        with pytest.raises(UserError, match=next(iter(setting))):
            families.table_of(name).write_config(settings)
    family = models.family("roberta")
    with pytest.raises(UserError, match="position_offset=1"):
        settings = family.Settings(width=12, layers=1, attention_heads=2, mlp_width=8, vocab_size=11)
        families.table_of("roberta").write_config(settings, pad_id=0)


@pytest.mark.parametrize("padding", [None, -1, 131, "1"])
def test_a_padding_id_without_positions_is_refused(padding):
    with pytest.raises(UserError, match="pad_token_id"):
        families.table_of("roberta").read_settings({"pad_token_id": padding, "max_position_embeddings": 132})


def test_classifier_dropout_defaults_to_that_of_the_layers():
    read = families.table_of("bert").read_settings
    assert read({"hidden_dropout_prob": 0.3})["classifier_dropout"] == 0.3
    assert read({"classifier_dropout": 0.2})["classifier_dropout"] == 0.2
    assert read({})["embedding_dropout"] == 0.1


def test_dropout_acts_in_training_alone():
    model = golden("roberta_classify")
    ids = np.full((1, 4), 5, np.int32)
    with jax.disable_jit(False):
        run = jax.jit(lambda rngs: model.model.apply({"params": model.params}, {"input_ids": ids}, rngs=rngs)["classify"])
        first, second = run({"dropout": jax.random.key(0)}), run({"dropout": jax.random.key(1)})
        assert not np.allclose(first, second)
        assert np.array_equal(run({}), run({}))


def test_families_are_found_by_name_and_type():
    family, reference = families.reference_of("xlm-roberta")
    assert family == "roberta" and reference in families.table_of("roberta").all()
    assert reference.model_types == ("xlm-roberta",)
    assert isinstance(models.family("bert").build(heads={}, size="tiny", vocab_size=9), nn.Module)
    with pytest.raises(UserError, match='did you mean "bert"'):
        models.family("brt")
    with pytest.raises(UserError, match='did you mean "electra"'):
        families.reference_of("electro")
    with pytest.raises(UserError, match="no such model"):
        models.family("sizes")


@pytest.mark.parametrize("name", ["roberta", "distilbert", "electra"])
def test_heads_that_a_family_lacks_are_refused(name):
    sizes = {"width": 12, "layers": 1, "attention_heads": 2, "mlp_width": 8, "vocab_size": 11}
    with pytest.raises(UserError, match='head "nsp"'):
        models.family(name).build(heads={"nsp": {}}, **sizes)
