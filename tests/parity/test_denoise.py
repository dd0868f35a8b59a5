"""A BART that was pretrained here, read by the reference: its outputs, and what it writes for a text with a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.processors import using

import fmjax
from fmjax.config import apply_overrides, load_config, to_dict
from fmjax.train.loop import train

torch = pytest.importorskip("torch", reason="the reference is not installed: pip install .[parity]")
transformers = pytest.importorskip("transformers", reason="the reference is not installed: pip install .[parity]")

pytestmark = pytest.mark.optimized

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bart_denoise.py"
TEXTS = ["The dog sleeps. It dreams of walks.", "A<mask> of numbers.", "Is<mask> so? No. It is<mask>."]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run of a few steps, and the folder that it is saved in."""
    folder = tmp_path_factory.mktemp("bart")
    (folder / "train.txt").write_text("\n\n".join(f"{text.replace('<mask>', ' row')} {n}." for n in range(30) for text in TEXTS))
    config = load_config(f"{CONFIG}:tiny")
    given = {"data.files.train": folder / "train.txt", "data.vocab_size": 300, "train.steps": 4, "optim.learning_rate": 0.05}
    apply_overrides(config, [(key, str(value)) for key, value in given.items()])
    train(to_dict(config), folder / "run")
    ours = fmjax.load(folder / "run")
    ours.save(folder / "saved")
    return ours, folder / "saved"


def test_the_reference_reads_what_was_trained(exported):
    ours, folder = exported
    theirs, found = transformers.BartForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    inputs = ours.task.inputs(TEXTS, using(ours.tokenizer), 64, str)
    assert all(np.array_equal(inputs[name], batch[name].numpy()) for name in ("input_ids", "attention_mask"))

    target = tokenizer([TEXTS[0]] * 3, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = theirs.eval()(**batch, labels=target)
    fed = np.concatenate([np.full((3, 1), tokenizer.eos_token_id), target.numpy()[:, :-1]], axis=1)
    logits = np.asarray(ours.apply(**inputs, decoder_input_ids=fed)["logits"])
    assert np.abs(logits - expected.logits.numpy()).max() < 1e-4 and np.ptp(logits) > 0.1


def test_texts_are_written_as_the_reference_does(exported):
    ours, folder = exported
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = transformers.BartForConditionalGeneration.from_pretrained(folder).eval()
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"max_new_tokens": 12, "no_repeat_ngram_size": 1}  # a model of four steps would repeat itself
    made = theirs.generate(**batch, **settings)
    expected = [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    inputs = {name: array.numpy() for name, array in batch.items()}
    written = fmjax.load(folder).generate(**inputs, **settings)
    assert len(set(written[0].tolist())) > 9
    assert written.tolist() == made[:, : written.shape[1]].tolist()
    assert [ours.tokenizer.written(row[1:]).strip() for row in written] == expected
