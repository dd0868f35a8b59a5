"""Reads the checkpoints of llama2.c (Karpathy 2023): a Llama as plain numbers, and its tokenizer.

A `.bin` file of version 0, as used for the TinyStories models: seven int32 (width, mlp width,
layers, query heads, key heads, vocabulary, context), then fp32 matrices [out, in], one kind for all
layers after the other. There, rotary positions rotate pairs of neighboring numbers; the reference
and `layers/attention.rotate` rotate pairs half a head apart.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fmjax.contracts import Config
from fmjax.data.tokenizers.sentencepieces import SPACE, SentencePieces
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError
from fmjax.hub.families.llama import REFERENCE
from fmjax.hub.tensors import Tensor
from fmjax.models import llama

BOS, EOS, BYTES = 1, 2, range(3, 259)  # the ids of a tokenizer's special and byte tokens
LATER = 0x616B3432  # the magic number of versions 1 and 2
SANE = 1 << 20  # upper limit of sizes
COSINES_AND_SINES = ""  # position tables, which are computed here


class Header(NamedTuple):
    """The sizes of a checkpoint. That of the vocabulary is negative if the head has its own
    matrix."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int


def read(path: Path) -> tuple[Config, dict[str, Tensor], Tokenizer | None]:
    """Returns a checkpoint in the form of a reference folder: config, tensors, tokenizer.

    The tokenizer comes from a file beside it, `tok<vocabulary>.bin` (such as tok512.bin) or
    `tokenizer.bin`; None if there is none. Raises UserError if a file is incomplete or of another
    kind.
    """
    head, numbers = read_numbers(path)
    vocabulary, own_head = abs(head.vocabulary), head.vocabulary < 0
    settings = llama.Settings(
        width=head.width,
        layers=head.layers,
        attention_heads=head.heads,
        kv_heads=head.kv_heads,
        mlp_width=head.mlp_width,
        vocab_size=vocabulary,
        context=head.context,
        epsilon=1e-5,
        tied=not own_head,
    )
    tensors = named_tensors(path, head, numbers)
    beside = [path.with_name(name) for name in (f"tok{vocabulary}.bin", "tokenizer.bin")]
    held = [file for file in beside if file.is_file()]
    tokenizer = read_tokenizer(held[0], vocabulary) if held else None
    own = {"architectures": ["LlamaForCausalLM"], "bos_token_id": BOS, "eos_token_id": EOS}
    return REFERENCE.write_config(settings) | own, tensors, tokenizer


def named_tensors(path: Path, head: Header, numbers: np.ndarray) -> dict[str, Tensor]:
    """Returns a checkpoint's matrices under the reference's names, layer by layer.

    Raises UserError if the number of values does not match its sizes.
    """
    width, head_width = head.width, head.width // head.heads
    vocabulary, kv_width = abs(head.vocabulary), head_width * head.kv_heads
    layer = "model.layers.{layer}"
    layout: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        f"{layer}.input_layernorm.weight": (head.layers, width),
        f"{layer}.self_attn.q_proj.weight": (head.layers, width, width),
        f"{layer}.self_attn.k_proj.weight": (head.layers, kv_width, width),
        f"{layer}.self_attn.v_proj.weight": (head.layers, kv_width, width),
        f"{layer}.self_attn.o_proj.weight": (head.layers, width, width),
        f"{layer}.post_attention_layernorm.weight": (head.layers, width),
        f"{layer}.mlp.gate_proj.weight": (head.layers, head.mlp_width, width),
        f"{layer}.mlp.down_proj.weight": (head.layers, width, head.mlp_width),
        f"{layer}.mlp.up_proj.weight": (head.layers, head.mlp_width, width),
        "model.norm.weight": (width,),
        COSINES_AND_SINES: (2, head.context, head_width // 2),
    }
    if head.vocabulary < 0:
        layout["lm_head.weight"] = (vocabulary, width)
    sizes = [math.prod(shape) for shape in layout.values()]
    if sum(sizes) != numbers.size:
        raise UserError(
            f"{path}: holds {numbers.size} numbers, but a model of its sizes has {sum(sizes)}; "
            "download the file again"
        )
    arrays: dict[str, np.ndarray] = {}
    for (name, shape), part in zip(
        layout.items(), np.split(numbers, np.cumsum(sizes)[:-1]), strict=True
    ):
        stacked = part.reshape(shape)
        if "{layer}" in name:
            arrays |= {name.format(layer=index): array for index, array in enumerate(stacked)}
        elif name != COSINES_AND_SINES:
            arrays[name] = stacked
    return {name: as_stored(name, array, head_width) for name, array in arrays.items()}


