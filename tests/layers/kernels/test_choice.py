"""The kernel of an attention: by what is set, the machine, and what the call needs."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from fmjax import models
from fmjax.errors import UserError
from fmjax.layers.bias import RelativeBias
from fmjax.layers.kernels import choice
from fmjax.layers.kernels.call import Call, lowered_for
from fmjax.layers.kernels.choice import NAMES, choose, recorded
from fmjax.layers.mask import Mask

LENGTH = 128
SIZES = {"width": 32, "layers": 2, "attention_heads": 2, "mlp_width": 16, "vocab_size": 11}
NO_DROPOUT = {"dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(autouse=True)
def lines(monkeypatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(choice, "say", said.append)
    choice.say_once.cache_clear()
    return said


def call(length: int = LENGTH, width: int = 64, dtype: Any = jnp.bfloat16, **needs: Any) -> Call:
    array = jax.ShapeDtypeStruct((2, length, 2, width), dtype)
    return Call(array, array, array, **{"mask": Mask(), "scale": 0.1} | needs)


BIAS = jax.ShapeDtypeStruct((1, 2, LENGTH, LENGTH), jnp.float32)
DISTANCES = RelativeBias(jax.ShapeDtypeStruct((32, 2), jnp.float32))
PLACED = Mask(causal=True, place=jnp.int32(3))


@pytest.mark.parametrize(
    ("platform", "needs", "kernel"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"mask": Mask(causal=True, window=9)}, "splash"),
        ("tpu", {"bias": BIAS}, "flash"),
        ("tpu", {"bias": BIAS, "mask": Mask(causal=True, window=9)}, "xla"),
        ("tpu", {"bias": DISTANCES, "mask": Mask(causal=True)}, "relative"),
        ("tpu", {"bias": DISTANCES, "length": 2**15}, "flash"),
        ("tpu", {"drops": True}, "xla"),
        ("tpu", {"tapped": True}, "xla"),
        ("tpu", {"length": 100}, "xla"),
        ("tpu", {"mask": PLACED}, "xla"),
        ("gpu", {"mask": Mask(causal=True)}, "cudnn"),
        ("gpu", {"dtype": jnp.float32}, "xla"),
        ("gpu", {"width": 20}, "xla"),
        ("gpu", {"length": 129, "bias": BIAS}, "xla"),
    ],
)
def test_auto_is_the_best_kernel_that_serves(platform, needs, kernel):
    with lowered_for(platform), recorded() as found:
        choose("auto", call(**needs), "encoder/attention")
        choose("auto", call(**needs), "encoder/attention")
    assert [(one.where, one.kernel) for one in found] == [("encoder/attention", kernel)]


def test_auto_says_once_that_dropout_excludes_kernels(lines):
    for platform in ("cpu", "tpu", "tpu"):
        with lowered_for(platform):
            choose("auto", call(drops=True), "encoder/attention")
    assert lines == [
        "model.attention=auto: encoder/attention is computed by xla, as attention weights are dropped, which no kernel does; "
        "set model.attention_dropout=0"
    ]


@pytest.mark.parametrize(
    ("setting", "platform", "needs", "reason"),
    [
        ("splash", "cpu", {}, "it is for TPUs and this is a CPU; set auto or xla"),
        ("cudnn", "tpu", {}, "it is for GPUs and this is a TPU; set auto or xla"),
        ("splash", "tpu", {"bias": BIAS}, "it adds no bias; set flash"),
        ("flash", "tpu", {"mask": Mask(causal=True, window=2)}, "it has no windows; set splash"),
        ("splash", "tpu", {"mask": PLACED}, "its mask is not known when the program is compiled; set xla or chunked"),
        ("chunked", "cpu", {"drops": True}, choice.DROPS),
        ("chunked", "cpu", {"tapped": True}, "attention weights are asked for, and it has none; set model.attention=xla"),
        ("cudnn", "gpu", {"dtype": jnp.float32}, "it computes in 16 bits, not in float32; set model.dtype=bfloat16, or xla"),
        ("relative", "tpu", {"bias": BIAS}, "its bias is not one of distances; set flash"),
        ("relative", "tpu", {"mask": Mask(causal=True, window=2)}, "it has no windows; set splash"),
        ("relative", "tpu", {"length": 2**15}, "there are more than 16,384 queries; set flash or chunked"),
        ("pallas_gpu", "gpu", {"crosses": True}, "it computes self-attention only; set cudnn or xla"),
        ("pallas_gpu", "gpu", {"width": 24}, "heads are 24 wide, not a power of two from 16 on; set cudnn or xla"),
    ],
)
def test_a_kernel_that_cannot_serve_is_an_error(setting, platform, needs, reason):
    with lowered_for(platform), pytest.raises(UserError) as error:
        choose(setting, call(**needs), "decoder/cross")
    assert str(error.value) == f'model.attention="{setting}" cannot compute decoder/cross: {reason}'


def test_a_wrong_name_is_an_error():
    with pytest.raises(UserError, match=r'model.attention="splsh" \(did you mean "splash"\?\): choose one of auto, xla, chunked'):
        models.family("gpt").build(heads={"lm": {}}, attention="splsh", **SIZES)
    assert NAMES == ("auto", "xla", "chunked", "splash", "flash", "relative", "cudnn", "pallas_gpu", "ring")


CONTEXT = AbstractMesh((2,), ("context",))


def divided(platform: str) -> contextlib.ExitStack:
    """A mesh that divides the length in force, for a platform."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.sharding.use_abstract_mesh(CONTEXT))
    stack.enter_context(nn.logical_axis_rules((("act_length", ("context",)),)))
    stack.enter_context(lowered_for(platform))
    return stack


