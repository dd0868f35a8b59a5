"""Trains Multi30k English-German from random weights: the Transformer-Tiny of Wu et al. 2021 (arXiv:2105.14462).

    D=DATA     # multi30k/dataset on GitHub, data/task1/raw; or any two files with one translation per line
    python scripts/train.py --config configs/transformer_translate.py --workdir runs/multi30k \
        --config.data.files.train=$D/train.en.gz,$D/train.de.gz --config.data.files.validation=$D/val.en.gz,$D/val.de.gz
    python scripts/evaluate.py --workdir runs/multi30k --split test --files $D/test_2016_flickr.en.gz,$D/test_2016_flickr.de.gz

The data has 29,000 pairs of captions. The model has 4 encoder and 4 decoder layers, width 128, dropout .3 and one subword
vocabulary for both languages. The step with the lowest validation loss is kept and evaluated with beam 5, by sacreBLEU on
detokenized text. Wu et al. report 41.0 BLEU on test 2016 (tokenized, mean of ten checkpoints). The full recipe was not
measured.

Arguments: `:short` is 1,500 steps, 25 CPU minutes: BLEU 23.3, chrF 47.1 on test 2016 (with an earlier
version's packing). `:tiny` runs in seconds on one core and learns to copy the first words of the embedded corpus.
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "short", "tiny")
    config = experiment("transformer", "seq2seq")
    config.model.size = "tiny"
    config.model.dropout = 0.3
    config.model.initializer_range = 128**-0.5
    config.task.source, config.task.target = "en", "de"
    config.task.target_length = 64
    config.task.overlong = "truncate"
    config.task.pack = True
    config.task.label_smoothing = 0.1
    config.task.num_beams = 5
    config.data.source = "parallel"
    config.data.tokenizer_kind = "t5"
    config.data.lowercase = False
    config.data.vocab_size = 10_000
    config.data.max_length = 64
    config.data.batch_size = 64  # rows of four pairs, about 4,000 target tokens
    config.optim.learning_rate = 5e-3
    config.optim.schedule = "inverse_sqrt"
    config.optim.warmup_steps = 2000
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.0
    config.train.steps = 20_000
    config.train.log_every = 100
    config.train.dropout_rng = "rbg"
    config.train.eval_every = 1000
    config.checkpoint.every = 1000
    config.checkpoint.best = "loss"
    if "short" in chosen:
        short(config)
    return tiny(config) if "tiny" in chosen else config


def short(config):
    config.model.dropout = 0.1  # there is no time to overfit
    config.data.vocab_size = 6000
    config.data.batch_size = 64
    config.data.max_length = config.task.target_length = 32  # 14 on average
    config.optim.learning_rate = 3e-3
    config.optim.warmup_steps = 300
    config.train.steps = 1500
    config.train.eval_every = config.checkpoint.every = 500


def tiny(config):
    config.model.size = None
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 32, 1, 2, 64
    config.task.source = config.task.target = "text"
    config.task.target_length = config.data.max_length = 16
    config.task.num_beams = 1
    config.data.source = "python_docs"
    config.data.tokenizer_kind = "word"
    config.data.vocab_size = 500
    config.data.batch_size = 8
    config.train.steps = 20
    config.train.log_every = 5
    config.train.eval_every = 0
    config.optim.warmup_steps = 1
    return config