def as_stored(name: str, array: np.ndarray, head_width: int) -> Tensor:
    """Returns a tensor in the reference's layout, with pairs of queries and keys half a head
    apart."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return Tensor(array.shape, lambda: array)
    pairs = array.reshape(-1, head_width // 2, 2, array.shape[-1])  # [heads, K/2, 2, D]
    return Tensor(array.shape, lambda: pairs.swapaxes(1, 2).reshape(array.shape))


def read_numbers(path: Path) -> tuple[Header, np.ndarray]:
    """Returns a checkpoint's header and its numbers.

    Raises UserError if it is not a checkpoint of version 0.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); download the file again") from None
    size = struct.calcsize("<7i")
    if len(content) < size or len(content) % 4:
        raise UserError(
            f"{path}: is not a checkpoint of llama2.c, which begins with seven numbers; "
            "download the file again"
        )
    head = Header(*struct.unpack("<7i", content[:size]))
    if head[0] == LATER:
        raise UserError(
            f"{path}: is a checkpoint of llama2.c in version {head[1]}; "
            "export it in version 0, which is read"
        )
    sane = all(0 < number <= SANE for number in (*head[:5], abs(head.vocabulary), head.context))
    if not sane or head.width % head.heads or head.heads % head.kv_heads:
        raise UserError(
            f"{path}: is not a checkpoint of llama2.c: its sizes would be {head._asdict()}; "
            "download the file again"
        )
    return head, np.frombuffer(content, "<f4", offset=size)


def read_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """Returns the tokenizer in a file of llama2.c: a SentencePiece BPE with byte fallback.

    Raises UserError if the file does not have as many pieces as the vocabulary.
    """
    # Imported here, because it needs protobuf, which no other reader needs.
    from sentencepiece import sentencepiece_model_pb2 as messages

    content = path.read_bytes()
    at = 4  # after the length of the longest piece
    proto = messages.ModelProto()  # type: ignore[attr-defined]
    kind = messages.ModelProto.SentencePiece  # type: ignore[attr-defined]
    names = {0: "<unk>", BOS: "<s>", EOS: "</s>"} | {
        number: f"<0x{number - BYTES[0]:02X}>" for number in BYTES
    }
    types = {0: kind.UNKNOWN, BOS: kind.CONTROL, EOS: kind.CONTROL} | dict.fromkeys(
        BYTES, kind.BYTE
    )
    try:
        for number in range(vocabulary):
            score, length = struct.unpack_from("<fi", content, at)
            at += 8 + length
            if length < 0 or at > len(content):
                raise ValueError(f"piece {number} is cut off")
            piece = content[at - length : at].decode().replace(" ", SPACE)
            proto.pieces.add(
                piece=names.get(number, piece), score=score, type=types.get(number, kind.NORMAL)
            )
        if at != len(content):
            raise ValueError(f"{len(content) - at} bytes are left")
        proto.trainer_spec.model_type = proto.trainer_spec.BPE
        proto.trainer_spec.byte_fallback = True
        proto.trainer_spec.vocab_size = vocabulary
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.remove_extra_whitespaces = False
        return Tokenizer(SentencePieces(proto.SerializeToString()), {})
    except (struct.error, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}: is not llama2.c's tokenizer of {vocabulary} pieces ({error}); "
            "download the file again"
        ) from None
