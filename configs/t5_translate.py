"""Fine-tunes the T5 of `t5_span.py:zh` to translate English into Chinese, on Tatoeba's pairs.

    python scripts/train.py --config configs/t5_translate.py --workdir runs/translate --config.init.weights=runs/t5-zh \
        --config.data.files.train=runs/train.tsv --config.data.files.validation=runs/dev.tsv
    python scripts/evaluate.py --workdir runs/translate --split validation
    echo '"How are you?"' | python scripts/predict.py --workdir runs/translate --input /dev/stdin --output /dev/stdout

`t5_span.py` shows how to create the files: 28,400 pairs, and 730 with other English sentences. chrF and BLEU are measured
on greedy output; BLEU counts characters (sacreBLEU's zh). After two epochs (--config.train.epochs=2, 13 CPU minutes, from a
T5 of 1,000 steps): chrF 4.7, BLEU 0.7 on dev.tsv, which is Chinese but far from a translation. Any other T5 works too:
--config.init.weights=DIR_OF_T5.

Arguments: `:scratch` trains the same model from random weights with its own tokenizer, to show the gain of pretraining.
`:tiny` runs in seconds on one core and learns to copy the first words of the embedded corpus.
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "scratch", "tiny")
    config = experiment("t5", "seq2seq")
    config.task.source, config.task.target = "en", "zh"
    config.task.prefix = "translate English to Chinese: "
    config.task.target_length = 24
    config.task.overlong = "truncate"
    config.task.label_smoothing = 0.1
    config.task.bleu_tokenize = "zh"
    config.data.source = "tsv"
    config.data.columns = ("en", "zh")
    config.data.batch_size = 64
    config.data.max_length = 32  # of which the prefix takes some
    config.model.dropout = 0.1
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.b2 = 0.98
    config.optim.warmup_ratio = 0.05
    config.optim.clip_norm = 1.0
    config.optim.no_decay = ("norm/scale$", "relative$")  # T5 has no biases
    config.train.epochs = 3.0
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.dropout_rng = "rbg"
    config.checkpoint.every = 500
    config.checkpoint.keep = 1
    config.checkpoint.best = "loss"
    if "scratch" in chosen or "tiny" in chosen:
        config.model.size = "tiny"
        config.model.width, config.model.mlp_width = 128, 384
        config.model.attention_heads, config.model.head_width = 4, 32
        config.model.feed_forward = "gated-gelu"
        config.data.tokenizer_kind, config.data.vocab_size, config.data.lowercase = (
            "t5",
            6000,
            False,
        )
    return tiny(config) if "tiny" in chosen else config


def tiny(config):
    config.model.width, config.model.mlp_width = 32, 64
    config.model.attention_heads, config.model.head_width = 2, 16
    config.model.layers = config.model.decoder_layers = 1
    config.task.source = config.task.target = "text"
    config.task.target_length = config.data.max_length = 24
    config.task.max_new_tokens = 8
    config.data.source, config.data.columns = "python_docs", None
    config.data.vocab_size = 700
    config.data.batch_size = 8
    config.train.steps, config.train.epochs = 20, None
    config.train.log_every = 5
    config.train.eval_every = 0
    config.checkpoint.every = 20
    config.checkpoint.best = None
    return config