@pytest.mark.parametrize(
    ("platform", "needs", "kernel"),
    [
        *[("cpu", {}, "ring"), ("tpu", {"length": 8}, "ring"), ("gpu", {"mask": Mask(causal=True, window=9)}, "ring")],
        *[("tpu", {"bias": BIAS}, "xla"), ("cpu", {"tapped": True}, "xla"), ("cpu", {"length": 9}, "xla")],
    ],
)
def test_auto_is_the_ring_where_the_mesh_divides_the_length(platform, needs, kernel):
    with divided(platform), recorded() as found:
        choose("auto", call(**needs), "encoder/attention")
    assert [one.kernel for one in found] == [kernel]


def test_auto_says_once_that_dropout_excludes_the_ring(lines):
    for _ in range(2):
        with divided("cpu"), recorded() as found:
            assert choose("auto", call(drops=True), "encoder/attention") is None
    assert [one.reason for one in found] == [f"ring: {choice.DROPS}"]
    assert lines == [f"model.attention=auto: encoder/attention is computed by xla, as {choice.DROPS}"]


@pytest.mark.parametrize(("kernel", "platform"), [("splash", "tpu"), ("flash", "tpu"), ("cudnn", "gpu"), ("pallas_gpu", "gpu")])
def test_kernels_of_whole_lengths_name_the_ring(kernel, platform):
    reason = "the mesh divides the length; set ring, or auto"
    with divided(platform), pytest.raises(UserError, match=f"cannot compute attention: {reason}"):
        choose(kernel, call(), "attention")
    with pytest.raises(UserError, match="the mesh does not divide the length; set mesh.rules=fsdp_context, or auto"):
        choose("ring", call(), "attention")


FAMILIES = {
    "gpt": ({"lm": {}}, {}),
    "mistral": ({"lm": {}}, {"window": 3, "kv_heads": 1}),
    "bert": ({"mlm": {}}, {}),
    "t5": ({"lm": {}}, {"decoder_layers": 2, "head_width": 16, "dropout": 0.0}),
}


