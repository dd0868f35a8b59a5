"""Facts about training data: counts of labels and baselines, texts that are cut, and a task's own."""

from __future__ import annotations

import numpy as np
import pytest
from support.processors import using
from support.sources import MemoryRecords

from fmjax.contracts import Fact, Processors, Task
from fmjax.data.tokenizers.tokenizer import train_tokenizer
from fmjax.tasks import choice, classify, facts, seq2seq, tag


def test_shares_in_words():
    words = [facts.percent(share) for share in (0, 0.0002, 0.004, 0.0994, 0.0996, 0.31, 1)]
    assert words == ["0 %", "< 0.1 %", "0.4 %", "9.9 %", "10 %", "31 %", "100 %"]


def test_labels_with_counts_and_the_majority_baseline():
    fact = facts.class_fact(("no", "yes"), np.array([0, 1, 1, 1]))
    assert fact.text == "2: no 1 (25 %), yes 3 (75 %); majority baseline: 75 % accuracy"
    assert fact.values == {"counts": {"no": 1, "yes": 3}, "majority": "yes", "majority_accuracy": 0.75}
    many = facts.class_fact([f"l{number}" for number in range(12)], np.repeat(np.arange(12), np.arange(1, 13)))
    assert many.text.startswith("12: l11 12 (15 %), l10 11 (14 %)") and ", and 4 more; " in many.text


def test_several_labels_and_numbers():
    present = np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]], np.float32)
    fact = facts.several_fact(("blue", "green", "red"), present, 'separated by ","')
    assert fact.text == '3: blue 1 (25 %), green 1 (25 %), red 2 (50 %) of 4 records; separated by ","; 25 % have none'
    fact = facts.number_fact(np.array([1.0, 3.0], np.float32))
    assert fact.text == "numbers from 1 to 3, mean 2; baseline, the mean: mse 1"


@pytest.mark.parametrize(
    ("lengths", "text"),
    [
        ([5, 9, 10], "median 9 tokens, longest 10; none is cut at data.max_length=16"),
        ([20] * 31 + [9] * 69, "31 % are cut at data.max_length=16 (median 9 tokens, longest 20); 24 would cut less than 1 %"),
        ([500] + [30] * 150 + [9] * 50, "75 % are cut at data.max_length=16 (median 30 tokens, longest 500); 32 would cut less"),
        ([17] + [9] * 199, "0.5 % are cut at data.max_length=16 (median 9 tokens, longest 17)"),
    ],
)
def test_texts_that_are_cut_and_the_length_that_would_cut_few(lengths, text):
    fact = facts.length_fact(np.array(lengths), 16)
    assert fact.text.startswith(text) and fact.values["longest"] == max(lengths)
    assert np.mean(np.array(lengths) > fact.values["rarely_cut"]) < 0.01


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sees a dog", "a bird and the fish"], "word", 40)


def of(task: Task, records: list[dict], tokenizer, length: int = 8) -> list[Fact]:
    source, processors = MemoryRecords(records), using(tokenizer)
    examples = task.examples(source, processors, length, train=True)
    return task.facts(source, [examples], processors, length)


def test_facts_of_tasks(tokenizer):
    special = tokenizer.special_count()
    texts = ["the cat", "a dog and the fish and the bird"]
    records = [{"text": text, "label": label} for text, label in zip(texts, "ab", strict=True)]
    labels, lengths = of(classify.Task(labels=("a", "b"), overlong="truncate"), records, tokenizer)
    assert labels.values["counts"] == {"a": 1, "b": 1}
    assert lengths.values | {"cut": 0.5, "longest": 8 + special, "limit": 8} == lengths.values
    words = [{"tokens": text.split(), "tags": ["O"] * len(text.split())} for text in texts]
    tags, lengths = of(tag.Task(labels=("O",), overlong="truncate"), words, tokenizer)
    assert tags.name == "tags" and tags.values["counts"] == {"O": 10} and lengths.values["longest"] == 8 + special
    chosen = [{"context": "the cat", "endings": ["sees", "a dog and"], "label": 1}]
    endings, lengths = of(choice.Task(choices=2), chosen, tokenizer, 16)
    assert endings.values["counts"] == {"0": 0, "1": 1}
    assert lengths.values["longest"] == 5 + tokenizer.special_count(pair=True)
    pairs = [{"source": text, "target": "a dog"} for text in texts]
    sources, targets = of(seq2seq.Task(target_length=8, overlong="truncate"), pairs, tokenizer)
    assert (sources.name, targets.name) == ("sources", "targets") and sources.values["cut"] == 0.5
    rows = seq2seq.Task(target_length=8).cut(["a dog"], tokenizer, 8, str, target=True)
    assert targets.values["longest"] == rows[0].size and "task.target_length=8" in targets.text


def test_a_task_that_says_nothing_has_no_facts():
    assert Task().facts(MemoryRecords(), [], Processors(), 8) == []
