"""Fine-tunes BERT on multiple choice: which ending follows a context, or which answer is right.

    python scripts/train.py --config configs/bert_choice.py --workdir runs/choice --config.init.weights=BERT_DIR \
        --config.data.files.train=train.jsonl --config.data.files.validation=dev.jsonl
    python scripts/predict.py --workdir runs/choice --input in.jsonl --output out.jsonl

Each line has a context, the endings (any number, but the same in all lines) and the index of the correct ending, from 0:

    {"context": "She opens the oven.", "endings": ["It is hot.", "He swims.", "A dog barks.", "We read."], "label": 0}

For csv files, name one column per ending; for SWAG (`sent1`, `sent2`, `ending0` to `ending3`):

        --config.task.context=sent1 --config.task.start=sent2 \
        --config.task.endings=ending0,ending1,ending2,ending3

Without `init.weights` the model starts from random weights of size `model.size`, with a tokenizer trained on the training
texts; from a data set this small it does not learn much.

Arguments: `:tiny` (seconds on one core: which of four sentences of Python's manual comes next).
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "tiny")
    config = experiment("bert", "choice")
    config.task.overlong = "truncate"
    config.data.batch_size = 16
    config.data.max_length = 128
    config.optim.learning_rate = 3e-5
    config.optim.warmup_ratio = 0.1
    config.optim.clip_norm = 1.0
    config.train.epochs = 3.0
    config.train.eval_every = 500
    config.checkpoint.every = 500
    config.checkpoint.best = "accuracy"
    return tiny(config) if "tiny" in chosen else config


def tiny(config):
    config.data.source = "python_choices"
    config.model.size = "tiny"
    config.model.width, config.model.mlp_width = 32, 64
    config.data.vocab_size = 500
    config.data.batch_size = 8
    config.data.max_length = 64
    config.train.epochs = 0.1
    config.train.eval_every = 0
    return config
