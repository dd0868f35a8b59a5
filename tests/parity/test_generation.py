"""Generation against the reference itself, token for token, on fresh random models: greedy, beam search, settings of files.

Needs torch and transformers: `pip install -e '.[parity]'`.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with the reference live: pip install -e '.[parity]'")
transformers = pytest.importorskip("transformers", reason="compares with the reference live: pip install -e '.[parity]'")

from golden import make_generation as make  # noqa: E402

import fmjax  # noqa: E402
from fmjax.decoding.settings import GENERATION  # noqa: E402

PAD = make.PAD


# All settings with two families that have no golden, some with the others. At order 0.3 every weight tells, but there are few
# different tokens.
@pytest.mark.parametrize("scale", [0, 0.3])
@pytest.mark.parametrize("family", make.FAMILIES)
def test_tokens(family, scale, tmp_path):
    seed = 1 if scale else make.SEEDS[family]
    reference = make.reference(family, seed, scale)
    reference.save_pretrained(tmp_path)
    ours = fmjax.load(tmp_path)
    arrays = make.inputs(family, rows=3, length=9, seed=seed)
    chosen = slice(2, None, 4) if scale else slice(None) if family in ("llama", "t5") else slice(1, None, 4)
    wrong = []
    for settings in make.cases(make.frequent(reference, arrays))[chosen]:
        expected = make.tokens(reference, arrays, settings)
        found = ours.generate(**arrays, **settings)
        if not np.array_equal(found, expected):
            wrong.append((settings, expected.tolist(), found.tolist()))
    assert not wrong, wrong[:2]


@pytest.mark.parametrize("family", ["llama", "t5", "marian_untied"])
def test_prompts_of_decoders_and_scores(family, tmp_path):
    reference = make.reference(family, make.SEEDS[family], 0)
    reference.save_pretrained(tmp_path)
    ours = fmjax.load(tmp_path)
    arrays = make.inputs(family, rows=3, length=9, seed=2)
    prompted = make.prompts(arrays, 5, 2) if family != "llama" else arrays
    for settings in make.scored_cases(make.frequent(reference, arrays)):
        sequences, log_probs, scores = make.scored(reference, prompted, settings)
        found = ours.generate(**prompted, **settings, return_scores=True)
        np.testing.assert_array_equal(found.sequences, sequences, str(settings))
        np.testing.assert_allclose(found.log_probs, log_probs, rtol=1e-4, err_msg=str(settings))
        np.testing.assert_allclose(found.sequences_scores, scores, rtol=1e-4, err_msg=str(settings))


@pytest.mark.parametrize("family", ["t5", "marian_untied"])
def test_prompts_of_different_lengths(family, tmp_path):
    """Rows together are the reference's rows alone, with the start token added if it is missing.

    The reference's rows together are the same only for relative positions, without padding behind an added start token.
    """
    reference = make.reference(family, make.SEEDS[family], 0)
    reference.save_pretrained(tmp_path)
    ours = fmjax.load(tmp_path)
    arrays = make.inputs(family, rows=3, length=9, seed=2)
    for start in (make.START, None):
        ids = make.prompts(arrays, 5, 2, None)["decoder_input_ids"]
        mask = np.arange(5) >= np.array([0, 3, 2])[:, None]
        if start:
            ids[range(3), mask.argmax(axis=1)] = start
        prompted = {"decoder_input_ids": np.where(mask, ids, make.PAD), "decoder_attention_mask": mask.astype(int)}
        width = 5 if start else 6
        settings = {"max_new_tokens": 10, "eos_token_id": make.frequent(reference, arrays)[:1].tolist(), "pad_token_id": make.PAD}
        for beams in (1, 3):
            found = ours.generate(**arrays, **prompted, **settings, num_beams=beams)[:, width:]
            if family == "t5" and start:
                together = make.tokens(reference, arrays | prompted, settings | {"num_beams": beams})
                np.testing.assert_array_equal(found, together[:, width:])
            for row in range(3):
                alone = {name: array[row : row + 1] for name, array in arrays.items()}
                alone["decoder_input_ids"] = ids[row : row + 1, mask[row]]
                expected = make.tokens(reference, alone, settings | {"num_beams": beams})[0]
                new = expected[width - 5 + mask[row].sum() :]
                assert found[row].tolist() == [*new, *[make.PAD] * (found.shape[1] - len(new))]


@pytest.mark.parametrize("family", make.GOLDEN)
def test_settings_of_the_folder(family, tmp_path):
    reference = make.reference(family, 3, 0.12)
    arrays = make.inputs(family, rows=2, length=10, seed=3)
    [end, *_] = make.frequent(reference, arrays)
    given = {"max_length": 25, "num_beams": 3, "no_repeat_ngram_size": 2, "length_penalty": 0.7, "renormalize_logits": True}
    given |= {"bad_words_ids": [[int(end)], [4]], "eos_token_id": 5, "pad_token_id": PAD, "forced_eos_token_id": 5}
    reference.generation_config.update(**given)
    reference.save_pretrained(tmp_path)
    loaded = type(reference).from_pretrained(tmp_path)
    expected = make.tokens(loaded, arrays, {})
    found = fmjax.load(tmp_path)
    np.testing.assert_array_equal(found.generate(**arrays), expected)
    np.testing.assert_array_equal(found.generate(**arrays, num_beams=1), make.tokens(loaded, arrays, {"num_beams": 1}))
    found.save(tmp_path / "ours")
    np.testing.assert_array_equal(make.tokens(type(reference).from_pretrained(tmp_path / "ours"), arrays, {}), expected)
    # Old folders have them in config.json.
    (tmp_path / GENERATION).unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | given | {"transformers_version": "4.20.0"}))
    np.testing.assert_array_equal(fmjax.load(tmp_path).generate(**arrays), expected)


def test_a_mask_that_is_not_given(tmp_path):
    reference = make.reference("gpt2", 4, 0.12)
    reference.save_pretrained(tmp_path)
    arrays = make.inputs("gpt2", rows=3, length=9, seed=4)
    ids = np.where(arrays["attention_mask"], arrays["input_ids"], PAD)
    ours = fmjax.load(tmp_path)
    for given in ({"pad_token_id": PAD}, {"eos_token_id": PAD, "pad_token_id": PAD}, {"eos_token_id": 7}):
        settings = {"max_new_tokens": 8} | given
        expected = make.tokens(reference, {"input_ids": ids}, settings)
        np.testing.assert_array_equal(ours.generate(input_ids=ids, **settings), expected)


def test_no_length_means_twenty_tokens(tmp_path):
    for length in (9, 39):  # as far as there are positions
        reference = make.reference("gpt2", 5, 0.12)
        reference.save_pretrained(tmp_path)
        ids = make.inputs("gpt2", rows=1, length=length, seed=4)["input_ids"]
        expected = make.tokens(reference, {"input_ids": ids}, {"pad_token_id": PAD})
        np.testing.assert_array_equal(fmjax.load(tmp_path).generate(input_ids=ids, pad_token_id=PAD), expected)


@pytest.mark.parametrize("given", make.FILTERS)
def test_what_is_sampled_from(given, tmp_path):
    """The distribution of the first token is that of the reference's own filters."""
    import jax.numpy as jnp

    from fmjax.decoding.logits import Place, process
    from fmjax.decoding.settings import merge

    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (4, 61)).astype(np.float32)
    history = rng.integers(0, 61, (4, 9))
    config = transformers.GenerationConfig(do_sample=True, **given)
    reference = make.reference("gpt2", 1, 0.3)
    config, _ = reference._prepare_generation_config(config)
    reference._prepare_special_tokens(config)
    processors = reference._get_logits_processor(config, input_ids_seq_length=9)
    expected = processors(torch.from_numpy(history), torch.from_numpy(logits.copy())).numpy()
    place = Place(9, 0, 20, 0, 9)
    found = process(jnp.array(logits), jnp.pad(jnp.array(history), ((0, 0), (0, 20)), constant_values=-1), place,
                    merge({"do_sample": True}, given))  # fmt: skip
    np.testing.assert_array_equal(np.isinf(found), np.isinf(expected))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
