"""Fine-tunes BERT to classify texts or pairs of texts; by default on GLUE's SST-2 from TFDS.

    python scripts/train.py --config configs/bert_classify.py --workdir runs/sst2 \
        --config.init.weights=DIR_OF_BERT --config.data.download=true

On your own files, with one label per line:

    python scripts/train.py --config configs/bert_classify.py:files --workdir runs/mine --config.init.weights=DIR_OF_BERT \
        --config.data.files.train=train.csv --config.data.files.validation=dev.csv

`task.text`, `task.text_pair` and `task.label` name the columns. Without `init.weights` the model starts from random weights
of size `model.size`, with a tokenizer trained on the training texts.

`:multi` predicts any number of labels per text, from the columns `text` and `labels`: a list in jsonl; in csv a string such
as "red,blue", whose separator is inferred unless you set `task.separator`; or columns of 0 and 1,
`task.label_columns=toxic,rude`. `:regression` predicts a number for a pair of texts, such as the similarity of STS-B, from
the columns `sentence1`, `sentence2` and `score`.

    python scripts/train.py --config configs/bert_classify.py:multi --workdir runs/topics --config.init.weights=DIR_OF_BERT \
        --config.data.files.train=train.csv --config.data.files.validation=dev.csv
    python scripts/train.py --config configs/bert_classify.py:regression --workdir runs/sts --config.init.weights=DIR_OF_BERT \
        --config.data.files.train=train.csv --config.data.files.validation=dev.csv

`:imbalanced` is the SMS Spam Collection, 13 % of it spam, from random weights; a fifth is held out. One key
weights the classes, focuses on hard examples, or resamples:

    D=DATA/SMSSpamCollection     # UCI's SMS Spam Collection: label<TAB>text
    python scripts/train.py --config configs/bert_classify.py:imbalanced --workdir runs/sms --config.data.files.train=$D
        [--config.task.weighting=balanced | --config.task.focal_gamma=2 | --config.data.balance=oversample]

On 1,115 held-out messages, F1 and AUC of spam: plain .974 and .997, weighted .971 and .996, focal .974 and .998, oversampled
.954 and .993 (2.6 CPU minutes each; oversampled, with longer epochs, 5.3).

`:zh` classifies the sentiment of Chinese hotel reviews (ChnSentiCorp: label,review), by characters, from random weights. A
fifth is held out, and the only review without text is dropped (`task.blank`). `:zh,pretrain` first pretrains the same
encoder on unlabeled reviews of other products; name that run in `init.weights`. `:zh,mixed` does both at once and reads the
unlabeled reviews from `data.files.unlabelled`. Their hotel reviews are removed, since more than half of them are also in
ChnSentiCorp.

    D=DATA     # a copy of SophonPlus/ChineseNlpCorpus on GitHub
    unzip -p $D/online_shopping_10_cats.zip | grep -av ^酒店 > goods.csv     # cat,label,review
    python scripts/train.py --config configs/bert_classify.py:zh,pretrain --workdir runs/zh-mlm \
        --config.data.files.train=goods.csv
    python scripts/train.py --config configs/bert_classify.py:zh --workdir runs/zh \
        --config.data.files.train=$D/ChnSentiCorp_htl_all.csv.gz [--config.init.weights=runs/zh-mlm]
    python scripts/train.py --config configs/bert_classify.py:zh,mixed --workdir runs/zh-mixed \
        --config.data.files.train=$D/ChnSentiCorp_htl_all.csv.gz --config.data.files.unlabelled=goods.csv

On 1,552 held-out reviews: accuracy .871 from random weights (15 CPU minutes), .875 after one epoch of MLM on the other
products (--config.train.epochs=1, 9 CPU minutes, with an earlier version's packing). TF-IDF + logistic regression has
.8925, so neither beats that baseline.

Arguments: `:files` (your files instead of TFDS), `:multi`, `:regression`, `:imbalanced`, `:zh`, `:pretrain` (masked
language modeling instead), `:mixed` (both together), `:tiny` (seconds on one core, on sentences of Python's
manual: which preposition is missing; with `multi` which prepositions occur; with `regression` the number of words).
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(
        arg, "files", "multi", "regression", "imbalanced", "zh", "pretrain", "mixed", "tiny"
    )
    tasks = (
        ("mlm",)
        if "pretrain" in chosen
        else ("classify", "mlm")
        if "mixed" in chosen
        else ("classify",)
    )
    config = experiment("bert", *tasks)
    config.data.batch_size = 32
    config.data.max_length = 128
    config.optim.learning_rate = 3e-5
    config.optim.warmup_ratio = 0.1
    config.optim.clip_norm = 1.0
    config.train.epochs = 3.0
    config.train.eval_every = 500
    config.checkpoint.every = 500
    if "imbalanced" in chosen:
        column = spam(config)
    elif "zh" in chosen:
        column = reviews(config)
    elif chosen & {"multi", "regression"}:
        column = kinds_of_label(config, chosen)
    elif "tiny" in chosen and "files" not in chosen:
        config.data.source, column = "prepositions", "text"
    elif "files" in chosen:
        column = "text"
    else:
        config.data.source, config.data.name, column = "tfds", "glue/sst2", "sentence"
    if "pretrain" in chosen:
        config.task.column = column
        config.data.hold_out = 0.02 if "zh" in chosen else None
    else:
        classify(config, chosen, column)
    return tiny(config) if "tiny" in chosen else config


def classify(config, chosen, column):
    """Sets what is of classification: the whole task, or the main part of a mixture."""
    task = config.task.parts.classify if "mixed" in chosen else config.task
    task.text, task.overlong = column, "truncate"
    best = {"imbalanced": "f1", "multi": "f1_micro", "regression": "pearson"}
    config.checkpoint.best = next(
        (metric for name, metric in best.items() if name in chosen), "accuracy"
    )
    if chosen & {"imbalanced", "zh"}:
        task.pool = "mean"
        config.data.hold_out = 0.2
    if "zh" in chosen:
        task.blank, task.token_dropout = "drop", 0.1
    if "mixed" in chosen:
        config.task.parts.mlm.update(
            column=column, factor=0.3, split="train" if "tiny" in chosen else "unlabelled"
        )


def kinds_of_label(config, chosen):
    """Sets the kind of label and its column; returns the column of the text."""
    config.task.kind = "multi" if "multi" in chosen else "regression"
    if "tiny" in chosen and "files" not in chosen:
        config.data.source = "python_sentences"
        config.task.label = "labels" if "multi" in chosen else "words"
        return "text"
    config.task.label = "labels" if "multi" in chosen else "score"
    if "multi" in chosen:
        return "text"
    config.task.text_pair = "sentence2"
    return "sentence1"


def spam(config):
    config.data.source, config.data.columns = "tsv", ("label", "text")
    config.data.vocab_size, config.data.max_length = 4000, 64
    small(config)
    config.train.epochs = 4.0
    config.train.eval_every = config.checkpoint.every = 140
    return "text"


def reviews(config):
    config.data.source = "csv"
    config.data.vocab_size, config.data.max_length = (
        5000,
        192,
    )  # WordPiece takes each Chinese character for a word
    small(config)
    config.train.epochs = 5.0
    config.train.eval_every = config.checkpoint.every = 195
    return "review"


def small(config):
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 128, 2, 4, 512
    config.model.positions = 256
    config.optim.learning_rate = 1e-3
    config.optim.b2 = 0.98
    config.optim.weight_decay = 0.1


def tiny(config):
    if not config.model.width:
        config.model.size = "tiny"
    config.model.width, config.model.mlp_width = 32, 64
    config.data.vocab_size = 500
    config.data.batch_size = 8
    config.data.max_length = 32
    config.train.epochs = 1.0
    config.train.eval_every = 20
    config.checkpoint.every = 10
    return config
