"""The two stages of the quickstart: a small BERT on the English that ships with Python, in minutes on two CPU cores.

    bash scripts/quickstart.sh

runs `:pretrain` (masked language modeling on the embedded corpus), then `:finetune` (which of ten prepositions fills the
blank, with 3,000 labels) from the pretrained weights and from random weights. `:full` pretrains longer.

Arguments: `:pretrain`, `:finetune`, `:full`, `:tiny` (seconds on one core).
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = "pretrain"):
    chosen = arguments(arg, "pretrain", "finetune", "full", "tiny")
    config = finetune() if "finetune" in chosen else pretrain(full="full" in chosen)
    return small(config, tiny="tiny" in chosen)


def pretrain(full: bool):
    config = experiment("bert", "mlm")
    config.task.mask_rate = 0.4
    config.data.source = "python_docs"
    config.data.vocab_size = 5000
    config.model.dropout = config.model.embedding_dropout = config.model.attention_dropout = 0.0
    config.optim.learning_rate = 3e-3
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.06
    config.train.steps = 2800 if full else 1600
    config.train.eval_every = 1000
    config.checkpoint.every = 1000
    return config


def finetune():
    config = experiment("bert", "classify")
    config.task.pool = "mask"
    config.task.overlong = "truncate"
    config.data.source = "prepositions"
    config.data.buckets = ("none",)  # one length to compile: the texts are windows of 18 words
    # Said here, since weights bring their own dropout: the pretrained ones that of pretraining, none.
    config.model.dropout = config.model.embedding_dropout = config.model.attention_dropout = 0.1
    config.optim.learning_rate = 7e-4
    config.optim.warmup_ratio = 0.1
    config.train.epochs = 5.0
    config.train.eval_every = 94
    config.checkpoint.every = 470
    config.checkpoint.keep = 1
    return config


def small(config, tiny: bool):
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 128, 2, 4, 512
    config.model.positions = 32
    # At this width, 0.02 makes the branches of a post-norm layer too weak to learn from: after 1,000 steps the MLM loss is
    # 5.35, against 5.07 with 0.08.
    config.model.initializer_range = 0.08
    config.data.batch_size = 32
    config.data.max_length = 32
    config.optim.b2 = 0.98
    config.optim.clip_norm = 1.0
    config.train.dropout_rng = "rbg"
    config.train.log_every = 50
    if tiny:
        config.model.width, config.model.mlp_width = 32, 64
        config.train.steps, config.train.epochs = 20, None
        config.train.eval_every = 0
    return config
