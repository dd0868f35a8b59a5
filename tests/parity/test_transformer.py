"""Marian, BART and mBART against the reference itself: outputs, saving, loading, file layouts, tokenizers, generation.

Needs torch and transformers: `pip install -e '.[parity]'`.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with the reference live: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="compares with the reference live: pip install -e '.[parity]'")

from data.tokenizers.test_marian import ENGLISH, GERMAN, write_folder  # noqa: E402
from golden import make_seq2seq as make  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

import fmjax  # noqa: E402
from fmjax.data.tokenizers.tokenizer import load_tokenizer  # noqa: E402
from fmjax.errors import UserError  # noqa: E402
from fmjax.layers.position import sinusoids  # noqa: E402

pytestmark = pytest.mark.optimized

CLASSES = {
    "MarianModel": make.MARIAN,
    "MarianMTModel": make.MARIAN,
    "BartModel": make.SMALL,
    "BartForConditionalGeneration": make.SMALL,
    "MBartModel": make.MBART,
    "MBartForConditionalGeneration": make.MBART,
}
# Random weights of order 0.3 carry rounding errors through the layers; those of the usual initialisation do not.
TOLERANCE, DEFAULT_TOLERANCE = 1e-4, 2e-6


@pytest.fixture(autouse=True)
def eager():
    with jax.disable_jit():
        yield


def varied(name: str, seed: int) -> dict:
    """Returns settings of random sizes, the decoder's other than the encoder's; source and target with a table each, at times."""
    rng = np.random.default_rng(seed)
    heads = int(rng.integers(1, 5))
    width = 2 * heads * int(rng.integers(2, 7))
    vocabulary = int(rng.integers(50, 200))
    sizes = {
        "vocab_size": vocabulary,
        "d_model": width,
        "encoder_layers": int(rng.integers(1, 4)),
        "decoder_layers": int(rng.integers(1, 4)),
        "encoder_attention_heads": heads,
        "decoder_attention_heads": int(rng.choice([heads, 2, 1])),
        "encoder_ffn_dim": int(rng.integers(10, 90)),
        "decoder_ffn_dim": int(rng.integers(10, 90)),
        "max_position_embeddings": int(rng.integers(30, 60)),
        "scale_embedding": bool(rng.integers(2)),
        "activation_function": str(rng.choice(["gelu", "relu", "swish", "gelu_new"])),
        "pad_token_id": 1,
    }
    if not name.startswith("Marian"):
        return CLASSES[name] | sizes
    tables = {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": vocabulary - 7} if seed % 2 else {}
    tied = {"tie_word_embeddings": False} if seed % 4 == 3 else {}
    return CLASSES[name] | sizes | {"decoder_start_token_id": 1} | tables | tied


def error(model: fmjax.inference.pretrained.Pretrained, reference, arrays) -> float:
    expected = make.outputs(reference, arrays)
    found = model.apply(**arrays)
    assert set(expected) == set(found)
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in expected.items())


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_saving_and_loading(name, seed, tmp_path):
    reference = make.reference(name, varied(name, seed), seed)
    reference.save_pretrained(tmp_path / "theirs")
    model = fmjax.load(tmp_path / "theirs")
    arrays = make.inputs(reference, 4, 24, 17, seed)
    assert error(model, reference, arrays) <= TOLERANCE
    bare = {key: array for key, array in arrays.items() if key.endswith("input_ids")}
    assert error(model, reference, bare) <= TOLERANCE
    if name == "BartModel":
        assert error(model, reference, {"input_ids": arrays["input_ids"]}) <= TOLERANCE

    model.save(tmp_path / "ours")
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    # A bare Marian misses its sinusoids, which it makes itself.
    missing = {key for key in info.pop("missing_keys") if name != "MarianModel" or "embed_positions" not in key}
    assert not missing and not any(info.values()), info
    before, after = make.outputs(reference, arrays), make.outputs(loaded.eval(), arrays)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "ours")) is type(reference.config)


@pytest.mark.parametrize("name", CLASSES)
def test_usual_initialisation(name, tmp_path):
    reference = make.reference(name, CLASSES[name], seed=3, scale=0.0)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, make.inputs(reference, 4, 24, 17, 3)) <= DEFAULT_TOLERANCE


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "relu", "silu", "swish", "tanh"])
def test_activations(act, tmp_path):
    reference = make.reference("MarianMTModel", make.MARIAN | {"activation_function": act}, seed=4)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, make.inputs(reference, 4, 24, 17, 4)) <= TOLERANCE


def test_files_of_earlier_conversions(tmp_path):
    """Shared weights stored again under each name, sinusoids too, and no bias of the logits."""
    reference = make.reference("MarianMTModel", make.MARIAN, seed=5)
    reference.final_logits_bias.zero_()
    reference.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["model.shared.weight"]
    copies = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    tensors |= {name: table.copy() for name in copies}
    tensors |= {f"model.{side}.embed_positions.weight": sinusoids(40, 18) for side in ("encoder", "decoder")}
    del tensors["final_logits_bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    arrays = make.inputs(reference, 4, 24, 17, 5)
    assert error(fmjax.load(tmp_path), reference, arrays) <= TOLERANCE
    del tensors["model.shared.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert error(fmjax.load(tmp_path), reference, arrays) <= TOLERANCE
    save_file(tensors | {"lm_head.weight": table + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lm_head.weight differs"):
        fmjax.load(tmp_path)


@pytest.mark.parametrize("name", ["MarianMTModel", "BartForConditionalGeneration", "MBartForConditionalGeneration"])
@pytest.mark.parametrize("beams", [1, 4])
def test_generated_tokens(name, beams, tmp_path):
    reference = make.reference(name, CLASSES[name], seed=6)
    reference.save_pretrained(tmp_path)
    arrays = make.inputs(reference, 4, 11, 9, 6)
    arrays = {key: arrays[key] for key in ("input_ids", "attention_mask")}
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    with torch.no_grad():
        expected = reference.generate(**tensors, num_beams=beams, max_new_tokens=12).numpy()
    with jax.disable_jit(False):
        found = fmjax.load(tmp_path).generate(**arrays, num_beams=beams, max_new_tokens=12)
    assert np.array_equal(np.asarray(found), expected)


TEXTS = [
    *ENGLISH,
    *GERMAN,
    "",
    "   two  spaces ",
    "Über 你好 ½ ☃",
    ">>fra<< A dog.",
    ">>xxx<<A dog.",
    "a >>fra<< b",
    "a</s>b <pad> c<unk>",
    ">>deu<<",
    "<s> a",
]


def test_the_tokenizer(tmp_path):
    folder = write_folder(tmp_path / "theirs")
    ours, theirs = load_tokenizer(folder), transformers.MarianTokenizer.from_pretrained(folder)
    rows = [ours.assemble(ids)[0].tolist() for ids in ours.encode_batch(TEXTS)]
    assert rows == theirs(TEXTS)["input_ids"]
    targets = [ours.assemble(ids)[0].tolist() for ids in ours.encode_targets(TEXTS)]
    assert targets == theirs(text_target=TEXTS)["input_ids"]
    for row in rows + targets:
        assert ours.decode(row) == theirs.decode(row)
        plain = [number for number in row if number not in theirs.all_special_ids]
        assert ours.decode(plain) == theirs.decode(row, skip_special_tokens=True)
    ours.save(tmp_path / "ours")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert type(again) is type(theirs) and again(TEXTS)["input_ids"] == rows


def test_a_whole_folder_translates(tmp_path):
    folder = write_folder(tmp_path)
    theirs = transformers.MarianTokenizer.from_pretrained(folder)
    special = {"pad_token_id": theirs.pad_token_id, "decoder_start_token_id": theirs.pad_token_id}
    reference = make.reference("MarianMTModel", make.MARIAN | special | {"vocab_size": theirs.vocab_size}, seed=7)
    reference.generation_config.update(num_beams=3, max_length=20, bad_words_ids=[[theirs.pad_token_id]])
    reference.save_pretrained(folder)
    with torch.no_grad():
        rows = reference.generate(**theirs(ENGLISH, return_tensors="pt", padding=True))
    with jax.disable_jit(False):
        found = fmjax.load(folder).predict(ENGLISH)
    assert [row["text"] for row in found] == theirs.batch_decode(rows, skip_special_tokens=True)
