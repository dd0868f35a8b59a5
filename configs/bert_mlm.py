"""Pretrains BERT by masked language modeling on any text.

    python scripts/train.py --config configs/bert_mlm.py --workdir runs/mlm --config.data.files.train='books/*.txt'

Without files it reads the embedded corpus, the manual that ships with Python. Without `data.tokenizer`, a WordPiece vocabulary
is trained on the training files and stored in the run directory. A twentieth of the records is held out for
validation; of a book that is one record, a twentieth of its text.

Arguments: `:tiny` (seconds on one core), `:nsp` (adds next-sentence prediction), `:whole_word` (masks whole words).
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "tiny", "nsp", "whole_word")
    config = experiment("bert", "mlm")
    config.model.size = "small"
    config.task.nsp = "nsp" in chosen
    config.task.whole_word = "whole_word" in chosen
    config.model.attention_dropout = 0.0  # no fused kernel drops attention weights
    config.data.hold_out = 0.05
    config.data.vocab_size = 8000
    config.data.batch_size = 32
    config.data.max_length = 128
    config.optim.learning_rate = 5e-4
    config.optim.b2 = 0.98
    config.optim.warmup_ratio = 0.06
    config.optim.clip_norm = 1.0
    config.train.steps = 10_000
    config.train.log_every = 10
    config.train.eval_every = 1000
    config.checkpoint.every = 500
    if "tiny" in chosen:
        config.model.size = "tiny"
        config.model.width, config.model.mlp_width = 32, 64
        config.data.vocab_size = 500
        config.data.batch_size = 8
        config.data.max_length = 32
        config.train.steps = 20
        config.train.eval_every = 20
        config.checkpoint.every = 5
    return config
