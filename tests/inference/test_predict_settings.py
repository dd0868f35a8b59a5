"""Settings of generation given to `predict` and `generate`: what they mean, what they change, what is refused."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path

import numpy as np
import pytest
from support.processors import using

from fmjax import tasks
from fmjax.config.json_files import read_json, write_json
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.errors import UserError
from fmjax.inference.convert import write_run
from fmjax.inference.load import load
from fmjax.inference.predicting import chosen, generation_settings
from fmjax.inference.pretrained import Pretrained

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def model() -> Pretrained:
    """A GPT-2 that continues texts of letters by its likeliest tokens."""
    letters = train_tokenizer([(string.ascii_letters + string.digits)[:61] * 9], "char", 61, lowercase=False)
    task = tasks.make({"name": "clm", "rows": "offset", "max_new_tokens": 4})
    loaded = load(GOLDEN / "generation" / "gpt2")
    return dataclasses.replace(loaded, processors=using(letters), task=task, config={"data": {"max_length": 30}})


def test_settings_override_those_of_the_run(model):
    ids = np.stack(model.tokenizer.encode_batch(["abc", "xyz"]))

    def continued(**settings) -> list[str]:
        return [model.tokenizer.written(row[3:]) for row in model.generate(input_ids=ids, **settings)]

    def predicted(**settings) -> list[str]:
        texts = [row["text"] for row in model.predict(["abc", "xyz"], **settings)]
        assert model.generate(["abc", "xyz"], **settings) == texts
        return texts

    assert predicted() == predicted(temperature=0) == continued(max_new_tokens=4)
    assert predicted(max_new_tokens=7) == continued(max_new_tokens=7)
    assert predicted(num_beams=3) == continued(max_new_tokens=4, num_beams=3)
    drawn = predicted(temperature=5.0, seed=3)
    assert drawn == continued(max_new_tokens=4, temperature=5.0, do_sample=True, top_k=0, seed=3)
    assert drawn != predicted(temperature=5.0) == predicted(temperature=5.0, seed=0)
    assert predicted(top_k=1) == predicted()
    assert model.generate("abc") == predicted()[0]


def test_what_settings_mean():
    assert chosen({"temperature": 0.5, "seed": None}, {}) == {
        "temperature": 0.5, "do_sample": True, "top_k": 0, "num_beams": 1
    }  # fmt: skip
    assert chosen({"top_p": 0.5}, {"top_k": 7, "num_beams": 4})["top_k"] == 7
    assert chosen({"temperature": 0, "max_new_tokens": 3}, {}) == {"max_new_tokens": 3, "do_sample": False}
    assert chosen({"num_beams": 4}, {}) == {"num_beams": 4, "do_sample": False}
    assert chosen({"do_sample": True, "temperature": 2.0}, {}) == {"do_sample": True, "temperature": 2.0}
    assert generation_settings([{"do_sample": True, "temperature": 0.6}], {"temperature": 0}, None).do_sample is False
    assert generation_settings([{"num_beams": 4}], {"temperature": 0.7}, None).num_beams == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 3}, "seed=3 has no effect, as nothing is sampled; set a temperature too"),
        ({"temperature": 1.0, "seed": -1}, "seed=-1: must be a whole number from 0 to 4294967295"),
        ({"temperature": 0, "top_p": 0.5}, "temperature=0 always takes the most likely token, so top_p has no effect"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a number above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be a number from 0 to 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number, 1 or more"),
        ({"temperature": 1.0, "num_beams": 2}, "do_sample=true with num_beams=2 is not supported"),
        ({"max_new_token": 3}, r'"max_new_token" is not a generation setting \(did you mean "max_new_tokens"\?\)'),
        ({"num_return_sequences": 2, "temperature": 1.0}, "num_return_sequences=2: predict gives one answer per example"),
    ],
)
def test_settings_that_do_not_fit(model, settings, message):
    with pytest.raises(UserError, match=message):
        model.predict(["abc"], **settings)


def test_settings_where_nothing_is_generated(tmp_path):
    letters = train_tokenizer([string.ascii_lowercase * 9], "char", 40, lowercase=False)
    classifier = dataclasses.replace(load(GOLDEN / "bert_classify"), processors=using(letters))
    for settings in ({"max_new_tokens": 3}, {"seed": 0}):
        with pytest.raises(UserError, match=f"{next(iter(settings))} has no effect, as this model generates no text"):
            classifier.predict(["abc"], **settings)
    with pytest.raises(UserError, match="has no language-model head"):
        classifier.generate("abc")


def test_prompts_that_are_too_long_are_named(model):
    message = r"example 1: 25 tokens and 30 new ones exceed the 48 positions of the model; shorten the prompt"
    with pytest.raises(UserError, match=message):
        model.predict(["abc", "a" * 25, "xyz"], max_new_tokens=30)
    with pytest.raises(UserError, match=r"example 1: has 31 tokens, more than the 30 that this model reads; shorten it"):
        model.predict(["abc", "a" * 31])
    found = model.predictor((), None, {}).answers_or_errors(["abc", "a" * 31, "xyz"], "row {}".format)
    assert [found[0], found[2]] == model.predict(["abc", "xyz"])
    assert str(found[1]) == "row 1: has 31 tokens, more than the 30 that this model reads; shorten it"


def test_rotary_models_have_a_limit_too(tmp_path):
    letters = train_tokenizer([string.ascii_lowercase * 9], "char", 40, lowercase=False)
    llama = dataclasses.replace(load(GOLDEN / "decoders" / "llama_lm"), processors=using(letters))
    for given, message in (
        ("a" * 8, "example 0: 8 tokens and 64 new ones exceed the 40 positions of the model"),
        ("a" * 41, "example 0: has 41 tokens, more than the 40 that this model reads"),
    ):
        with pytest.raises(UserError, match=message):
            llama.predict([given])
    with pytest.raises(UserError, match="3 tokens and 39 new ones exceed the 40 positions of the model"):
        llama.generate(input_ids=[[1, 2, 3]], max_new_tokens=39)
    # A run reads what it was trained on, whatever its model was meant for.
    write_run(llama, tmp_path)
    config = read_json(tmp_path / "config.json")
    assert config["data"]["max_length"] == 40
    write_json(tmp_path / "config.json", config | {"data": config["data"] | {"max_length": 64}})
    assert load(tmp_path).model.settings.context == 64 and load(tmp_path)._longest() == 64


def test_bad_examples_shift_no_draws(model):
    drawn = model.predict(["abc"] * 5, temperature=5.0)
    found = model.predictor((), None, {"temperature": 5.0}).answers_or_errors(["abc", 5, "abc", None, "abc"], "row {}".format)
    assert [found[0], found[2], found[4]] == [drawn[0], drawn[2], drawn[4]]


def test_lengths_that_count_the_prompt_count_each_by_itself(model):
    folder = dataclasses.replace(model, task=None, generation={"max_length": 8}, config={})
    together = folder.predict(["abc", "abcdef"])
    assert together == [*folder.predict(["abc"]), *folder.predict(["abcdef"])]
    assert all(len(row["text"]) <= most for row, most in zip(together, (5, 2), strict=True))


def test_prompts_are_texts(model):
    for wrong, message in (
        (np.zeros((1, 3), int), r"prompt 0: is ndarray, not text; pass texts, or token ids as input_ids="),
        (["a", 5], "prompt 1: is int, not text"),
    ):
        with pytest.raises(UserError, match=message):
            model.generate(wrong)
    with pytest.raises(UserError, match="prompts and input_ids were both given"):
        model.generate("a", input_ids=[[1]])
    with pytest.raises(UserError, match="return_scores=True needs token ids"):
        model.generate("a", return_scores=True)
