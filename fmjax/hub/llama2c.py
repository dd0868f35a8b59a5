"""Reads the checkpoints of llama2.c (Karpathy 2023): a Llama as bare numbers, and its tokenizer in a file beside it.

A `.bin` of version 0, as of the TinyStories models: seven int32 (width, mlp width, layers, query heads, key heads, vocabulary,
context), then fp32 matrices [out, in], each kind for all layers together. Pairs of neighbouring numbers are turned there by
their position, where the reference and `layers/attention.rotate` turn numbers half a head apart.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax import pytree
from fmjax.data.tokenizers.sentencepieces import SPACE, SentencePieces
from fmjax.data.tokenizers.tokenizer import Tokenizer
from fmjax.errors import UserError
from fmjax.models import llama

BOS, EOS, BYTES = 1, 2, range(3, 259)  # where a tokenizer's special and byte tokens stand
LATER = 0x616B3432  # the mark of version 1 and 2
SANE = 1 << 20  # no size is larger


class Header(NamedTuple):
    """The sizes of a checkpoint; the vocabulary's is negative where the head has a matrix of its own."""

    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int


def read(path: Path) -> tuple[dict[str, Any], llama.Llama, dict[str, Any], Tokenizer | None]:
    """Returns a checkpoint's config as the reference has it, model, and parameters, and the tokenizer, if there is one beside it.

    That is `tok<vocabulary>.bin`, as tok512.bin, or `tokenizer.bin`. Raises UserError if a file is not whole or something else.
    """
    head, numbers = read_numbers(path)
    vocabulary, head_width = abs(head.vocabulary), head.width // head.heads
    model = llama.build(
        heads={"lm": {}},
        width=head.width,
        layers=head.layers,
        attention_heads=head.heads,
        kv_heads=head.kv_heads,
        head_width=head_width,
        mlp_width=head.mlp_width,
        vocab_size=vocabulary,
        context=head.context,
        epsilon=1e-5,
        tied=head.vocabulary > 0,
    )
    layout: dict[str, tuple[int, ...]] = {
        "embed/word/embedding": (vocabulary, head.width),
        "decoder/layers/attention_norm/scale": (head.layers, head.width),
        "decoder/layers/attention/query/kernel": (head.layers, head.heads, head_width, head.width),
        "decoder/layers/attention/key/kernel": (head.layers, head.kv_heads, head_width, head.width),
        "decoder/layers/attention/value/kernel": (head.layers, head.kv_heads, head_width, head.width),
        "decoder/layers/attention/out/kernel": (head.layers, head.width, head.heads, head_width),
        "decoder/layers/mlp_norm/scale": (head.layers, head.width),
        "decoder/layers/mlp/gate/kernel": (head.layers, head.mlp_width, head.width),
        "decoder/layers/mlp/down/kernel": (head.layers, head.width, head.mlp_width),
        "decoder/layers/mlp/up/kernel": (head.layers, head.mlp_width, head.width),
        "decoder/norm/scale": (head.width,),
        "cosines and sines": (2, head.context, head_width // 2),
    }
    if head.vocabulary < 0:
        layout["head/lm/kernel"] = (vocabulary, head.width)
    sizes = [int(np.prod(shape)) for shape in layout.values()]
    if sum(sizes) != numbers.size:
        raise UserError(f"{path}: holds {numbers.size} numbers, but a model of its sizes has {sum(sizes)}; get the file again")
    parts = np.split(numbers, np.cumsum(sizes)[:-1])
    params = {name: ours(name, part.reshape(layout[name])) for name, part in zip(layout, parts, strict=True) if "/" in name}
    beside = [found for name in (f"tok{vocabulary}.bin", "tokenizer.bin") if (found := path.with_name(name)).is_file()]
    tokenizer = read_tokenizer(beside[0], vocabulary) if beside else None
    own = {"architectures": ["LlamaForCausalLM"], "bos_token_id": BOS, "eos_token_id": EOS}
    return llama.to_reference(model.settings) | own, model, pytree.unnames(params), tokenizer


def read_numbers(path: Path) -> tuple[Header, np.ndarray]:
    """Returns a checkpoint's header and its numbers. Raises UserError if it is no checkpoint of version 0."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}); get the file again") from None
    size = struct.calcsize("<7i")
    if len(content) < size or len(content) % 4:
        raise UserError(f"{path}: is not a checkpoint of llama2.c, which begins with seven numbers; get the file again")
    head = Header(*struct.unpack("<7i", content[:size]))
    if head[0] == LATER:
        raise UserError(f"{path}: is a checkpoint of llama2.c in version {head[1]}; export it in version 0, which is read")
    sane = all(0 < number <= SANE for number in (*head[:5], abs(head.vocabulary), head.context))
    if not sane or head.width % head.heads or head.heads % head.kv_heads:
        raise UserError(f"{path}: is not a checkpoint of llama2.c: its sizes would be {head._asdict()}; get the file again")
    return head, np.frombuffer(content, "<f4", offset=size)


def ours(name: str, theirs: np.ndarray) -> np.ndarray:
    """Returns a parameter as the model has it: kernels turned round, and the pairs of queries and keys half a head apart."""
    if name.endswith(("query/kernel", "key/kernel")):
        pairs = theirs.reshape(*theirs.shape[:2], -1, 2, theirs.shape[-1])  # [layers, heads, K/2, 2, D]
        theirs = pairs.swapaxes(2, 3).reshape(theirs.shape)
    if not name.endswith("/kernel"):
        return theirs.copy()
    if name.endswith("out/kernel"):
        return np.ascontiguousarray(np.moveaxis(theirs, 1, -1))
    return np.ascontiguousarray(np.moveaxis(theirs, -1, 1 if name.startswith("decoder/layers/") else 0))


def read_tokenizer(path: Path, vocabulary: int) -> Tokenizer:
    """Returns the tokenizer of a file of llama2.c: the pieces and scores of a SentencePiece BPE that falls back to bytes.

    Raises UserError if the file does not hold as many pieces as the vocabulary.
    """
    # Here, because it needs protobuf, which nothing else that is read needs.
    from sentencepiece import sentencepiece_model_pb2 as messages

    content = path.read_bytes()
    at = 4  # after the length of the longest piece
    proto = messages.ModelProto()  # type: ignore[attr-defined]
    kind = messages.ModelProto.SentencePiece  # type: ignore[attr-defined]
    names = {0: "<unk>", BOS: "<s>", EOS: "</s>"} | {number: f"<0x{number - BYTES[0]:02X}>" for number in BYTES}
    types = {0: kind.UNKNOWN, BOS: kind.CONTROL, EOS: kind.CONTROL} | dict.fromkeys(BYTES, kind.BYTE)
    try:
        for number in range(vocabulary):
            score, length = struct.unpack_from("<fi", content, at)
            at += 8 + length
            if length < 0 or at > len(content):
                raise ValueError(f"piece {number} is cut off")
            piece = content[at - length : at].decode().replace(" ", SPACE)
            proto.pieces.add(piece=names.get(number, piece), score=score, type=types.get(number, kind.NORMAL))
        if at != len(content):
            raise ValueError(f"{len(content) - at} bytes are left")
        proto.trainer_spec.model_type = proto.trainer_spec.BPE
        proto.trainer_spec.byte_fallback = True
        proto.trainer_spec.vocab_size = vocabulary
        proto.normalizer_spec.name = "identity"
        proto.normalizer_spec.remove_extra_whitespaces = False
        return Tokenizer(SentencePieces(proto.SerializeToString()), {})
    except (struct.error, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: is not llama2.c's tokenizer of {vocabulary} pieces ({error}); get the file again") from None
