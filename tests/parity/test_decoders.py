"""GPT-2, Llama, Mistral and Qwen2 against the reference itself, on fresh random models: outputs, saving, loading, decoding.

Needs torch and transformers: `pip install -e '.[parity]'`.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with the reference live: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="compares with the reference live: pip install -e '.[parity]'")

import safetensors.torch  # noqa: E402
from golden import make, make_decoders, make_seq2seq, make_t5, make_vision  # noqa: E402

import fmjax  # noqa: E402
from fmjax.errors import UserError  # noqa: E402
from fmjax.hub import llama2c  # noqa: E402
from fmjax.hub.families import table_of  # noqa: E402

pytestmark = pytest.mark.optimized

STEMS = {"GPT2": make_decoders.GPT2 | make_decoders.END} | dict.fromkeys(("Llama", "Mistral", "Qwen2"), make_decoders.LLAMA)
CLASSES = [name for family in ("gpt", "llama", "mistral", "qwen2") for name in table_of(family).classes()]
LMS = ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
TOLERANCE, DEFAULT_TOLERANCE = 1e-4, 2e-6


@pytest.fixture(autouse=True)
def eager():
    with jax.disable_jit():
        yield


def settings(name: str) -> dict:
    stem = next(stem for stem in STEMS if name.startswith(stem))
    own = {"sliding_window": 5} if stem == "Mistral" else {}
    return STEMS[stem] | own | (make_decoders.LABELS if "Classification" in name else {})


def varied(name: str, seed: int) -> dict:
    """Returns settings of random sizes: key heads one, some or all, heads wider or narrower than fits, heads tied or not."""
    rng = np.random.default_rng(seed)
    groups, shared = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    heads, layers = groups * shared, int(rng.integers(1, 4))
    width, mlp = heads * 2 * int(rng.integers(2, 6)), int(rng.integers(10, 60))
    common = {"vocab_size": int(rng.integers(30, 90)), "tie_word_embeddings": bool(rng.integers(2))}
    if name.startswith("GPT2"):
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 30, "n_inner": [mlp, None][seed % 2]}
        return settings(name) | common | sizes | {"layer_norm_epsilon": float(rng.choice([1e-5, 1e-2]))}
    sizes = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": mlp,
        "rms_norm_eps": float(rng.choice([1e-6, 1e-2])),
        "rope_parameters": [{"rope_type": "default", "rope_theta": 77.0}, make_decoders.LLAMA3, make_decoders.LINEAR][seed % 3],
    }
    if not name.startswith("Qwen2"):
        sizes["head_dim"] = [None, 6, 14][seed % 3]
    if name.startswith("Mistral"):
        sizes["sliding_window"] = [5, None, 7][seed % 3]
    if name.startswith("Llama"):
        sizes |= {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}
    return settings(name) | common | sizes


def error(model: fmjax.inference.pretrained.Pretrained, reference, arrays) -> float:
    expected = make_decoders.outputs(reference, arrays)
    found = model.apply(**arrays)
    assert set(expected) <= set(found)
    return max(float(np.abs(np.asarray(found[name]) - array).max()) for name, array in expected.items())


def same_after_loading(folder: Path, name: str, reference, arrays) -> None:
    """Checks that the reference loads a folder without complaint, and that it is the same model."""
    loaded, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    before, after = (make_decoders.outputs(one, arrays) for one in (reference, loaded.eval()))
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert type(transformers.AutoConfig.from_pretrained(folder)) is type(reference.config)


@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_outputs_saving_and_loading(name, seed, tmp_path):
    reference = make_decoders.reference(name, varied(name, seed), seed)
    reference.save_pretrained(tmp_path / "theirs")
    model = fmjax.load(tmp_path / "theirs")
    arrays = make_decoders.inputs(reference, 4, 24, seed)
    assert make.rounding(reference, arrays, make_decoders.outputs) <= TOLERANCE / 4
    assert error(model, reference, arrays) <= TOLERANCE
    assert error(model, reference, {"input_ids": arrays["input_ids"]}) <= TOLERANCE
    model.save(tmp_path / "ours")
    same_after_loading(tmp_path / "ours", name, reference, arrays)


@pytest.mark.parametrize("name", CLASSES)
def test_usual_initialisation(name, tmp_path):
    reference = make_decoders.reference(name, settings(name), seed=3, scale=0.0)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, make_decoders.inputs(reference, 4, 24, 3)) <= DEFAULT_TOLERANCE


@pytest.mark.parametrize("act", ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"])
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_activations(name, act, tmp_path):
    key = "activation_function" if name.startswith("GPT2") else "hidden_act"
    reference = make_decoders.reference(name, settings(name) | {key: act}, seed=4)
    reference.save_pretrained(tmp_path)
    assert error(fmjax.load(tmp_path), reference, make_decoders.inputs(reference, 4, 24, 4)) <= TOLERANCE


@pytest.mark.parametrize("name", LMS)
def test_shards_and_half_precision(name, tmp_path):
    reference = make_decoders.reference(name, settings(name), seed=5)
    reference.save_pretrained(tmp_path / "shards", max_shard_size="15KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    arrays = make_decoders.inputs(reference, 4, 24, 5)
    assert error(fmjax.load(tmp_path / "shards"), reference, arrays) <= TOLERANCE
    reference.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    rounded = getattr(transformers, name).from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    model = fmjax.load(tmp_path / "half")
    assert error(model, rounded, arrays) <= TOLERANCE
    model.save(tmp_path / "back")
    assert getattr(transformers, name).from_pretrained(tmp_path / "back").dtype == torch.float32


@pytest.mark.parametrize("name", LMS)
def test_positions_can_be_given(name, tmp_path):
    reference = make_decoders.reference(name, settings(name), seed=6)
    reference.save_pretrained(tmp_path)
    arrays = make_decoders.inputs(reference, 4, 24, 6)
    positions = np.random.default_rng(0).integers(0, 40, (4, 24))
    # The reference takes rising positions that begin anew for packed rows, unless there is a mask.
    assert error(fmjax.load(tmp_path), reference, arrays | {"position_ids": positions}) <= TOLERANCE


@pytest.mark.parametrize("name", LMS)
def test_packed_rows_are_those_of_the_reference(name, tmp_path):
    """The reference finds packed texts by their positions, which begin anew."""
    reference = make_decoders.reference(name, settings(name), seed=7)
    reference.save_pretrained(tmp_path)
    model = fmjax.load(tmp_path)
    ids = np.random.default_rng(1).integers(3, 41, (2, 15))
    lengths = (8, 7)
    batch = {
        "input_ids": ids,
        "segment_ids": np.repeat([1, 2], lengths)[None].repeat(2, axis=0),
        "position_ids": np.concatenate([np.arange(length) for length in lengths])[None].repeat(2, axis=0),
    }
    found = model.model.apply({"params": model.params}, jax.tree.map(jnp.asarray, batch))["lm"]
    expected = [make_decoders.outputs(reference, {"input_ids": part})["logits"] for part in (ids[:, :8], ids[:, 8:])]
    np.testing.assert_allclose(found, np.concatenate(expected, axis=1), atol=TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", LMS)
def test_decoding_with_a_cache_is_the_reference_at_once(name, side, tmp_path):
    """Three prompts of different lengths, padded to 9, then 4 tokens one by one."""
    reference = make_decoders.reference(name, settings(name), seed=8)
    reference.save_pretrained(tmp_path)
    model = fmjax.load(tmp_path)
    texts, lengths = np.random.default_rng(2).integers(3, 41, (3, 13)), (9, 5, 7)
    ids, mask = np.zeros((3, 13), np.int64), np.ones((3, 13), np.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(0, 9 - length) if side == "left" else slice(length, 9)] = 0
        ids[row, mask[row] == 1] = texts[row, : length + 4]
    cache, found = model.model.empty_cache(3, 13), []
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12), (12, 13)):
        batch = {"input_ids": jnp.asarray(ids[:, begin:end]), "attention_mask": jnp.asarray(mask[:, begin:end])}
        outputs, cache = model.model.apply({"params": model.params}, batch, None, cache, method="decode")
        found.append(outputs["lm"])
    logits = np.concatenate(found, axis=1)
    for row, length in enumerate(lengths):
        alone = make_decoders.outputs(reference, {"input_ids": texts[row : row + 1, : length + 4]})["logits"][0]
        np.testing.assert_allclose(logits[row, mask[row] == 1], alone, atol=TOLERANCE)


def test_a_body_loads_into_another_class(tmp_path):
    for name, body in (("GPT2LMHeadModel", "GPT2Model"), ("LlamaForCausalLM", "LlamaModel")):
        reference = make_decoders.reference(name, settings(name), seed=9)
        reference.save_pretrained(tmp_path / name)
        fmjax.load(tmp_path / name).save(tmp_path / body)
        loaded = getattr(transformers, body).from_pretrained(tmp_path / body).eval()
        arrays = make_decoders.inputs(reference, 3, 8, 9)
        before, after = make_decoders.outputs(reference.base_model, arrays), make_decoders.outputs(loaded, arrays)
        assert np.array_equal(before["last_hidden_state"], after["last_hidden_state"])


@pytest.mark.parametrize("own_head", [False, True])
def test_checkpoints_of_llama2_c_become_models_of_the_reference(own_head, tmp_path):
    head = (12, 10, 2, 3, 1, -300 if own_head else 300, 6)
    rng = np.random.default_rng(10)
    count = 300 * 12 * (1 + own_head) + 2 * (2 * 12 + 2 * 12 * 12 + 2 * 4 * 12 + 3 * 10 * 12) + 12 + 2 * 6 * 2
    (tmp_path / "model.bin").write_bytes(np.int32(head).tobytes() + (0.3 * rng.normal(size=count)).astype(np.float32).tobytes())
    model = fmjax.load(tmp_path / "model.bin")
    model.save(tmp_path / "folder")
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    arrays = {"input_ids": rng.integers(0, 300, (2, 6))}
    assert error(model, reference, arrays) <= TOLERANCE


def test_the_reference_tells_the_published_story(shared_data, tmp_path):
    folder = shared_data / "ckpt_stories260K"
    fmjax.load(folder / "stories260K.bin").save(tmp_path)
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = reference.generate(torch.tensor([[llama2c.BOS]]), max_new_tokens=256, do_sample=False)[0].tolist()
    golden = json.loads((folder / "golden_greedy.json").read_text())
    assert ids == golden["greedy_ids_from_BOS"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(ids, skip_special_tokens=True) == golden["text"]
    assert tokenizer(golden["text"], add_special_tokens=False)["input_ids"] == ids[1:]


# Pickles, of every family: (class, settings, module that makes it).
PICKLED = {
    "bert": ("BertForPreTraining", make.SMALL, make),
    "roberta": ("RobertaForMaskedLM", make.ROBERTA, make),
    "distilbert": ("DistilBertForMaskedLM", make.DISTIL, make),
    "electra": ("ElectraForMaskedLM", make.ELECTRA, make),
    **{name: (*make_decoders.CASES[name], make_decoders) for name in ("gpt2_lm", "llama_lm", "mistral_lm", "qwen2_lm")},
    **{name: (*make_t5.CASES[name], make_t5) for name in ("v1_0", "v1_1", "mt5")},
    **{name: (*make_seq2seq.CASES[name], make_seq2seq) for name in ("marian", "bart", "mbart")},
    **{name: (*make_vision.CASES[name], make_vision) for name in ("vit_classify", "deit_model")},
}


def recipe(folder: Path) -> list[str]:
    """Returns the command by which a refused folder says that it is converted."""
    with pytest.raises(UserError) as caught:
        fmjax.load(folder)
    code = str(caught.value).partition('python -c "')[2].removesuffix('"')
    return [sys.executable, "-c", code]


def pickled(name: str, folder: Path) -> None:
    """Writes a model as transformers wrote them before safetensors."""
    kind, given, module = PICKLED[name]
    reference = module.reference(kind, given, seed=8)
    reference.save_pretrained(folder)
    # Under the names of files: the reference's modules have others since version 5.
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(stored, folder / "pytorch_model.bin")


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickle_is_converted_by_the_recipe(name, tmp_path):
    pickled(name, tmp_path / "old")
    kind, given, module = PICKLED[name]
    module.reference(kind, given, seed=8).save_pretrained(tmp_path / "new")
    exec(recipe(tmp_path / "old")[2], {})  # a process for each family would take long; one has it below
    old, new = fmjax.load(tmp_path / "old"), fmjax.load(tmp_path / "new")
    assert jax.tree.all(jax.tree.map(np.array_equal, old.params, new.params))


def test_the_recipe_runs_in_a_process_of_its_own_and_reads_tensors_alone(tmp_path):
    pickled("gpt2_lm", tmp_path / "old")
    old = torch.load(tmp_path / "old" / "pytorch_model.bin", weights_only=True)
    names = sorted(old)
    (tmp_path / "old" / "pytorch_model.bin").unlink()
    for part in (0, 1):  # of the first half and of the second
        torch.save({key: old[key] for key in names[part::2]}, tmp_path / "old" / f"pytorch_model-0000{part}-of-00002.bin")
    subprocess.run(recipe(tmp_path / "old"), check=True)
    assert fmjax.load(tmp_path / "old").apply(input_ids=np.ones((1, 3), np.int32))["logits"].shape == (1, 3, 41)

    pickled("gpt2_lm", tmp_path / "evil")
    (tmp_path / "evil" / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "opened")))
    done = subprocess.run(recipe(tmp_path / "evil"), capture_output=True, text=True)
    assert done.returncode != 0 and "Weights only load failed" in done.stderr
    assert not (tmp_path / "opened").exists() and not (tmp_path / "evil" / "model.safetensors").exists()


class Touch:
    """Unpickling this makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
