"""Generation against tokens of the reference, mutations that the comparison must notice, search, sampling, and refusals.

What depends on no family is tested with a toy, whose state is a fading sum of embeddings: its tokens are a few lines of numpy.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmjax.decoding import beam, logits, loop, prompts
from fmjax.decoding.logits import NONE, Place, process
from fmjax.decoding.settings import Generation, merge
from fmjax.errors import UserError
from fmjax.inference.load import load
from fmjax.inference.pretrained import Pretrained

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("gpt2", "t5_gated", "marian")
BEGIN = {"gpt2": 9, "t5_gated": 1, "marian": 1}  # columns before the new tokens: the prompts, or what a decoder begins with
CASES = [(family, number) for family in FAMILIES for number in range(13)]
PLAIN = 0  # the number of the case that is greedy search without other settings
QUICK = [("gpt2", PLAIN), ("gpt2", 5), ("t5_gated", PLAIN), ("marian", 4)]

DECODE = loop.decode


def recompiled() -> Any:
    """Returns the compiled function of generation anew, with nothing compiled yet: that belongs to the partial."""
    return jax.jit(functools.partial(DECODE.__wrapped__), static_argnames=loop.STATIC)


@pytest.fixture(scope="module", autouse=True)
def fresh_decode():
    """What other tests compiled is not used, nor the other way round."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "decode", recompiled())
        yield


@functools.cache
def golden(family: str) -> tuple[Pretrained, dict[str, np.ndarray], list[tuple[dict[str, Any], np.ndarray]]]:
    """Returns a model, its prompts, and cases: settings and the reference's tokens, of which the prompts' are left out."""
    folder = GOLDEN / "generation" / family
    stored = json.loads((folder / "expected.json").read_text())
    inputs = {name: np.array(array) for name, array in stored["inputs"].items()}
    return load(folder), inputs, [(case, np.array(tokens)[:, BEGIN[family] :]) for case, tokens in stored["cases"]]


def new(family: str, number: int, **changed: Any) -> np.ndarray:
    """Returns the new tokens of a case, some inputs or settings changed."""
    model, inputs, cases = golden(family)
    return model.generate(**inputs | cases[number][0] | changed)[:, BEGIN[family] :]


def same(family: str, number: int, **changed: Any) -> bool:
    return np.array_equal(new(family, number, **changed), golden(family)[2][number][1])


def some(values: Sequence[Any], quick: Sequence[Any]) -> list[Any]:
    """Returns parameters of a test, of which the quick ones are run always."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.full) for value in values]


@pytest.mark.parametrize("case", some(CASES, QUICK))
def test_tokens_are_those_of_the_reference(case):
    assert same(*case)


@functools.cache
def golden_scores(family: str) -> tuple[dict[str, np.ndarray], list[list[Any]]]:
    """Returns inputs with decoder prompts, and cases: settings, the reference's tokens, log-probabilities and scores."""
    stored = json.loads((GOLDEN / "generation" / family / "scores.json").read_text())
    return {name: np.array(array) for name, array in stored["inputs"].items()}, stored["cases"]


SCORED = [(family, number) for family in FAMILIES for number in range(6)]


@pytest.mark.parametrize("case", some(SCORED, [("gpt2", 2), ("t5_gated", 1), ("marian", 3)]))
def test_prompts_of_decoders_and_scores_are_those_of_the_reference(case):
    family, number = case
    inputs, cases = golden_scores(family)
    how, tokens, log_probs, scores = cases[number]
    found = golden(family)[0].generate(**inputs, **how, return_scores=True)
    np.testing.assert_array_equal(found.sequences, tokens)
    np.testing.assert_allclose(found.log_probs, log_probs, rtol=1e-4)
    np.testing.assert_allclose(found.sequences_scores, scores, rtol=1e-4)
    assert found.log_probs.dtype == found.sequences_scores.dtype == np.float32


def spread(ids: np.ndarray, starts: Sequence[int], width: int) -> dict[str, np.ndarray]:
    """Returns prompts that begin at some columns, with their mask."""
    found = {"decoder_input_ids": np.full((len(ids), width), 7), "decoder_attention_mask": np.zeros((len(ids), width), int)}
    for row, start in enumerate(starts):
        places = slice(start, start + ids.shape[1])
        found["decoder_input_ids"][row, places], found["decoder_attention_mask"][row, places] = ids[row], 1
    return found


PADDED = [(family, number) for family in ("t5_gated", "marian") for number in (PLAIN, 3)]


@pytest.mark.parametrize("case", some(PADDED, [("marian", 3)]))
def test_padding_of_a_decoder_prompt_may_stand_anywhere(case):
    family, number = case
    inputs, cases = golden_scores(family)
    how, tokens, log_probs, _ = cases[number]
    padded = inputs | spread(inputs["decoder_input_ids"], (0, 1, 3), 7)
    found = golden(family)[0].generate(**padded, **how, return_scores=True)
    np.testing.assert_array_equal(found.sequences[:, 7:], np.array(tokens)[:, 4:])
    np.testing.assert_allclose(found.log_probs, log_probs, rtol=1e-4)


