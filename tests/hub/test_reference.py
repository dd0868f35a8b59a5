"""Tables of a reference: operations and their inverses, names, spellings, copies, and settings in
sections."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fmjax import models, pytree
from fmjax.errors import UserError
from fmjax.hub import families, folders, rules
from fmjax.hub.reference import Reference
from fmjax.hub.rules import (
    AS_IS,
    CONV,
    LINEAR,
    MERGE_HEADS,
    ROW,
    VECTOR,
    Fused,
    Linear,
    Operation,
    Rule,
    bind,
    embedding,
    linear,
    norm,
    under,
)
from fmjax.hub.tensors import Tensor

CONV1D = Linear(transposed=False)
SINGLE: dict[str, tuple[Operation, int]] = {  # and the fewest axes that it takes
    "as is": (AS_IS, 0),
    "vector": (VECTOR, 1),
    "row": (ROW, 1),
    "linear": (LINEAR, 2),
    "merged heads": (MERGE_HEADS, 3),
    "conv1d": (CONV1D, 2),
    "conv1d of heads": (Linear(inputs=2, transposed=False), 3),
    "conv": (CONV, 2),
}
FUSED: dict[str, tuple[Operation, int]] = {
    "fused matrices": (Fused(LINEAR), 1),
    "fused conv1d": (Fused(CONV1D, axis=1), 1),
    "fused vectors": (Fused(VECTOR), 0),
}


def numbered(shape: tuple[int, ...], first: int = 0) -> np.ndarray:
    """Returns an array whose numbers are all different."""
    return np.arange(first, first + int(np.prod(shape)), dtype=np.float32).reshape(shape)


def tensor(array: np.ndarray) -> Tensor:
    return Tensor(array.shape, lambda: array)


def tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: tensor(array) for name, array in arrays.items()}


def shapes(params: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in params.items()}


def there_and_back(table: rules.Rules, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the reference's tensors, having seen that they are of the shapes said, contiguous,
    and read as they were."""
    bindings = bind(table, shapes(params))
    stored = rules.write(bindings, params)
    assert rules.faults(bindings, tensors(stored)) == {"missing": [], "misshapen": []}
    assert all(array.flags.c_contiguous for array in stored.values())
    again = rules.read(bind(table, shapes(params), stored), tensors(stored), shapes(params))
    assert again.keys() == params.keys()
    assert all(np.array_equal(again[name], params[name]) for name in params)
    return stored


@pytest.mark.parametrize("name", SINGLE)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_operations_are_reversible(name, data):
    operation, fewest = SINGLE[name]
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=fewest, max_size=4)))
    layers = data.draw(st.integers(0, 3))
    plain = there_and_back((Rule("a", "b", operation),), {"a": numbered(shape)})
    assert plain["b"].shape == operation.shape(shape)
    # Stacked layers have a tensor each, which is that of the layer alone.
    stacked = there_and_back(
        (Rule("a", "b.{layer}", operation),), {"a": numbered((layers, *shape))}
    )
    assert set(stacked) == {f"b.{layer}" for layer in range(layers)}
    if layers:
        assert np.array_equal(stacked["b.0"], plain["b"])
    simplest = operation.simplest(plain["b"].shape)
    assert operation.shape(simplest) == plain["b"].shape
    assert np.array_equal(operation.write(*operation.read(plain["b"], simplest)), plain["b"])


@pytest.mark.parametrize("name", FUSED)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_fused_parts_may_differ_in_size(name, data):
    operation, inputs = FUSED[name]
    first = tuple(data.draw(st.lists(st.integers(1, 4), min_size=inputs, max_size=inputs)))
    outputs = st.lists(st.integers(1, 4), min_size=1, max_size=2)
    sizes = [tuple(size) for size in data.draw(st.lists(outputs, min_size=1, max_size=4))]
    params = {
        f"a{index}": numbered((2, *first, *size), 1000 * index) for index, size in enumerate(sizes)
    }
    stored = there_and_back((Rule(tuple(params), "b.{layer}.c", operation),), params)
    assert set(stored) == {"b.0.c", "b.1.c"}
    assert stored["b.0.c"].size == sum(array[0].size for array in params.values())


