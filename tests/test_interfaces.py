"""The interfaces of DESIGN section 3 carry families and tasks that do not exist yet, by shapes alone.

Five cases: masked language modelling with next-sentence prediction, classification, an encoder-decoder with a cache, a
masked autoencoder, and a mixture of two tasks. State, optimizer and step are made without knowing which it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmjax import losses, optim, pytree
from fmjax.data.stream.batches import TrainBatches, eval_batches
from fmjax.distributed import sharding
from fmjax.layers.attention import Context, CrossAttention, attend, key_mask
from fmjax.layers.heads import Heads
from fmjax.layers.linear import Dense, embedding, normal, parameter
from fmjax.layers.norm import LayerNorm
from fmjax.models import bert
from fmjax.tasks.classify import Task as Classify
from fmjax.tasks.mlm import Task as Mlm
from fmjax.train.state import abstract_params, abstract_state, batch_spec, create_state
from fmjax.train.step import make_step

B, L, V, D = 8, 8, 32, 16
SIZE = {"width": D, "layers": 2, "attention_heads": 2, "mlp_width": 32, "vocab_size": V, "positions": L}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
Shapes = dict[str, jax.ShapeDtypeStruct]


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def forms(tree: Any) -> Any:
    """Returns the shapes and dtypes of a tree."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def carried(model: nn.Module, task: Any, spec: Shapes, accumulate: int = 1) -> tuple[dict[str, Any], Shapes]:
    """Returns the parameters by name and the step's metrics: sharded state, optimizer, step and predictions, as shapes."""
    mesh, rules = sharding.make_mesh(CUBE), sharding.RULES["fsdp_tp"]
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
        sharding.batch_shardings(spec, rules, mesh)
        params = abstract_params(model, spec, mesh, rules)
        transform = optim.build({"learning_rate": 1e-3, "layer_decay": 0.9, "ema": 0.9, "clip_norm": 1.0}, params, 10).transform
        abstract = abstract_state(params, transform, mesh)
        state = jax.eval_shape(lambda: create_state(model, transform, spec, abstract, seed=0))
        assert forms(state) == forms(abstract)
        trainable = jax.tree.map(lambda _: True, params)
        step = make_step(model, task, transform, trainable, accumulate)
        after, metrics = jax.eval_shape(step, abstract, spec, jax.eval_shape(jax.random.key, 0))
        assert forms(after) == forms(abstract)
        arrays = jax.eval_shape(lambda p, b: task.predictions(model.apply({"params": p}, b), b), params, spec)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(arrays)) and arrays
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert all(metric.shape == () for metric in metrics.values()) and {"loss", "grad_norm", "nonfinite"} <= set(metrics)
    named = pytree.names(params)
    assert {name.split("/")[0] for name in named} <= {"embed", "encoder", "decoder", "head"}
    assert {name.split("/")[1] for name in named if name.startswith("head/")} <= set(task.heads)
    assert any(not leaf.sharding.is_fully_replicated for leaf in named.values())
    return named, metrics