@pytest.mark.parametrize("family", some(FAMILIES[1:], FAMILIES[2:]))
def test_prompts_of_different_lengths_without_a_cache(family):
    """Each row is what the whole model says step by step, on the row's own prompt without padding."""
    model, (inputs, cases) = golden(family)[0], golden_scores(family)
    ids, how, room = inputs["decoder_input_ids"], cases[PLAIN][0], 12
    lengths = (4, 2, 3)
    kept = np.arange(4) >= 4 - np.array(lengths)[:, None]
    ids = np.where(kept, np.concatenate([ids[:1], np.roll(ids[1:2], 2), np.roll(ids[2:], 1)]), 7)
    found = model.generate(**inputs | {"decoder_input_ids": ids, "decoder_attention_mask": kept}, **how)[:, 4:]
    step = jax.jit(lambda params, batch: model.model.apply({"params": params}, batch)["lm"])
    for row, length in enumerate(lengths):
        made = ids[row, 4 - length :].tolist()
        batch = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        while len(made) < length + room and not set(made[length:]) & set(how["eos_token_id"]):
            padded = np.zeros((1, 4 + room), int)
            padded[0, : len(made)] = made
            batch = model.checked_batch(batch | {"decoder_input_ids": padded})
            made.append(int(step(model.params, batch)[0, len(made) - 1].argmax()))
        assert found[row, : len(made) - length].tolist() == made[length:]
        assert (found[row, len(made) - length :] == 60).all()


def test_a_start_token_is_put_before_prompts_without_one():
    inputs, cases = golden_scores("marian")
    how, tokens, _, _ = cases[PLAIN]
    ids = inputs["decoder_input_ids"]
    assert (ids[:, 0] == 59).all()
    generate = golden("marian")[0].generate
    np.testing.assert_array_equal(generate(**inputs | {"decoder_input_ids": ids[:, 1:]}, **how), tokens)
    masked = spread(ids[:, 1:], (1, 0, 2), 5)
    found = generate(**inputs | masked, **how)
    assert (found[:, 0] == 59).all()
    np.testing.assert_array_equal(found[:, 6:], np.array(tokens)[:, 4:])
    # One row that begins with it is enough for the reference to leave all as they are.
    mixed = np.concatenate([ids[:1], ids[1:, [1, 0, 2, 3]]])
    found = generate(**inputs | {"decoder_input_ids": mixed}, **how)
    np.testing.assert_array_equal(found[:, :4], mixed)
    np.testing.assert_array_equal(found[0], tokens[0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"decoder_attention_mask": np.eye(3, 4)[::-1] * [[1], [0], [1]]}, "decoder_attention_mask: row 1 has no token left"),
        ({"decoder_input_ids": np.full((3, 4), 61)}, "decoder_input_ids: 61 is out of range"),
        ({"decoder_input_ids": np.full((2, 4), 59)}, "decoder_input_ids: has 2 rows"),
        ({"decoder_attention_mask": np.ones((3, 5))}, "decoder_attention_mask: has shape (3, 5), but decoder_input_ids (3, 4)"),
        ({"max_length": 4, "max_new_tokens": None}, "max_length=4 leaves no room after the 4 tokens"),
        ({"max_new_tokens": 46}, "4 tokens and 46 new ones exceed the 48 positions"),
    ],
)
def test_wrong_prompts_of_decoders_are_named(changed, message):
    inputs, cases = golden_scores("marian")
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        golden("marian")[0].generate(**{**inputs, **cases[PLAIN][0], **changed})
    assert "\n" not in str(refused.value)


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "number", "changed"),
    [("gpt2", 2, {"early_stopping": False}), ("gpt2", 4, {"early_stopping": False}), ("t5_gated", 2, {"num_beams": 3}),
     ("gpt2", 2, {"length_penalty": 1.0}), ("gpt2", 3, {"length_penalty": 1.0}), ("gpt2", 5, {"length_penalty": 1.0}),
     ("gpt2", 6, {"repetition_penalty": 1.0}), ("t5_gated", 8, {"repetition_penalty": 1.0}), ("gpt2", 5, {"pad_token_id": 60}),
     ("gpt2", 8, {"min_new_tokens": 0}), ("marian", 9, {"min_length": 0}), ("t5_gated", 7, {"no_repeat_ngram_size": 3}),
     ("gpt2", 9, {"bad_words_ids": []}), ("t5_gated", 12, {"forced_bos_token_id": 9}), ("gpt2", 10, {"forced_eos_token_id": []}),
     ("t5_gated", 11, {"suppress_tokens": []}), ("gpt2", 11, {"begin_suppress_tokens": []}),
     ("marian", 11, {"renormalize_logits": False})],
)  # fmt: skip
def test_settings_matter(family, number, changed):
    assert not same(family, number, **changed)