def test_operations_are_what_their_names_say():
    kernel = numbered((3, 2, 4))
    assert np.array_equal(LINEAR.write(kernel), kernel.reshape(3, 8).T)
    assert np.array_equal(MERGE_HEADS.write(kernel), kernel.reshape(6, 4).T)
    assert np.array_equal(CONV1D.write(kernel), kernel.reshape(3, 8))
    assert np.array_equal(
        CONV.write(kernel), kernel.transpose(2, 1, 0)
    )  # [k, in, out] and [out, in, k]
    assert CONV.write(numbered((3, 4, 1, 2))).shape == (2, 1, 3, 4)
    assert ROW.write(kernel).shape == (1, 24) and VECTOR.write(kernel).shape == (24,)
    parts = Fused(LINEAR).write(kernel, kernel + 100)
    assert np.array_equal(parts, np.concatenate([LINEAR.write(kernel), LINEAR.write(kernel + 100)]))


def test_names_may_have_several_places():
    table = under(
        "decoder/layers",
        "h.{layer}",
        under("experts", "expert.{expert}", linear("up", "wi", bias=False)),
    )
    experts = numbered((2, 3, 5, 4))
    stored = there_and_back(table, {"decoder/layers/experts/up/kernel": experts})
    assert set(stored) == {
        f"h.{layer}.expert.{expert}.wi.weight" for layer in range(2) for expert in range(3)
    }
    assert np.array_equal(stored["h.1.expert.2.wi.weight"], experts[1, 2].T)


def test_the_first_spelling_is_written_and_any_is_read():
    table = norm("norm", "LayerNorm")
    params = {"norm/scale": numbered((3,)), "norm/bias": numbered((3,), 5)}
    stored = there_and_back(table, params)
    assert set(stored) == {"LayerNorm.weight", "LayerNorm.bias"}
    old = {
        "LayerNorm.gamma": stored["LayerNorm.weight"],
        "LayerNorm.beta": stored["LayerNorm.bias"],
    }
    for held in (
        old,
        {
            "LayerNorm.weight": stored["LayerNorm.weight"],
            "LayerNorm.beta": stored["LayerNorm.bias"],
        },
    ):
        read = rules.read(bind(table, shapes(params), held), tensors(held), shapes(params))
        assert all(np.array_equal(read[name], params[name]) for name in params)
    both = old | {"LayerNorm.weight": numbered((3,), 50)}
    assert bind(table, shapes(params), both)[0].names == ("LayerNorm.weight",)


def test_a_rule_may_depend_on_what_else_the_model_has():
    table = (
        Rule("up", "wi_1", AS_IS, given="gate"),
        Rule("up", "wi", AS_IS),
        Rule("gate", "wi_0", AS_IS),
    )
    up, gate = numbered((2,)), numbered((2,), 10)
    assert set(there_and_back(table, {"up": up})) == {"wi"}
    assert set(there_and_back(table, {"up": up, "gate": gate})) == {"wi_0", "wi_1"}
    assert under("a", "b", table)[0].given == "a/gate"


def test_a_fused_rule_needs_all_of_its_parameters():
    rule = Rule(("query", "key"), "qk", Fused(VECTOR))
    assert bind((rule,), {"query": (3,)}) == ()
    assert [one.shape for one in bind((rule,), {"query": (3,), "key": (2, 2)})] == [(7,)]


def test_what_is_not_stored_may_be_zero():
    rule = Rule("bias", "b", ROW, zeros=True)
    bindings = bind((rule,), {"bias": (3,)})
    assert rules.faults(bindings, {}) == {"missing": [], "misshapen": []}
    assert rules.read(bindings, {}, {"bias": (3,)})["bias"].tolist() == [0, 0, 0]
    assert rules.faults(bindings, tensors({"b": numbered((3,))}))["misshapen"] == [
        "b ours (1, 3) theirs (3,)"
    ]


@dataclasses.dataclass(frozen=True)
class Settings:
    width: int = 4
    layers: int = 2
    base: float = 10.0
    activation: str = "gelu"


NESTED = Reference(
    model_types=("pair", "old_pair"),
    architectures={"PairModel": {}, "PairForTagging": {"tag": "logits"}},
    inputs=("input_ids",),
    settings={
        "projection_dim": ("width", 4),
        "text_config.num_layers": ("layers", 2),
        "text_config.rope.theta": ("base", 10.0),
        "text_config.act": ("activation", "gelu"),
    },
    fixed={"text_config.is_decoder": False},
    unread=("vision_config.note",),
    prefix="pair.",
    weights=(
        *embedding("embed/word", "pair.words"),
        *under("encoder/layers", "pair.layers.{layer}", linear("up", "fc")),
        *linear("head/tag", "classifier"),
    ),
    tied={"out.weight": "embed/word/embedding"},
)