MLM: Shapes = {
    "input_ids": ints(B, L), "segment_ids": ints(B, L), "position_ids": ints(B, L),
    "masked_positions": ints(B, 3), "masked_labels": ints(B, 3), "masked_weights": floats(B, 3),
}  # fmt: skip
CLASSIFY: Shapes = {"input_ids": ints(B, L), "token_type_ids": ints(B, L), "attention_mask": ints(B, L), "labels": ints(B)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_masked_language_modelling_with_pairs(accumulate):
    task = Mlm(nsp=True)
    named, metrics = carried(bert.build(heads=task.heads, **SIZE), task, MLM | {"nsp_labels": ints(B)}, accumulate)
    assert {"loss_mlm", "loss_nsp"} <= set(metrics)
    assert "encoder/pooler/kernel" in named and named["head/nsp/kernel"].shape == (D, 2)
    assert named["encoder/layers/mlp/up/kernel"].shape == (2, D, 32)
    named, metrics = carried(bert.build(heads=Mlm().heads, **SIZE), Mlm(), MLM, accumulate)
    assert "encoder/pooler/kernel" not in named and "loss_mlm" not in metrics


@pytest.mark.parametrize(
    ("task", "extra", "kernel"),
    [
        (Classify(labels=("a", "b", "c")), {}, ("head/classify/kernel", (D, 3))),
        (Classify(kind="multi", labels=("a", "b"), pool="mean"), {"labels": floats(B, 2)}, ("head/classify_mean/kernel", (D, 2))),
        (Classify(kind="regression", pool="mask"), {"labels": floats(B)}, ("head/classify_mean/kernel", (D, 1))),
    ],
)
def test_classification(task, extra, kernel):
    pooled = {} if task.pool == "first" else {"pool_weights": floats(B, L)}
    named, _ = carried(bert.build(heads=task.heads, **SIZE), task, CLASSIFY | extra | pooled, accumulate=2)
    assert named[kernel[0]].shape == kernel[1]
    assert ("encoder/pooler/kernel" in named) == (task.pool == "first")


# An encoder-decoder with a cache.


class LmHead(nn.Module):
    """Logits over the vocabulary, tied to the word table."""

    reads_pooled: ClassVar[bool] = False

    @nn.compact
    def __call__(self, features, batch):
        bias = parameter(self, "bias", nn.initializers.zeros_init(), ("vocab",), features["word_table"].shape[:1])
        return jnp.einsum("BLD,VD->BLV", features["hidden"], features["word_table"]) + bias[None, None]


class Decoder(nn.Module):
    """One layer: causal attention through a cache, attention to the memory."""

    @nn.compact
    def __call__(self, x, memory, memory_mask, cache):
        dense = partial(Dense, (2, D // 2), ("embed", "heads", "kv"))
        query, key, value = (dense(name=name)(x) for name in ("query", "key", "value"))
        places = jnp.arange(x.shape[1])
        if cache is not None:
            places = places + cache["index"]
            at = (0, cache["index"], 0, 0)
            key = jax.lax.dynamic_update_slice(cache["key"], key, at)
            value = jax.lax.dynamic_update_slice(cache["value"], value, at)
            cache = {"key": key, "value": value, "index": cache["index"] + x.shape[1]}
        causal = jnp.arange(key.shape[1])[None, :] <= places[:, None]
        seen = attend(query, key, value, causal[None, None], lambda weights: weights)
        x = LayerNorm(name="norm")(x + Dense((D,), ("heads", "kv", "embed"), name="out")(seen))
        context = Context(memory=memory, memory_mask=memory_mask)
        x = LayerNorm(name="cross_norm")(x + CrossAttention(2, D // 2, name="cross")(x, context)[0])
        return x, cache


class Seq2Seq(nn.Module):
    """`encode(batch)`, `decode(batch, memory, cache) -> (features, cache)`; the cache is a value that is passed along."""

    heads: Mapping[str, Mapping[str, Any]]

    def setup(self):
        self.embed = embedding(V, D, axis="vocab", init=normal(0.02), dtype=jnp.float32)
        self.encoder = bert.Encoder(bert.Settings(**SIZE), False)
        self.decoder = Decoder()
        self.head = Heads({kind: {"lm": LmHead}[kind] for kind in self.heads})

    def encode(self, batch):
        return self.encoder(self.embed(batch["input_ids"]), key_mask(batch["attention_mask"]))["hidden"]

    def decode(self, batch, memory, cache):
        x, cache = self.decoder(self.embed(batch["target_ids"]), memory, key_mask(batch["attention_mask"]), cache)
        features = {"hidden": x}
        return features | self.head(features | {"word_table": self.embed.embedding}, batch), cache

    def empty_cache(self, rows: int, length: int):
        heads = jnp.zeros((rows, length, 2, D // 2))
        return {"key": heads, "value": heads, "index": jnp.int32(0)}

    def __call__(self, batch):
        return self.decode(batch, self.encode(batch), None)[0]


class Translate:
    """Predicts each next token of the target."""

    heads: ClassVar[dict[str, dict[str, Any]]] = {"lm": {}}

    def weights(self, batch):
        return {"lm": batch["target_weights"].sum()}

    def each(self, outputs, batch):
        return losses.softmax_cross_entropy(outputs["lm"], batch["target_labels"]) * batch["target_weights"]

    def loss(self, outputs, batch):
        return {"lm": self.each(outputs, batch).sum()}

    def predictions(self, outputs, batch):
        return {"losses": self.each(outputs, batch).sum(-1), "weights": batch["target_weights"].sum(-1)}


SEQ2SEQ: Shapes = {
    "input_ids": ints(B, L), "attention_mask": ints(B, L),
    "target_ids": ints(B, 6), "target_labels": ints(B, 6), "target_weights": floats(B, 6),
}  # fmt: skip


def test_an_encoder_decoder_trains():
    named, _ = carried(Seq2Seq(Translate.heads), Translate(), SEQ2SEQ, accumulate=2)
    assert {name.split("/")[0] for name in named} == {"embed", "encoder", "decoder", "head"}


def test_a_decoder_generates_with_a_cache_of_constant_shape():
    model = Seq2Seq(Translate.heads)
    mesh = sharding.make_mesh({"data": -1})
    params = abstract_params(model, SEQ2SEQ, mesh, {})

    def generate(params, batch):
        apply = partial(model.apply, {"params": params})
        memory = apply(batch, method="encode")
        prompt, cache = apply(batch, memory, model.empty_cache(B, 20), method="decode")

        def one(carried, _):
            ids, cache = carried
            features, cache = apply(batch | {"target_ids": ids}, memory, cache, method="decode")
            ids = features["lm"].argmax(-1).astype(jnp.int32)
            return (ids, cache), ids

        # A scan refuses a cache whose shapes or dtypes change.
        (_, last), tokens = jax.lax.scan(one, (prompt["lm"][:, -1:].argmax(-1).astype(jnp.int32), cache), length=10)
        return tokens, cache, last

    tokens, first, last = jax.eval_shape(generate, params, SEQ2SEQ)
    assert tokens.shape == (10, B, 1)
    assert forms(first) == forms(last) == forms(jax.eval_shape(lambda: model.empty_cache(B, 20)))


# A masked autoencoder.

P, E, K = 16, 12, 4


class Pixels(nn.Module):
    """The pixel decoder: the patches that were kept in their places, a learnt vector in the others, and a projection."""

    patches: int
    values: int
    reads_pooled: ClassVar[bool] = False

    @nn.compact
    def __call__(self, features, batch):
        hidden = features["hidden"]
        missing = parameter(self, "mask", normal(0.02), ("embed",), hidden.shape[-1:])
        rows = jnp.broadcast_to(missing, (hidden.shape[0], self.patches, hidden.shape[-1]))
        rows = jax.vmap(lambda row, at, seen: row.at[at].set(seen))(rows, batch["patch_keep"], hidden)
        return Dense((self.values,), ("embed", None), name="out")(rows)


class Vit(nn.Module):
    """Maps `patches [B,P,E]`, of which `patch_keep [B,K]` may choose some, to features."""

    heads: Mapping[str, Mapping[str, Any]]

    @nn.compact
    def __call__(self, batch):
        x = Dense((D,), (None, "embed"), name="embed")(batch["patches"])
        if "patch_keep" in batch:
            x = jnp.take_along_axis(x, batch["patch_keep"][:, :, None], axis=1)
        features = bert.Encoder(bert.Settings(**SIZE), False, name="encoder")(x, None)
        makers: dict[str, Callable[..., nn.Module]] = {"pixels": Pixels}
        kinds = {kind: partial(makers[kind], **numbers) for kind, numbers in self.heads.items()}
        return features | Heads(kinds, name="head")(features, batch)


class Mae:
    """Predicts the pixels of the patches that are not kept; examples of random images, a quarter of them kept."""

    heads: ClassVar[dict[str, dict[str, Any]]] = {"pixels": {"patches": P, "values": E}}

    def __len__(self):
        return 2 * B

    def __getitem__(self, index):
        return {"patches": np.full((P, E), index, np.float32)}

    def draw(self, example, rng):
        return example | {"patch_keep": np.sort(rng.choice(P, K, replace=False)).astype(np.int32)}

    def hidden(self, batch):
        return 1 - jax.nn.one_hot(batch["patch_keep"], P).sum(axis=1)

    def weights(self, batch):
        return {"pixels": self.hidden(batch).sum()}

    def each(self, outputs, batch):
        return losses.squared_error(outputs["pixels"], batch["patches"]).mean(-1) * self.hidden(batch)

    def loss(self, outputs, batch):
        return {"pixels": self.each(outputs, batch).sum()}

    def predictions(self, outputs, batch):
        return {"losses": self.each(outputs, batch).sum(-1), "weights": self.hidden(batch).sum(-1)}


def test_a_masked_autoencoder():
    drawn = next(TrainBatches(Mae(), batch_size=B, seed=0))
    assert drawn["patch_keep"].shape == (B, K) and len(np.unique(drawn["patch_keep"], axis=0)) > 1
    evaluated = next(eval_batches(Mae(), batch_size=B, seed=0))
    assert batch_spec(evaluated).keys() - {"valid"} == drawn.keys()
    named, _ = carried(Vit(Mae.heads), Mae(), batch_spec(drawn), accumulate=2)
    assert named["head/pixels/out/kernel"].shape == (D, E)
    # The encoder sees the kept patches alone; without `patch_keep` it is an ordinary ViT, of all of them.
    spec = batch_spec(drawn)
    apply = lambda spec, heads: jax.eval_shape(lambda b: Vit(heads).init_with_output(jax.random.key(0), b)[0], spec)  # noqa: E731
    assert apply(spec, Mae.heads)["hidden"].shape == (B, K, D) and apply(spec, Mae.heads)["pixels"].shape == (B, P, E)
    assert apply({"patches": spec["patches"]}, {})["hidden"].shape == (B, P, D)


# A mixture of two tasks, whose batches stand side by side under names such as "mlm/input_ids".


class Mixed(nn.Module):
    """Applies one model to the batch of each part, with the same parameters under the same names."""

    model: nn.Module

    def setup(self):
        nn.share_scope(self, self.model)

    def __call__(self, batch):
        return {part: self.model(own) for part, own in pytree.unnames(batch).items()}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The terms of each part, named by it, with a factor for each part."""

    parts: Mapping[str, Any]
    factors: Mapping[str, float]

    @property
    def heads(self):
        return {kind: numbers for task in self.parts.values() for kind, numbers in task.heads.items()}

    def each(self, method: str, batch, *outputs):
        nested = pytree.unnames(batch)
        return {
            f"{part}/{name}": value
            for part, task in self.parts.items()
            for name, value in getattr(task, method)(*(output[part] for output in outputs), nested[part]).items()
        }

    def weights(self, batch):
        return self.each("weights", batch)

    def loss(self, outputs, batch):
        return {name: self.factors[name.split("/")[0]] * total for name, total in self.each("loss", batch, outputs).items()}

    def predictions(self, outputs, batch):
        return self.each("predictions", batch, outputs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_mixture_of_tasks(accumulate):
    task = Mixture({"mlm": Mlm(), "classify": Classify(labels=("a", "b"))}, {"mlm": 1.0, "classify": 0.3})
    spec = pytree.names({"mlm": MLM, "classify": CLASSIFY})
    named, metrics = carried(Mixed(bert.build(heads=task.heads, **SIZE)), task, spec, accumulate)
    assert {"loss_mlm/mlm", "loss_classify/classify"} <= set(metrics)
    assert {"head/mlm/bias", "head/classify/bias", "encoder/pooler/kernel", "embed/word/embedding"} <= set(named)


def test_a_mixture_has_the_parameters_of_its_model():
    task = Mixture({"mlm": Mlm(), "classify": Classify(labels=("a", "b"))}, {})
    model = bert.build(heads=task.heads, **SIZE)
    mesh = sharding.make_mesh({"data": -1})
    mixed = abstract_params(Mixed(model), pytree.names({"mlm": MLM, "classify": CLASSIFY}), mesh, {})
    assert forms(mixed) == forms(abstract_params(model, {"input_ids": ints(B, L)}, mesh, {}))