@pytest.mark.full
@pytest.mark.parametrize(
    ("number", "module", "name", "wrong"),
    [
        (2, loop, "chosen", lambda cache, parents: cache),
        (1, beam, "may_improve", lambda running, *_: jnp.ones(running.shape[0], bool)),
        (1, beam, "NEVER", -1.0),
        (1, beam, "unfinished", lambda beams, settings: beams.improvable.all()),
        (6, loop, "NONE", 42),  # padding before a prompt taken for a token
        (9, logits, "token_mask", lambda ids, size: np.zeros((1, size), bool)),
    ],
)
def test_parts_matter(monkeypatch, number, module, name, wrong):
    monkeypatch.setattr(module, name, wrong)
    monkeypatch.setattr(loop, "decode", recompiled())
    assert not same("gpt2", number)


@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:2]))
def test_masks_matter_and_not_what_they_hide(family):
    inputs = golden(family)[1]
    assert not same(family, PLAIN, attention_mask=np.ones_like(inputs["attention_mask"]))
    assert same(family, PLAIN, input_ids=np.where(inputs["attention_mask"], inputs["input_ids"], 7))


def test_sides_of_padding_and_masks_that_are_not_given():
    model, inputs, cases = golden("gpt2")
    how, expected = cases[PLAIN]
    order = np.argsort(1 - inputs["attention_mask"], axis=1, kind="stable")
    right = {name: np.take_along_axis(array, order, axis=1) for name, array in inputs.items()}
    for arrays in (right, {"input_ids": right["input_ids"]}, {"input_ids": inputs["input_ids"]}):
        found = model.generate(**arrays, **how)
        np.testing.assert_array_equal(found, np.concatenate([arrays["input_ids"], expected], axis=1))


def ended(family: str) -> list[list[int]]:
    """Returns the new tokens of the plain case's rows, each as far as its end."""
    case, tokens = golden(family)[2][PLAIN]
    ends = [np.isin(row, case["eos_token_id"]) for row in tokens]
    return [row[: end.argmax() + 1 if end.any() else None].tolist() for row, end in zip(tokens, ends, strict=True)]


@pytest.mark.parametrize("family", some(FAMILIES, FAMILIES[:2]))
def test_a_cache_changes_nothing(family):
    """The whole text at once, without a cache, has each next token as its likeliest."""
    model, inputs, _ = golden(family)
    tokens = new(family, PLAIN)
    if family == "gpt2":
        assert tokens.shape[1] == max(map(len, ended(family))) < 18  # as long as the longest
        text = np.concatenate([inputs["input_ids"], tokens], axis=1)
        mask = np.pad(inputs["attention_mask"], ((0, 0), (0, tokens.shape[1])), constant_values=1)
        inputs = {"input_ids": text, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}
    else:
        inputs = {**inputs, "decoder_input_ids": np.pad(tokens, ((0, 0), (1, 0)), constant_values=model.model.settings.start_id)}
    batch = model.checked_batch(inputs)
    logits = jax.jit(lambda params: model.model.apply({"params": params}, batch)["lm"])(model.params)
    for row, likeliest in zip(ended(family), np.asarray(logits).argmax(axis=-1)[:, BEGIN[family] - 1 :], strict=True):
        assert likeliest[: len(row)].tolist() == row


@pytest.mark.full
def test_a_row_alone_without_padding_is_the_same():
    model, inputs, cases = golden("gpt2")
    for row in (1, 2):
        ids = inputs["input_ids"][row, inputs["attention_mask"][row] == 1]
        assert model.generate(input_ids=ids[None], **cases[PLAIN][0])[0].tolist() == [*ids, *ended("gpt2")[row]]


WORDS = 11
TRACED: list[str] = []


