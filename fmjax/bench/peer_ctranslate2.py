"""A second peer of the decoding workloads: CTranslate2, in fp32. Only this file imports it.

    python -m fmjax.bench.peer_ctranslate2 THREADS

Its own converter, which needs transformers and torch, reads the same weights. A token's text is its
number."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fmjax.bench import worker

if __name__ == "__main__":  # before a library starts its threads
    worker.pin(int(sys.argv[1]))

import ctranslate2
from ctranslate2.converters import TransformersConverter

from fmjax.bench.workloads import Result


class Converter(TransformersConverter):
    """Converts a folder that has weights and no tokenizer."""

    def load_model(self, model_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
        model = super().load_model(model_class, model_name_or_path, **kwargs)
        self.config = model.config
        return model

    def load_tokenizer(self, tokenizer_class: Any, model_name_or_path: str, **kwargs: Any) -> Any:
        """Returns what CTranslate2's loaders of GPT-2 and T5 read of a tokenizer."""
        end, pad = (
            str(number or 0) for number in (self.config.eos_token_id, self.config.pad_token_id)
        )
        return SimpleNamespace(
            get_vocab=lambda: {str(number): number for number in range(self.config.vocab_size)},
            convert_ids_to_tokens=str,
            **{"bos_token": pad, "pad_token": pad, "unk_token": pad, "eos_token": end},
        )


class CTranslate2:
    """One job at a time."""

    def __init__(self, threads: int) -> None:
        self.options = {"device": "cpu", "compute_type": "float32", "intra_threads": threads}

    def open(self, folder: str, phase: str) -> Result:
        """Converts and loads the model of a job."""
        self.job, batches = worker.read_job(Path(folder), "peer")
        self.batches = [batch["input_ids"].astype(str).tolist() for batch in batches]
        made = Path(folder) / "ctranslate2"
        converter = Converter(str(Path(folder) / "model"))
        converter.convert(str(made), force=True)
        pairs = converter.config.is_encoder_decoder
        self.begin = converter.config.decoder_start_token_id if pairs else None
        kind = ctranslate2.Translator if pairs else ctranslate2.Generator
        self.model = kind(str(made), **self.options)
        return {}

    def step(self, index: int) -> list[list[int]]:
        """Returns each row's tokens: the prompt or the start token, and the new ones."""
        rows, count = self.batches[index % len(self.batches)], self.job["new_tokens"]
        beams = {"beam_size": self.job["beams"]}
        if self.begin is None:
            found = self.model.generate_batch(
                rows, min_length=count, max_length=count, include_prompt_in_result=False, **beams
            )
            prompts = [[int(token) for token in row] for row in rows]
            return [p + one.sequences_ids[0] for p, one in zip(prompts, found, strict=True)]
        found = self.model.translate_batch(
            rows, min_decoding_length=count, max_decoding_length=count, **beams
        )
        return [[self.begin, *map(int, one.hypotheses[0])] for one in found]

    def wait(self, result: list[list[int]]) -> list[list[int]]:
        return result


if __name__ == "__main__":
    worker.serve(lambda: CTranslate2(int(sys.argv[1])))