def built(family: str, **settings: Any) -> tuple[nn.Module, Any, dict[str, jax.Array]]:
    heads, own = FAMILIES[family]
    numbers = SIZES | (NO_DROPOUT if family != "t5" else {}) | own | settings
    model = models.family(family).build(heads=heads, **numbers)
    rng = np.random.default_rng(0)
    batch = {"input_ids": jnp.asarray(rng.integers(1, 11, (2, 9))), "attention_mask": jnp.asarray([[1] * 9, [1] * 6 + [0] * 3])}
    batch |= {"labels": batch["input_ids"][:, :5]} if family == "t5" else {}
    params = jax.eval_shape(lambda: nn.meta.unbox(model.init(jax.random.key(0), batch)["params"]))
    leaves, structure = jax.tree.flatten(params)
    values = [jnp.asarray(0.3 * np.random.default_rng(n).normal(size=leaf.shape), leaf.dtype) for n, leaf in enumerate(leaves)]
    return model, jax.tree.unflatten(structure, values), batch


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_the_same_in_chunks(family):
    """The setting reaches every attention, and masks, biases, windows and shared heads the kernel."""
    real = np.arange(9) < np.array([9, 6])[:, None]
    outputs, kernels = [], []
    for settings in ({}, {"attention": "chunked"}, {"attention": "chunked", "scan_layers": True, "remat": "dots"}):
        model, params, batch = built(family, **settings)
        with recorded() as found:
            hidden = jax.jit(model.apply)({"params": params}, batch)
        name = "encoder_hidden" if family == "t5" else "hidden"
        outputs.append([np.asarray(hidden[name])[real], np.asarray(hidden["hidden"])[:, :5]])
        kernels.append({one.where: one.kernel for one in found})
    for other in outputs[1:]:
        for one, expected in zip(other, outputs[0], strict=True):
            np.testing.assert_allclose(one, expected, atol=3e-5)
    stacks = {"t5": ("encoder/attention", "decoder/attention", "decoder/cross"), "bert": ("encoder/attention",)}
    where = stacks.get(family, ("decoder/attention",))
    assert kernels == [dict.fromkeys(where, name) for name in ("xla", "chunked", "chunked")]


@pytest.mark.full
def test_t5_computes_the_same_with_the_kernel_of_distances(monkeypatch):
    from jax.experimental import pallas

    call = pallas.pallas_call
    monkeypatch.setattr(pallas, "pallas_call", lambda *args, **options: call(*args, **{**options, "interpret": True}))

    def gradient(**settings: Any) -> Any:
        model, params, batch = built("t5", **settings)
        loss = lambda params: jnp.sin(model.apply({"params": params}, batch)["lm"]).sum()  # noqa: E731
        return jax.jit(jax.grad(loss))(params)

    expected = gradient()
    for settings in ({}, {"scan_layers": True, "remat": "dots"}):
        with lowered_for("tpu"), recorded() as found:
            own = gradient(attention="relative", **settings)
        assert {one.where: one.kernel for one in found if one.kernel != "xla"} == dict.fromkeys(
            ("encoder/attention", "decoder/attention", "decoder/cross"), "relative"
        )  # initialization uses xla
        for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, atol=3e-5, rtol=3e-5)


def test_explicit_kernels_leave_initialization_and_decoding_alone():
    model, params, _ = built("gpt", attention="splash")
    token = {"input_ids": jnp.ones((2, 1), jnp.int32)}
    model.init(jax.random.key(0), token)
    _, cache = model.apply({"params": params}, token, None, model.empty_cache(2, 4), method="decode")
    assert int(cache["index"]) == 1
    with pytest.raises(UserError, match='model.attention="splash" cannot compute decoder/attention: it is for TPUs'):
        model.apply({"params": params}, token)


def gradient_of(setting: str, **needs: Any) -> Any:
    """Returns the gradient of an attention, of shapes alone."""
    given = call(**needs)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        kernel = choose(setting, dataclasses.replace(given, q=q, k=k, v=v), "attention")
        assert kernel is not None
        return kernel.attend(dataclasses.replace(given, q=q, k=k, v=v)).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(given.q, given.k, given.v)


# JAX 0.12 deprecates Pallas's Triton backend; `auto` never chooses the kernel that needs it.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize(
    ("setting", "platform", "lowered", "shown"),
    [
        ("pallas_gpu", "gpu", "cuda", "__gpu$xla.gpu.triton"),
        ("splash", "tpu", "tpu", "tpu_custom_call"),
        ("flash", "tpu", "tpu", "tpu_custom_call"),
        ("relative", "tpu", "tpu", "tpu_custom_call"),
    ],
)
def test_programs_for_devices_that_are_not_here_call_the_kernel(setting, platform, lowered, shown):
    length = 2 * LENGTH
    segments = jnp.ones((2, length), jnp.int32)
    # Pallas reads what a GPU can do from the mesh.
    chip = AbstractDevice("NVIDIA H200", None, "gpu") if platform == "gpu" else None
    mesh = AbstractMesh((1,), ("data",), abstract_device=chip)
    with lowered_for(platform), jax.sharding.use_abstract_mesh(mesh):
        traced = gradient_of(setting, length=length, mask=Mask(query_segments=segments, key_segments=segments, causal=True))
        text = traced.lower(lowering_platforms=(lowered,)).as_text()
    assert text.count(shown) >= 2  # forward and backward
    assert f"tensor<2x2x{length}x{length}xf32>" not in text
