"""Which kernel computes an attention: `model.attention`, or by the machine and what the call needs.

    xla         a product, a softmax, a product: every machine, every call; an array [B,H,L,S]
    chunked     blocks of queries and keys with a running softmax, in XLA: every machine, any length
    splash      JAX's Pallas kernel for TPUs: causal, windows, segments, shared key heads
    flash       JAX's other one: it adds a bias, an array [1,H,L,S]
    relative    our Pallas kernel for TPUs: it adds a bias of distances (T5) as [H, L+S-1]
    cudnn       cuDNN's fused attention for GPUs, in 16 bits
    pallas_gpu  JAX's Pallas kernel for GPUs: causal, segments
    ring        chunked over the devices that divide the length: keys and values travel from one to
                the next; `auto` where the mesh divides the length

Decoding with a cache and the initialization of parameters use xla whatever is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

from fmjax.distributed.hosts import say
from fmjax.errors import UserError
from fmjax.layers.kernels import chunked, gpu, relative, ring, tpu
from fmjax.layers.kernels.call import Call, length_parts, target

AUTO, PLAIN = "auto", "xla"
DROPS = "attention weights are dropped, which no kernel does; set model.attention_dropout=0"
TAPPED = "attention weights are asked for, and it has none; set model.attention=xla"
SHORT = 128  # of the keys: fewer scores than a kernel's smallest block has


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to compute attention without an array [B,H,L,S]."""

    attend: Callable[[Call], jax.Array]
    refusal: Callable[[Call], str]  # why it cannot serve a call; "" if it can
    platform: str = ""  # the only one that has it


KERNELS: dict[str, Kernel] = {
    "chunked": Kernel(chunked.attend, chunked.refusal),
    "splash": Kernel(tpu.splash, tpu.splash_refusal, "tpu"),
    "flash": Kernel(tpu.flash, tpu.flash_refusal, "tpu"),
    "relative": Kernel(relative.attend, relative.refusal, "tpu"),
    "cudnn": Kernel(gpu.cudnn, gpu.cudnn_refusal, "gpu"),
    "pallas_gpu": Kernel(gpu.pallas, gpu.pallas_refusal, "gpu"),
    "ring": Kernel(ring.attend, ring.refusal),
}
NAMES = (AUTO, PLAIN, *KERNELS)
# What `auto` tries before xla, best first; before these, ring where the mesh divides the length.
PREFERRED: dict[str, tuple[str, ...]] = {
    "tpu": ("splash", "relative", "flash"),
    "gpu": ("cudnn",),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel of one attention."""

    where: str  # such as encoder/attention
    kernel: str  # a name in NAMES
    reason: str = ""  # why not the kernels that `auto` prefers


RECORD: ContextVar[list[Choice] | None] = ContextVar("RECORD", default=None)


@contextmanager
def recorded() -> Iterator[list[Choice]]:
    """Yields the choices of what is traced in the block, each once."""
    found: list[Choice] = []
    token = RECORD.set(found)
    try:
        yield found
    finally:
        RECORD.reset(token)


def refusal(name: str, call: Call) -> str:
    """Returns why a kernel cannot serve a call, "" if it can."""
    kernel, here = KERNELS[name], target().platform
    if kernel.platform not in ("", here):
        return f"it is for {kernel.platform.upper()}s and this is a {here.upper()}; set auto or xla"
    if call.drops:
        return DROPS
    return TAPPED if call.tapped else kernel.refusal(call)


def choose(setting: str, call: Call, where: str) -> Kernel | None:
    """Returns the kernel for a call, None for the plain path.

    Raises UserError if the one that is set cannot serve.
    """
    kernel, reason = PLAIN, ""
    if setting in KERNELS:
        kernel = setting
        if why := refusal(setting, call):
            raise UserError(f'model.attention="{setting}" cannot compute {where}: {why}')
    elif setting == AUTO:
        kernel, reason = automatic(call, where)
    if (found := RECORD.get()) is not None:
        choice = Choice(where, kernel, reason)
        found.extend([] if choice in found else [choice])
    return KERNELS.get("chunked" if kernel != PLAIN and target().shapes_only else kernel)


def automatic(call: Call, where: str) -> tuple[str, str]:
    """Returns the kernel that serves a call best on its machine, and why not a better one."""
    preferred = preferences()
    if preferred and "ring" not in preferred and max(call.lengths) < SHORT:
        return PLAIN, f"fewer than {SHORT} tokens"
    reasons = {}
    for name in preferred:
        reasons[name] = refusal(name, call)
        if not reasons[name]:
            return name, ""
    if call.drops and preferred:
        say_once(f"model.attention=auto: {where} is computed by xla, as {DROPS}")
    return PLAIN, "; ".join(f"{name}: {why}" for name, why in reasons.items())


def preferences() -> tuple[str, ...]:
    """Returns the kernels that `auto` tries before xla here, best first."""
    divided = ("ring",) if length_parts() > 1 else ()
    return divided + PREFERRED.get(target().platform, ())


@functools.cache
def say_once(text: str) -> None:
    """Says a line the first time that it is asked to."""
    say(text)
