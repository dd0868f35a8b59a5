"""Fine-tunes BERT to classify texts or pairs of texts; by default GLUE's SST-2 as TFDS prepares it.

    python scripts/train.py --config configs/bert_classify.py --workdir runs/sst2 \
        --config.init.from=DIR_OF_BERT --config.data.download=true

On your own files, with one label a line:

    python scripts/train.py --config configs/bert_classify.py:files --workdir runs/mine --config.init.from=DIR_OF_BERT \
        --config.data.files.train=train.csv --config.data.files.validation=dev.csv

`task.text`, `task.text_pair` and `task.label` name the columns; `task.kind` is single, multi or regression. Without
`init.from` the model starts from random weights, of size `model.size`, with a tokenizer trained on the training texts.

Arguments: `:files` (your files instead of TFDS), `:tiny` (seconds on one core; without files, which preposition is
missing in sentences of the embedded corpus).
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "files", "tiny")
    config = experiment("bert", "classify")
    config.task.overlong = "truncate"
    config.data.batch_size = 32
    config.data.max_length = 128
    config.optim.learning_rate = 3e-5
    config.optim.warmup_ratio = 0.1
    config.optim.clip_norm = 1.0
    config.train.epochs = 3.0
    config.train.eval_every = 500
    config.checkpoint.every = 500
    config.checkpoint.best = "accuracy"
    if "tiny" in chosen and "files" not in chosen:
        config.data.source = "prepositions"
    elif "files" not in chosen:
        config.data.source = "tfds"
        config.data.name = "glue/sst2"
        config.task.text = "sentence"
    if "tiny" in chosen:
        config.model.size = "tiny"
        config.model.width, config.model.mlp_width = 32, 64
        config.data.vocab_size = 500
        config.data.batch_size = 8
        config.data.max_length = 32
        config.train.epochs = 1.0
        config.train.eval_every = 20
        config.checkpoint.every = 10
    return config
