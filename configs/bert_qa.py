"""Trains a small BERT to find answers in paragraphs: SQuAD's development set, split by article.

    python scripts/train.py --config configs/bert_qa.py --workdir runs/qa \
        --config.data.files.train=DATA/dev-v1.1.json
    python scripts/predict.py --workdir runs/qa --input questions.jsonl --output answers.jsonl

Any file in SQuAD's format (1.1 or 2.0) works, and so does jsonl with the same columns. A single file is split by article
(`data.hold_out_by`): of the 48 articles of the development set, 38 (8,723 questions) are for training and 10 (1,847) for
validation. That is a tenth of SQuAD, and random weights know no English, so the score stays far below that of a pretrained
BERT (88.5 F1 after the whole training set).
After 2 of the 6 epochs (`--config.train.epochs=2`): exact match 2.5, F1 10.0 (seed 0), in 10 CPU minutes on two shared cores.

Arguments: `:pretrain` pretrains the same model by masked language modeling on the text in `data.files.train`; fine-tune with
`--config.init.weights=RUN`. `:bert` fine-tunes a published BERT, `--config.init.weights=FOLDER`, as in its paper: 384 tokens,
a window every 128 tokens, learning rate 3e-5, 2 epochs. `:tiny` runs in seconds on one core, on questions about the embedded
corpus.
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "pretrain", "bert", "tiny")
    config = experiment("bert", "mlm" if "pretrain" in chosen else "qa")
    if "bert" in chosen:
        config.optim.learning_rate = 3e-5
        config.train.epochs = 2.0
    else:
        (
            config.model.width,
            config.model.layers,
            config.model.attention_heads,
            config.model.mlp_width,
        ) = 128, 3, 4, 512
        config.model.positions = 384
        config.optim.learning_rate = 5e-4
        config.optim.b2 = 0.98
        config.train.epochs = 6.0
    config.data.vocab_size = 8_000
    config.data.batch_size = 32
    config.data.max_length = 384 if "bert" in chosen else 256
    config.optim.warmup_ratio = 0.1
    config.optim.clip_norm = 1.0
    if "pretrain" in chosen:
        config.data.source = "text"
        config.data.hold_out = 0.02
        config.data.max_length = 128
        config.optim.learning_rate = 1e-3
        config.train.epochs = 10.0
        config.train.eval_every = config.checkpoint.every = 500
        return tiny(config) if "tiny" in chosen else config
    config.data.source = "squad"
    config.data.hold_out = 0.21
    config.data.hold_out_by = "title"
    config.task.stride = 128
    config.train.eval_every = config.checkpoint.every = 400
    config.checkpoint.best = "f1"
    config.train.dropout_rng = "hash"
    return tiny(config) if "tiny" in chosen else config


def tiny(config):
    config.data.source = "python_docs" if config.task.name == "mlm" else "python_questions"
    config.data.hold_out = config.data.hold_out_by = None
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 32, 1, 2, 64
    config.model.positions = config.data.max_length = 96
    config.data.vocab_size = 500
    config.data.batch_size = 8
    config.train.epochs = 0.1
    if config.task.name == "qa":
        config.task.stride = 0
        config.task.max_question = 32
        config.task.max_answer = 12
    return config