def test_settings_in_sections_are_read_and_written():
    config = {
        "model_type": "pair",
        "projection_dim": 8,
        "text_config": {
            "num_layers": 3,
            "rope": {"theta": 5.0},
            "act": "relu",
            "model_type": "pair_text",
            "is_decoder": False,
        },
    }
    read = NESTED.read_settings(config)
    assert read == {"width": 8, "layers": 3, "base": 5.0, "activation": "relu"}
    written = NESTED.write_config(Settings(**read))
    assert written == {
        "model_type": "pair",
        "pad_token_id": 0,
        "projection_dim": 8,
        "text_config": {"num_layers": 3, "rope": {"theta": 5.0}, "act": "relu"},
    }
    assert NESTED.read_settings(written) == read
    assert (
        NESTED.read_settings({"text_config": None})
        == NESTED.read_settings({})
        == dataclasses.asdict(Settings())
    )


@given(
    st.integers(1, 99),
    st.integers(1, 99),
    st.floats(0, 1e6),
    st.sampled_from(["gelu", "relu", "silu"]),
)
@settings(max_examples=30, deadline=None)
def test_settings_go_there_and_back(width, layers, base, activation):
    own = Settings(width, layers, base, activation)
    assert Settings(**NESTED.read_settings(json.loads(json.dumps(NESTED.write_config(own))))) == own


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"text_config": {"depth": 3}}, "text_config.depth=3"),
        ({"text_config": {"rope": {"scaling": 2}}}, "text_config.rope.scaling=2"),
        ({"text_config": {"is_decoder": True}}, r"text_config.is_decoder=true \(only false is\)"),
        ({"text_config": {"num_layers": "3"}}, 'text_config.num_layers="3" must be a value like 2'),
        ({"text_config": {"act": "swash"}}, 'text_config.act="swash" is not supported'),
        ({"text_config": [1]}, r"text_config=\[1\] must be an object"),
        ({"text_config": {"rope": 3}}, "text_config.rope=3 must be an object"),
        ({"vision_config": {"note": "x", "depth": 1}}, "vision_config.depth=1"),
        ({"num_layers": 3}, "num_layers=3"),
        ({"audio_config": {"depth": 1}}, "audio_config="),
    ],
)
def test_settings_not_handled_are_named_with_their_section(config, message):
    with pytest.raises(UserError, match=message) as caught:
        NESTED.read_settings(config)
    assert "\n" not in str(caught.value)


def test_constants_are_read_and_required():
    reference = dataclasses.replace(NESTED, constants={"base": 7.0})
    table = {key: row for key, row in NESTED.settings.items() if row[0] != "base"}
    reference = dataclasses.replace(reference, settings=table)
    assert reference.read_settings({})["base"] == 7.0
    with pytest.raises(
        UserError, match=r"model.base=10.0 has no counterpart in Hugging Face, where it is 7.0"
    ):
        reference.write_config(Settings())


PARAMS = {
    "embed/word/embedding": numbered((6, 4)),
    "encoder/layers/up/kernel": numbered((2, 4, 3), 100),
    "encoder/layers/up/bias": numbered((2, 3), 200),
}
TAG = {"head/tag/kernel": numbered((4, 2), 300), "head/tag/bias": numbered((2,), 400)}
TAGGING = {"model_type": "pair", "architectures": ["PairForTagging"]}


def abstract(params: Mapping[str, np.ndarray]) -> Any:
    return pytree.unnames(params)


@pytest.fixture
def folder(tmp_path) -> Path:
    folders.write_folder(tmp_path / "pair", NESTED, TAGGING, pytree.unnames(PARAMS | TAG))
    return tmp_path / "pair"


def edit(folder: Path, change) -> None:
    stored = load_file(folder / folders.WEIGHTS)
    save_file(change(stored), folder / folders.WEIGHTS)


def test_a_folder_of_any_table_goes_there_and_back(folder):
    assert folders.read_config(folder) == TAGGING
    assert set(load_file(folder / folders.WEIGHTS)) == {
        *("pair.words.weight", "pair.layers.0.fc.weight", "pair.layers.1.fc.weight"),
        *("pair.layers.0.fc.bias", "pair.layers.1.fc.bias", "classifier.weight", "classifier.bias"),
    }
    loaded = folders.read_weights(folder, NESTED, abstract(PARAMS | TAG))
    flat = pytree.names(loaded.params)
    assert flat.keys() == (PARAMS | TAG).keys()
    assert all(np.array_equal(flat[name], value) for name, value in (PARAMS | TAG).items())
    body = folders.read_weights(folder, NESTED, abstract(PARAMS))
    assert np.array_equal(body.others["head"]["tag"]["kernel"], TAG["head/tag/kernel"])


