"""Trains a small BERT to tag named entities: every character of the Chinese MSRA corpus, from random weights.

    unzip DATA/dh_msra.zip -d data   # of SophonPlus/ChineseNlpCorpus on GitHub: lines of a character, a tab and its BIO tag
    python scripts/train.py --config configs/bert_tag.py --workdir runs/tag --config.data.files.train=data/dh_msra.txt
    echo '"他在北京大学教书。"' > in.jsonl
    python scripts/predict.py --workdir runs/tag --input in.jsonl --output out.jsonl

The file has 55,289 sentences and no split; a tenth of them, chosen by a hash, is held out for validation. Sentences of one
article, and the same names, may be on both sides. Entity F1 (seqeval) after a single epoch (--config.train.epochs=1, 16 CPU
minutes): 42.3. A pretrained BERT reaches 95 on the official split.

Arguments: `:words` tags words instead of characters, as in CoNLL 2003 (`data.files.train` and `.validation`), with
WordPiece. `:tiny` runs in seconds on one core, on names in the embedded corpus.
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "words", "tiny")
    config = experiment("bert", "tag")
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 128, 3, 4, 512
    config.model.positions = 128
    config.data.source = "conll"
    config.data.hold_out = 0.1
    config.data.tokenizer_kind = "wordpiece" if "words" in chosen else "word"
    config.data.vocab_size = 8_000 if "words" in chosen else 6_000
    config.data.batch_size = 32
    config.data.max_length = 112  # a sentence of MSRA has at most 100 characters
    config.task.split = "words" if "words" in chosen else "characters"
    config.task.overlong = "split"
    config.task.token_dropout = 0.1
    config.optim.learning_rate = 1e-3
    config.optim.b2 = 0.98
    config.optim.warmup_ratio = 0.1
    config.optim.clip_norm = 1.0
    config.train.epochs = 3.0
    config.train.eval_every = config.checkpoint.every = 1555  # an epoch
    config.checkpoint.best = "f1"
    return tiny(config) if "tiny" in chosen else config


def tiny(config):
    config.data.source = "python_names"
    config.data.hold_out = None
    config.data.tokenizer_kind = "wordpiece"
    config.task.split = "words"
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 32, 1, 2, 64
    config.model.positions = config.data.max_length = 64
    config.data.vocab_size = 500
    config.data.batch_size = 8
    config.train.epochs = 0.1
    return config