class Toy(nn.Module):
    """A language model with one vector for a state: half the last one, and the embedding of the token."""

    words: int = WORDS
    settings = SimpleNamespace(positions=0)

    def setup(self) -> None:
        self.table = self.param("table", nn.initializers.normal(1.0), (self.words, 6))
        self.out = self.param("out", nn.initializers.normal(1.0), (6, self.words))

    def empty_cache(self, rows: int, length: int) -> dict[str, Any]:
        return {"index": jnp.int32(0), "layers": ({"state": jnp.zeros((rows, 6))},)}

    def decode(self, batch: dict[str, jax.Array], memory: None, cache: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        TRACED.append("decode")
        real = batch.get("attention_mask", jnp.ones_like(batch["input_ids"])).astype(jnp.float32)
        behind = jnp.cumsum(real[:, ::-1], axis=1)[:, ::-1] - real
        state = jnp.einsum("bl,bld->bd", real * 0.5**behind, self.table[batch["input_ids"]])
        state = state + cache["layers"][0]["state"] * 0.5 ** real.sum(axis=1, keepdims=True)
        return {"lm": (state @ self.out)[:, None]}, {**cache, "layers": ({"state": state},)}


class Listener(Toy):
    """An encoder-decoder: the frames of its input that are not masked are added to the toy's state."""

    encoder_inputs = ("input_features", "attention_mask")
    start_id: int | None = None

    def encode(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        assert set(batch) == {*self.encoder_inputs}
        return {"hidden": (batch["input_features"] * batch["attention_mask"][:, :, None]).sum(axis=1)}

    def decode(self, batch: dict[str, jax.Array], memory: Any, cache: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        assert all(name.startswith("decoder_") or name == "predicted_positions" for name in batch)
        features, cache = super().decode({name.removeprefix("decoder_"): array for name, array in batch.items()}, None, cache)
        return {"lm": features["lm"] + (memory["hidden"] @ self.out)[:, None]}, cache


def drawn(words: int = WORDS, seed: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"table": rng.normal(size=(words, 6)).astype(np.float32), "out": rng.normal(size=(6, words)).astype(np.float32)}


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def logits_after(params: dict[str, np.ndarray], tokens: Sequence[int]) -> np.ndarray:
    """Returns the toy's logits [V] after some tokens."""
    fading = 0.5 ** np.arange(len(tokens))[::-1]
    return fading @ params["table"][list(tokens)].astype(float) @ params["out"]


def greedy(prompt: Sequence[int], most: int, ends: Sequence[int]) -> list[int]:
    made: list[int] = []
    while len(made) < most and not set(made) & set(ends):
        made.append(int(logits_after(drawn(), [*prompt, *made]).argmax()))
    return made


PROMPTS = ([3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7], [9])
EXPECTED = [greedy(prompt, 7, (3, 7)) for prompt in PROMPTS]
PLAINLY = {"max_new_tokens": 7, "eos_token_id": [3, 7], "pad_token_id": 10}
GREEDY = merge(PLAINLY)


def batch_of(prompts: Sequence[Sequence[int]], side: str = "left", width: int = 8) -> dict[str, np.ndarray]:
    """Returns prompts padded at a side, or at both, and between their tokens."""
    ids, mask = np.full((len(prompts), width), 10), np.zeros((len(prompts), width), bool)
    for row, prompt in enumerate(prompts):
        free = width - len(prompt)
        places = {"left": free + np.arange(len(prompt)), "right": np.arange(len(prompt))}
        places["apart"] = np.linspace(free // 3, width - 1 - free // 3, len(prompt)).astype(int)
        ids[row, places[side]], mask[row, places[side]] = prompt, True
    return {"input_ids": ids, "attention_mask": mask}


def continued(batch: Any, how: Generation, params: Any = None, seed: int = 0, toy: Any = None, first: int = 0) -> list[list[int]]:
    """Returns the toy's continuations, without what fills them up, which has to be padding."""
    return with_scores(batch, how, params, seed, toy, first, False)[0]


def with_scores(
    batch: Any, how: Generation, params: Any = None, seed: int = 0, toy: Any = None, first: int = 0, scored: bool = True
) -> tuple[list[list[int]], Any, Any]:
    """Returns the continuations, their log-probabilities and their scores."""
    found = loop.continuations(toy or Toy(), params or drawn(), batch, how, jax.random.key(seed), first, scored)
    tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
    assert (tokens[np.arange(tokens.shape[1]) >= lengths[:, None]] == how.pad).all()
    return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)], found.log_probs, found.scores


def test_rows_do_not_depend_on_padding_or_each_other():
    assert [len(row) for row in EXPECTED] == [7, 2, 7, 6]
    assert [continued(batch_of(PROMPTS, side), GREEDY) for side in ("left", "right", "apart")] == [EXPECTED] * 3
    assert [continued(batch_of([prompt]), GREEDY)[0] for prompt in PROMPTS] == EXPECTED
    # Batches on a device keep their shape.
    placed = {name: jnp.asarray(array) for name, array in batch_of(PROMPTS[:3], "right", 7).items()}
    assert continued(placed, GREEDY) == EXPECTED[:3]


FRAMES = np.random.default_rng(3).normal(size=(len(PROMPTS), 5, 6)).astype(np.float32)
HEARD = np.arange(5) < np.array([5, 2, 3, 4])[:, None]


def heard(prompts: Sequence[Sequence[int]] | None, side: str = "left") -> dict[str, np.ndarray]:
    """Returns a listener's inputs, among which the same prompts may stand."""
    batch = {"input_features": FRAMES, "attention_mask": HEARD, "labels": np.zeros((len(FRAMES), 3))}
    return batch | ({f"decoder_{name}": array for name, array in batch_of(prompts, side).items()} if prompts else {})


def slowly(row: int, tokens: Sequence[int], params: Any = None) -> np.ndarray:
    """Returns a listener's next log-probabilities [V], without a cache."""
    params = params or drawn()
    return np.log(softmax(logits_after(params, tokens) + FRAMES[row, HEARD[row]].sum(axis=0).astype(float) @ params["out"]))


def greedy_slowly(row: int, prompt: Sequence[int]) -> tuple[list[int], float]:
    """Returns a listener's likeliest continuation and its log-probability."""
    made: list[int] = []
    total = 0.0
    while len(made) < 7 and not set(made) & {3, 7}:
        steps = slowly(row, [*prompt, *made])
        made.append(int(steps.argmax()))
        total += steps[made[-1]]
    return made, total


def test_encoders_read_any_arrays_and_prompts_differ_in_length():
    expected = [greedy_slowly(row, prompt) for row, prompt in enumerate(PROMPTS)]
    assert len({tuple(made) for made, _ in expected}) == len(PROMPTS)
    for side in ("left", "right", "apart"):
        found, log_probs, scores = with_scores(heard(PROMPTS, side), GREEDY, toy=Listener())
        assert found == [made for made, _ in expected]
        np.testing.assert_allclose(log_probs, [total for _, total in expected], rtol=1e-5)
        np.testing.assert_array_equal(log_probs, scores)
    alone = {name: array[2:3] for name, array in heard(PROMPTS, "right").items()}
    assert continued(alone, GREEDY, toy=Listener()) == [expected[2][0]]
    placed = {name: jnp.asarray(array) for name, array in heard(PROMPTS).items()}
    assert continued(placed, GREEDY, toy=Listener()) == [made for made, _ in expected]
    sampled = merge(PLAINLY, {"do_sample": True, "top_k": 1})
    assert continued(heard(PROMPTS), sampled, toy=Listener()) == [made for made, _ in expected]


def test_a_decoder_without_a_prompt_begins_with_its_start_token():
    expected = [greedy_slowly(row, [2])[0] for row in range(len(PROMPTS))]
    assert continued(heard(None), GREEDY, toy=Listener(start_id=2)) == expected
    assert continued(heard([[2]] * 4), GREEDY, toy=Listener()) == expected
    tokens = np.asarray(loop.generate(Listener(start_id=2), drawn(), heard(None), GREEDY))
    assert tokens.shape == (4, 8) and (tokens[:, 0] == 2).all()
    tokens = np.asarray(loop.generate(Listener(), drawn(), heard(PROMPTS), GREEDY))
    np.testing.assert_array_equal(tokens[:, :8], batch_of(PROMPTS)["input_ids"])


def test_arrays_of_an_encoder_are_filled_up_by_rows_and_tokens_by_columns():
    inputs = {"input_features": FRAMES[:3], "attention_mask": HEARD[:3], "decoder_input_ids": np.ones((3, 9))}
    filled = prompts.fill_up(inputs, prompts.DECODER_PROMPT, 10, 12)
    assert {name: array.shape for name, array in filled.items()} == {
        "input_features": (4, 5, 6),
        "attention_mask": (4, 5),
        "decoder_input_ids": (4, 12),
        "decoder_attention_mask": (4, 12),
    }
    assert filled["decoder_input_ids"].tolist() == [[10] * 3 + [1] * 9] * 3 + [[10] * 12]
    assert filled["decoder_attention_mask"].sum(axis=1).tolist() == [9, 9, 9, 0]
    texts = {"input_ids": np.ones((3, 9)), "token_type_ids": np.ones((3, 9)), "pixel_values": np.ones((3, 3, 9, 9))}
    filled = prompts.fill_up(texts, prompts.DECODER_PROMPT, 10, 0)
    assert {name: array.shape for name, array in filled.items()} == {
        "input_ids": (4, 16),
        "attention_mask": (4, 16),
        "token_type_ids": (4, 16),
        "pixel_values": (4, 3, 9, 9),
    }
    assert filled["input_ids"][0].tolist() == [1] * 9 + [10] * 7
    assert filled["attention_mask"].sum(axis=1).tolist() == filled["token_type_ids"].sum(axis=1).tolist() == [9, 9, 9, 0]


def test_scores_are_computed_on_request_alone():
    def lowered(how: Generation, scored: bool) -> Any:
        inputs = prompts.fill_up(batch_of(PROMPTS), prompts.PROMPT, 10, 0)
        number = jnp.int32(1)
        call = loop.Call(Place(number, number, number, number, number), number, jax.random.key(0), number)
        return DECODE.lower(loop.StaticModel(Toy()), drawn(), inputs, call, how, 8, scored)

    beams = merge({"num_beams": 2, "eos_token_id": 3})
    for how in (GREEDY, beams):
        without, scored = lowered(how, False), lowered(how, True)
        assert [len(jax.tree.leaves(program.out_info)) for program in (without, scored)] == [2, 4]
    texts = [lowered(merge({"eos_token_id": 3}), scored).as_text() for scored in (False, True)]
    assert ["stablehlo.log " in text for text in texts] == [False, True]


def test_few_functions_are_compiled(monkeypatch):
    monkeypatch.setattr(loop, "decode", DECODE)

    def compilations(rows: int, width: int, **given: Any) -> int:
        before, batch = len(TRACED), batch_of([[1] * width] * rows, width=width)
        continued(batch, merge({"max_new_tokens": 8} | given), drawn(9, seed=rows), rows, Toy(words=9))
        return (len(TRACED) - before) // 2  # the prompt, and one more token

    assert compilations(3, 5) == 1
    lengths: Any = ({"max_new_tokens": 3}, {"max_length": 10}, {"min_new_tokens": 2}, {"min_length": 7})
    assert [compilations(4, 8, **given) for given in lengths] == [0] * 4
    assert [compilations(3, 1), compilations(3, 9), compilations(4, 16, max_new_tokens=2)] == [0, 1, 0]


def test_lengths_are_rounded_up_to_few():
    rounded = [prompts.padded(length) for length in range(1, 1025)]
    assert len(set(rounded)) < 40 and all(0 <= whole - n < max(8, n / 4) for n, whole in enumerate(rounded, 1))
    filled = prompts.fill_up({"input_ids": np.ones((3, 9))}, prompts.PROMPT, 0, 12)  # of 12 positions
    assert filled["attention_mask"].tolist() == [[False] * 3 + [True] * 9] * 3 + [[False] * 12]


def test_prompts_are_returned_with_their_continuations():
    batch = batch_of(PROMPTS)
    found = np.asarray(loop.generate(Toy(), drawn(), batch, GREEDY))
    assert found[:, :8].tolist() == batch["input_ids"].tolist()
    assert found[:, 8:].tolist() == [row + [10] * (7 - len(row)) for row in EXPECTED]
    model, inputs, cases = golden("t5_gated")
    how = merge(cases[PLAIN][0], {"decoder_start_token_id": 59})
    with jax.default_matmul_precision("float32"):
        found = np.asarray(loop.generate(model.model, model.params, inputs, how))
    assert (found[:, 0] == 59).all() and np.array_equal(found[:, 1:], cases[PLAIN][1])


def test_seeds_and_rows_of_samples():
    sampled = {"max_new_tokens": 7, "pad_token_id": 10, "do_sample": True, "temperature": 2.0}
    first, again, other = (continued(batch_of(PROMPTS), merge(sampled), seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    # A row's draws do not depend on how many others there are.
    assert continued(batch_of(PROMPTS[:3]), merge(sampled)) == first[:3]
    several = continued(batch_of(PROMPTS), merge(sampled, {"num_return_sequences": 3}))
    assert len({tuple(row) for row in several}) == len(several) == 12
    assert continued(batch_of(PROMPTS), merge(PLAINLY, {"do_sample": True, "top_k": 1})) == EXPECTED


@pytest.mark.parametrize("times", [1, 2])
def test_a_row_draws_by_its_number(times):
    how = merge({"max_new_tokens": 7, "pad_token_id": 10, "do_sample": True, "temperature": 2.0, "num_return_sequences": times})
    prompts = [PROMPTS[0]] * 7
    whole = continued(batch_of(prompts), how)
    assert len({tuple(row) for row in whole}) == len(whole) == 7 * times
    parts = [continued(batch_of(prompts[at : at + 3]), how, first=at) for at in (0, 3, 6)]
    assert [row for part in parts for row in part] == whole


def test_log_probabilities_are_those_of_what_is_sampled_from():
    filters = {"temperature": 1.5, "top_k": 7, "top_p": 0.9, "repetition_penalty": 1.3, "num_return_sequences": 3}
    how = merge(PLAINLY, {"do_sample": True} | filters)
    rows, log_probs, scores = with_scores(batch_of(PROMPTS), how)
    totals = []
    for number, row in enumerate(rows):
        history, total = list(PROMPTS[number // 3]), 0.0
        for token in row:
            logits = logits_after(drawn(), history)
            for seen in set(history):
                logits[seen] *= 1.3 if logits[seen] < 0 else 1 / 1.3
            total += np.log(sampled_from(logits, how)[token])
            history.append(token)
        totals.append(total)
    np.testing.assert_allclose(log_probs, totals, rtol=1e-4)
    np.testing.assert_array_equal(log_probs, scores)


def sampled_from(logits: np.ndarray, s: Generation) -> np.ndarray:
    """Returns the probabilities [V] that sampling has, by definition."""
    p = softmax(logits / s.temperature)
    order = np.argsort(-p)[: s.top_k or None]
    total = np.cumsum(p[order] / p[order].sum())
    order = order[: (total < s.top_p).sum() + 1] if s.top_p < 1 else order
    order = order[p[order] >= (s.min_p or 0) * p.max()]
    kept = np.zeros_like(p)
    kept[order] = p[order] / p[order].sum()
    return kept


def processed(logits: np.ndarray, history: Sequence[int], how: Generation, **place: int) -> np.ndarray:
    """Returns the scores [V] of one row that padding precedes."""
    columns = np.full((1, 12), NONE)
    columns[0, 8 - len(history) : 8] = history
    where = Place(**{"column": 8, "generated": 3, "most": 9, "least": 0, "prompt_length": 5} | place)
    return np.asarray(process(jnp.array(logits[None], jnp.float32), jnp.array(columns), where, how))[0]


LOGITS = st.permutations(range(WORDS)).map(lambda order: np.array(order) * 0.7 - 3)
FILTERS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.3, 1.0, 2.5]), "top_k": st.sampled_from([0, 1, 4, 9, 12]),
     "top_p": st.sampled_from([0.0, 0.3, 0.9, 1.0]), "min_p": st.sampled_from([None, 0.2])}
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(LOGITS, FILTERS)
def test_what_is_sampled_from(logits, filters):
    how = merge({"do_sample": True}, filters)
    found, expected = processed(logits, [], how), sampled_from(logits, how)
    assert (np.isinf(found) == (expected == 0)).all()
    np.testing.assert_allclose(softmax(found), expected, atol=1e-6)


def test_samples_follow_their_probabilities():
    how = merge({"max_new_tokens": 1, "do_sample": True, "temperature": 2.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1})
    expected = sampled_from(logits_after(drawn(), PROMPTS[0]), how)
    assert 2 < (expected > 0).sum() < 7
    counts = np.bincount(np.concatenate(continued(batch_of([PROMPTS[0]] * 4096), how)), minlength=WORDS)
    assert (counts[expected == 0] == 0).all() and (abs(counts / 4096 - expected) <= 5 * np.sqrt(expected / 4096)).all()


def scored(
    logits: np.ndarray, history: list[int], s: Generation, generated: int, most: int, least: int, prompt_length: int
) -> np.ndarray:
    """Returns what `process` should, one rule after the other."""
    x, size = logits.copy(), s.no_repeat_ngram_size
    for token in set(history):
        x[token] *= s.repetition_penalty if x[token] < 0 else 1 / s.repetition_penalty
    for start in range(len(history) - size + 1) if size else ():
        if history[start : start + size - 1] == history[len(history) - size + 1 :]:
            x[history[start + size - 1]] = -np.inf
    for *begun, token in s.bad_words_ids:
        if history[len(history) - len(begun) :] == begun and (begun or token not in s.eos_token_id):
            x[token] = -np.inf
    x[list(s.eos_token_id)] += -np.inf if generated < least else 0
    for forced, now in ((s.forced_bos_token_id, prompt_length + generated == 1), (s.forced_eos_token_id, generated == most - 1)):
        if now and forced not in (None, ()):
            x = np.where(np.isin(np.arange(WORDS), forced), 0, -np.inf)
    x[list(s.suppress_tokens)] = -np.inf
    if generated == (0 if s.forced_bos_token_id is None or prompt_length != 1 else 1):
        x[list(s.begin_suppress_tokens)] = -np.inf
    return x


WORD = st.integers(0, 3)
IDS = st.lists(WORD, max_size=2)
RULES = st.fixed_dictionaries(
    {"suppress_tokens": IDS, "begin_suppress_tokens": IDS, "eos_token_id": IDS, "forced_eos_token_id": IDS,
     "forced_bos_token_id": st.none() | WORD, "bad_words_ids": st.lists(st.lists(WORD, min_size=1, max_size=3), max_size=2),
     "repetition_penalty": st.sampled_from([1.0, 1.4, 0.5]), "no_repeat_ngram_size": WORD}
)  # fmt: skip


@settings(deadline=None, max_examples=50)
@given(LOGITS, st.lists(WORD, max_size=8), RULES, WORD, WORD, st.sampled_from([1, 5]))
def test_scores_follow_the_rules(logits, history, rules, generated, least, width):
    how, place = merge(rules), {"generated": generated, "most": 4, "least": least, "prompt_length": width}
    np.testing.assert_allclose(processed(logits, history, how, **place), scored(logits, history, how, **place), rtol=1e-5)


@pytest.mark.parametrize("toy", [Toy(words=4), Listener(words=4)], ids=["decoder", "encoder and decoder"])
@pytest.mark.parametrize("penalty", [1.5, -1.0])
def test_enough_beams_find_all_that_there_is(penalty, toy):
    params, ends, prompts = drawn(4), (1, 3), [[0, 2, 1], [3], [2, 2], [1, 0]]
    how = {"max_new_tokens": 3, "num_beams": 22, "num_return_sequences": 22, "length_penalty": penalty, "eos_token_id": ends}
    listens = isinstance(toy, Listener)
    batch = heard(prompts) if listens else batch_of(prompts)
    found, log_probs, scores = with_scores(batch, merge(how), params, toy=toy)
    for row, prompt in enumerate(prompts):
        sums = {}
        for made in itertools.chain(*(itertools.product(range(4), repeat=count) for count in (1, 2, 3))):
            if not set(made[:-1]) & set(ends) and (made[-1] in ends or len(made) == 3):
                before = [[*prompt, *made[:at]] for at in range(len(made))]
                steps = [slowly(row, b, params) if listens else np.log(softmax(logits_after(params, b))) for b in before]
                sums[made] = sum(step[token] for step, token in zip(steps, made, strict=True))
        ranked = sorted(sums, key=lambda made: -sums[made] / len(made) ** penalty)
        rows = slice(22 * row, 22 * row + 22)
        assert found[rows] == [list(made) for made in ranked]
        np.testing.assert_allclose(log_probs[rows], [sums[made] for made in ranked], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(scores[rows], [sums[made] / len(made) ** penalty for made in ranked], rtol=1e-4, atol=1e-6)


WRONG: Any = {
    "must be a whole number, 1 or more": [("max_new_tokens", 0), ("max_length", 2.0), ("num_beams", True)],
    "must be a whole number, 0 or more": [("top_k", -1), ("min_length", "2"), ("pad_token_id", -1)],
    "must be token ids": [("eos_token_id", [3, -1]), ("suppress_tokens", 1.5), ("suppress_tokens", "ab")],
    "must be lists of token ids, one per word": [("bad_words_ids", [3]), ("bad_words_ids", [[]]), ("bad_words_ids", 3)],
    "must be a number above 0": [("temperature", 0), ("temperature", "hot"), ("repetition_penalty", float("nan"))],
    "must be a number from 0 to 1": [("top_p", 1.5), ("min_p", -0.1)],
    "must be a number": [("length_penalty", float("inf")), ("length_penalty", "long")],
    'must be true, false or "never"': [("early_stopping", "always"), ("early_stopping", 1)],
    "must be true or false": [("do_sample", 1), ("renormalize_logits", "no")],
}
REFUSED = [({name: value}, f"{name}={json.dumps(value)} {needs}; correct it") for needs in WRONG for name, value in WRONG[needs]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        *REFUSED,
        ({"num_beam": 3}, '"num_beam" is not a generation setting (did you mean "num_beams"?); choose from max_new_'),
        ({"pixel_values": 0}, '"pixel_values" is not a generation setting'),
        ({"typical_p": 0.9, "penalty_alpha": 0.6}, "not supported: typical_p=0.9 (only 1.0 is), penalty_alpha=0.6; leave it out"),
        ({"do_sample": True, "num_beams": 2}, "do_sample=true with num_beams=2 is not supported"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 needs do_sample=true or num_beams of at least 3"),
        ({"max_new_tokens": 41}, "9 tokens and 41 new ones exceed the 48 positions of the model"),
        ({"max_length": 9}, "max_length=9 leaves no room after the 9 tokens of the prompt; pass max_new_tokens"),
    ],
)
def test_settings_are_refused_by_name(given, message):
    model, inputs, _ = golden("gpt2")
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        model.generate(**inputs, **given)
    assert "\n" not in str(refused.value)


def test_models_that_do_not_generate_and_tokens_that_they_lack():
    with pytest.raises(UserError, match="BertForSequenceClassification has no language-model head"):
        load(GOLDEN / "bert_classify").generate(input_ids=[[1]])
    with pytest.raises(UserError, match="bad_words_ids: 11 is out of range; the vocabulary has 11 entries, 0 to 10"):
        continued(batch_of(PROMPTS), merge({"bad_words_ids": [[3, 11]]}))
    with pytest.raises(UserError, match="the decoder's start token is unknown; pass decoder_start_token_id"):
        prompts.start_id(Listener(), GREEDY)
    with pytest.raises(UserError, match="Bert has no decoder, so it cannot generate text"):
        loop.as_generator(load(GOLDEN / "bert_classify").model)


def test_numbers_of_numpy_and_later_settings_that_win():
    how = merge({"eos_token_id": np.int64(3), "bad_words_ids": np.array([[1, 2]]), "temperature": np.float64(0.5)})
    assert how == merge({"eos_token_id": [3], "bad_words_ids": [[1, 2]], "temperature": 0.5}) and hash(how)
    assert merge({"max_new_tokens": 5, "min_new_tokens": 2}, {"max_length": 30, "min_length": 12}).limits(10) == (20, 2)
    assert merge({"max_new_tokens": 5, "max_length": 30}, {"use_cache": False, "top_k": None}).limits(10) == (5, 0)
    assert [merge({}).limits(10, positions) for positions in (0, 48, 25)] == [(20, 0), (20, 0), (15, 0)]
    assert merge({"max_new_tokens": 40}).limits(9, 48) == (40, 0)  # the last one is not read