def test_unknown_and_missing_names_are_errors(folder):
    def change(stored):
        del stored["pair.layers.1.fc.bias"]
        return stored | {"pair.x": numbered((1,))}

    edit(folder, change)
    with pytest.raises(
        UserError, match=r"missing \(1\): pair.layers.1.fc.bias; unexpected \(1\): pair.x"
    ):
        folders.read_weights(folder, NESTED, abstract(PARAMS | TAG))
    with pytest.raises(UserError, match=r"missing \(2\): pair.layers.1.fc.bias, encoder/other"):
        folders.read_weights(
            folder, NESTED, abstract(PARAMS | TAG | {"encoder/other": numbered((1,))})
        )
    with pytest.raises(UserError, match="encoder/other has no counterpart in Hugging Face's pair"):
        folders.write_folder(
            folder, NESTED, TAGGING, pytree.unnames(PARAMS | {"encoder/other": numbered((1,))})
        )


def test_copies_stand_for_weights_and_must_be_equal(folder):
    edit(
        folder, lambda stored: {name.replace("pair.words", "out"): x for name, x in stored.items()}
    )
    loaded = folders.read_weights(folder, NESTED, abstract(PARAMS | TAG))
    assert np.array_equal(
        loaded.params["embed"]["word"]["embedding"], PARAMS["embed/word/embedding"]
    )
    edit(folder, lambda stored: stored | {"pair.words.weight": numbered((6, 4), 1)})
    with pytest.raises(UserError, match=r"out.weight differs from pair.words.weight"):
        folders.read_weights(folder, NESTED, abstract(PARAMS | TAG))


def test_buffers_are_left_out_and_checked():
    def refuse(name: str, buffer: Tensor) -> None:
        raise UserError(f"{name} is wrong")

    stored = tensors({"pair.words.weight": numbered((6, 4)), "pair.mask": numbered((1,))})
    for check, message in ((lambda name, buffer: None, None), (refuse, "pair.mask is wrong")):
        reference = dataclasses.replace(NESTED, buffers={".mask": check})
        if message is None:
            assert set(folders.canonical(stored, reference)) == {"pair.words.weight"}
        else:
            with pytest.raises(UserError, match=message):
                folders.canonical(stored, reference)


def test_a_config_may_name_a_class_in_place_of_a_type(tmp_path):
    """As the folders of diffusers do."""
    reference = dataclasses.replace(NESTED, model_types=("PairModel",), type_key="_class_name")
    written = reference.write_config(Settings())
    assert written["_class_name"] == "PairModel" and "model_type" not in written
    folders.write_folder(
        tmp_path / "new",
        reference,
        written | {"_diffusers_version": "0.30"},
        pytree.unnames(PARAMS),
    )
    config = folders.read_config(tmp_path / "new")
    assert folders.model_type(config) == "PairModel" and reference.read_settings(
        config
    ) == dataclasses.asdict(Settings())
    assert "words.weight" in load_file(
        tmp_path / "new" / folders.WEIGHTS
    )  # a bare model's, without the prefix
    folders.write_folder(tmp_path / "new", reference, written, pytree.unnames(PARAMS))


def test_every_family_is_found_by_its_types():
    for name in models.families():
        reference = families.reference(name)
        assert reference is not None
        for one in reference.all():
            assert all(families.reference_of(kind) == (name, one) for kind in one.model_types)
            assert one.inputs and one.inputs[0] in ("input_ids", "pixel_values")
    assert families.reference("nothing") is None
    with pytest.raises(UserError, match='model_type="brt" is not supported.*did you mean "bert"'):
        families.reference_of("brt")


@pytest.mark.parametrize("name", sorted(models.families()))
def test_settings_are_those_of_the_family(name):
    """Every row of the tables sets a field of the family's settings, of the kind of its default."""
    fields = {field.name: field for field in dataclasses.fields(models.family(name).Settings)}
    for one in families.table_of(name).all():
        for ours, _ in one.settings.values():
            assert ours in fields
        assert set(one.constants) <= set(fields)
        read = one.read_settings({"model_type": one.model_types[0]})
        assert set(read) <= set(fields)
        assert models.family(name).Settings(**read)
