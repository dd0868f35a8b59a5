"""Checkpoints of llama2.c: what is written comes back, faults are named, and a real one tells its published story."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

import fmjax
from fmjax import pytree
from fmjax.data.tokenizers.tokenizer import load_tokenizer
from fmjax.errors import UserError
from fmjax.hub import llama2c
from fmjax.inference.convert import convert
from fmjax.inference.pretrained import Pretrained

SIZES = (12, 10, 2, 3, 1, 300, 6)  # width, mlp width, layers, query heads, key heads, vocabulary, context
PIECES = [*["<unk>", "\n<s>\n", "\n</s>\n"], *(f"<0x{byte:02X}>" for byte in range(256))]
WORDS = ["▁", "a", "b", "c", "ab", "▁ab", "bc", "▁▁", "é"]  # the later a piece, the lower its score


def numbers(head: tuple[int, ...], own_head: bool = False) -> list[np.ndarray]:
    """Returns the arrays of a checkpoint, random, in order."""
    width, mlp_width, layers, heads, kv_heads, vocabulary, context = head
    kv_width = width // heads * kv_heads
    shapes = [(vocabulary, width), (layers, width), (layers, width, width), (layers, kv_width, width), (layers, kv_width, width)]
    shapes += [(layers, width, width), (layers, width), (layers, mlp_width, width), (layers, width, mlp_width)]
    shapes += [(layers, mlp_width, width), (width,), (2, context, width // heads // 2)] + [(vocabulary, width)] * own_head
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def write(folder: Path, head: tuple[int, ...], arrays: list[np.ndarray]) -> Path:
    path = folder / "model.bin"
    path.write_bytes(struct.pack("<7i", *head) + b"".join(array.tobytes() for array in arrays))
    return path


def write_tokenizer(path: Path, pieces: list[str]) -> Path:
    parts = [struct.pack("<i", max(map(len, pieces)))]
    for number, piece in enumerate(pieces):
        content = piece.replace("▁", " ").encode()
        parts.append(struct.pack("<fi", min(0.0, 259.0 - number), len(content)) + content)
    path.write_bytes(b"".join(parts))
    return path


@pytest.mark.parametrize("own_head", [False, True])
def test_a_checkpoint_computes_as_llama2_c_does(tmp_path, own_head):
    """Against the forward pass written out, in which pairs of neighbouring numbers are turned."""
    arrays = numbers(SIZES, own_head)
    arrays = [0.3 * array for array in arrays]
    vocabulary = -SIZES[5] if own_head else SIZES[5]
    model = fmjax.load(write(tmp_path, (*SIZES[:5], vocabulary, SIZES[6]), arrays))
    assert model.tokenizer is None and model.config["tie_word_embeddings"] is not own_head
    words, norm_1, wq, wk, wv, wo, norm_2, gate, down, up, norm_3 = arrays[:11]
    ids, width = np.array([5, 9, 7, 5, 290]), 4

    def norm(x, scale):
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * scale

    def turn(x):
        turns = np.exp(1j * np.arange(len(ids))[:, None] / 10000 ** (np.arange(0, width, 2) / width))
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[:, None]
        return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)

    x = words[ids]
    for layer in range(2):
        h = norm(x, norm_1[layer])
        q, k, v = (h @ w[layer].T for w in (wq, wk, wv))
        q, k, v = turn(q.reshape(5, 3, 4)), turn(k.reshape(5, 1, 4)), v.reshape(5, 1, 4)
        scores = np.einsum("lhk,sgk->hls", q, k) / 2 + np.where(np.tri(5), 0, -np.inf)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        x = x + np.einsum("hls,sgk->lhk", weights, v).reshape(5, 12) @ wo[layer].T
        h = norm(x, norm_2[layer])
        gated = h @ gate[layer].T
        x = x + (gated / (1 + np.exp(-gated)) * (h @ up[layer].T)) @ down[layer].T
    expected = norm(x, norm_3) @ (arrays[12] if own_head else words).T
    with jax.disable_jit():
        found = model.apply(input_ids=ids[None])["logits"][0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_tokenizer_joins_pieces_and_falls_back_to_bytes(tmp_path):
    pieces = PIECES + WORDS
    tokenizer = llama2c.read_tokenizer(write_tokenizer(tmp_path / "tokenizer.bin", pieces), len(pieces))
    ids = tokenizer.encode_batch(["ab abc  é€"])[0].tolist()
    # The space in front is the dummy one; "ab" scores better than "bc"; € has no piece.
    names = ["▁ab", "▁ab", "c", "▁▁", "é", *(f"<0x{byte:02X}>" for byte in "€".encode())]
    assert [tokenizer.token(number) for number in ids] == names
    assert tokenizer.decode([1, *ids, 2]) == "ab abc  é€"
    assert (tokenizer.token(1), tokenizer.token(2), tokenizer.token(3)) == ("<s>", "</s>", "<0x00>")
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.sha256 == tokenizer.sha256
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert other.encode("ab abc  é€").ids == ids and other.decode(ids) == "ab abc  é€"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with seven numbers"),
        (b"PK\x03\x04" * 20, "its sizes would be"),
        (struct.pack("<7i", llama2c.LATER, 2, 1, 1, 1, 1, 1) + bytes(256), "in version 2; export it in version 0"),
        (struct.pack("<7i", 12, 10, 2, 5, 1, 300, 6), "its sizes would be"),
        (struct.pack("<7i", 12, 10, 2, 3, 2, 300, 6), "its sizes would be"),
        (struct.pack("<7i", 12, 10, 2, 3, 1, 0, 6), "its sizes would be"),
        (struct.pack("<7i", *SIZES) + bytes(400), "holds 100 numbers, but a model of its sizes has"),
        (struct.pack("<7i", *SIZES) + bytes(401), "begins with seven numbers"),
    ],
)
def test_faults_of_a_checkpoint(tmp_path, content, message):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        fmjax.load(tmp_path / "model.bin")
    assert "\n" not in str(caught.value)


def test_faults_of_a_tokenizer(tmp_path):
    write(tmp_path, SIZES, numbers(SIZES))
    path = tmp_path / "tok300.bin"
    content = write_tokenizer(path, PIECES + [f"piece {number}" for number in range(41)]).read_bytes()
    assert fmjax.load(tmp_path / "model.bin").tokenizer.vocab_size == 300
    for wrong in (content[:-1], content + b"1", content[:4], b"", content[:-1] + b"\xff", bytes(len(content))):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=r"tok300.bin: is not llama2.c's tokenizer of 300 pieces \("):
            fmjax.load(tmp_path / "model.bin")


@pytest.fixture(scope="module")
def stories(shared_data) -> Path:
    """The checkpoint of 260,000 parameters."""
    folder = shared_data / "ckpt_stories260K"
    if not folder.is_dir():
        pytest.skip(f"needs the real checkpoint: {folder} is not there")
    return folder


def greedy(model: Pretrained, count: int) -> list[int]:
    """Returns the token of the beginning and the `count` likeliest that follow, decoded with a cache."""

    def one(carried, _):
        ids, cache = carried
        outputs, cache = model.model.apply({"params": model.params}, {"input_ids": ids}, None, cache, method="decode")
        ids = outputs["lm"].argmax(-1).astype(jnp.int32)
        return (ids, cache), ids[0, 0]

    begin = (jnp.full((1, 1), llama2c.BOS), model.model.empty_cache(1, count))
    _, found = jax.jit(lambda: jax.lax.scan(one, begin, length=count))()
    return [llama2c.BOS, *np.asarray(found).tolist()]


def test_the_published_story(stories):
    model = fmjax.load(stories / "stories260K.bin")
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == 260_032
    ids = greedy(model, 256)
    assert ids == json.loads((stories / "golden_greedy.json").read_text())["greedy_ids_from_BOS"]
    published = re.search(r"```\n\$ ./run \S+ -z \S+ -t 0.0\n(.*?)\n```", (stories / "stories260K.md").read_text(), re.DOTALL)[1]
    assert model.tokenizer.decode(ids) == published
    # Its own story is cut into the very tokens that made it.
    assert model.tokenizer.encode_batch([published])[0].tolist() == ids[1:]


def test_a_converted_checkpoint_is_the_same_model(stories, tmp_path):
    convert(stories / "stories260K.bin", tmp_path / "folder")
    before, after = fmjax.load(stories / "stories260K.bin"), fmjax.load(tmp_path / "folder")
    assert after.model == before.model and after.tokenizer.sha256 == before.tokenizer.sha256
    ours, theirs = pytree.names(before.params), pytree.names(after.params)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
