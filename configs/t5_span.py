"""Pretrains a small T5 by span corruption on any text.

    python scripts/train.py --config configs/t5_span.py --workdir runs/t5 --config.data.files.train='books/*.txt'

Without files it reads the embedded corpus, the manual that ships with Python. Without `data.tokenizer`, a SentencePiece
model with T5's special tokens is trained on the training files and stored in the run directory. A fiftieth of the records
is held out for validation.

`t5_translate.py` fine-tunes it on English-Chinese pairs. To learn both scripts, it reads books, and one line per sentence
of the training pairs.

    D=DATA     # books/*.txt of any English, and Tatoeba's en<TAB>zh<TAB>attribution, some English sentences occur twice
    mkdir -p runs && zcat $D/cmn.txt.gz | awk -F'\t' 'NF > 2 {n += $1 != last; last = $1
        print $1 FS $2 > ("runs/" (n % 40 ? "train" : "dev") ".tsv")}'
    tr '\t' '\n' < runs/train.tsv > runs/sentences.txt
    python scripts/train.py --config configs/t5_span.py:zh --workdir runs/t5-zh \
        --config.data.files.train="$D/books/*.txt,runs/sentences.txt"

Loss per target token after 1,000 steps: 5.00 (10 CPU minutes). Since these texts are short, they are concatenated as in T5
(`task.rows=joined`); by default several texts share a row and cannot see each other.

Arguments: `:zh` (one record per line, a vocabulary for two scripts), `:ul2` (UL2's seven denoisers, with a mode letter before
each input), `:tiny` (seconds on one core).
"""

from fmjax.config import arguments
from fmjax.defaults import experiment
from fmjax.tasks.span_corruption import UL2


def get_config(arg: str = ""):
    chosen = arguments(arg, "zh", "ul2", "tiny")
    config = experiment("t5", "span_corruption")
    config.model.size = "tiny"
    config.model.width, config.model.mlp_width = 128, 384
    config.model.attention_heads, config.model.head_width = 4, 32
    config.model.feed_forward = "gated-gelu"
    config.model.dropout = 0.0
    if "ul2" in chosen:
        config.task.denoisers = UL2
        config.task.mode_text = "[{mode}]"
    if "zh" in chosen:
        config.task.rows = "joined"
    config.data.hold_out = 0.02
    config.data.tokenizer_kind = "t5"
    config.data.lowercase = False
    config.data.vocab_size = 6000 if "zh" in chosen else 4000
    config.data.record = "line" if "zh" in chosen else None
    config.data.batch_size = 32
    config.data.max_length = 96
    config.optim.learning_rate = 2e-3
    config.optim.schedule = "cosine"
    config.optim.b2 = 0.98
    config.optim.warmup_ratio = 0.05
    config.optim.clip_norm = 1.0
    config.optim.no_decay = ("norm/scale$", "relative$")  # T5 has no biases
    config.train.steps = 1000
    config.train.log_every = 50
    config.train.eval_every = 500
    config.train.dropout_rng = "rbg"
    config.checkpoint.every = 500
    config.checkpoint.keep = 1
    return tiny(config) if "tiny" in chosen else config


def tiny(config):
    config.model.width, config.model.mlp_width = 32, 64
    config.model.attention_heads, config.model.head_width = 2, 16
    config.model.layers = config.model.decoder_layers = 1
    config.data.vocab_size = 700
    config.data.record = None
    config.data.batch_size = 8
    config.data.max_length = 32
    config.train.steps = 20
    config.train.log_every = 5
    config.train.eval_every = 0
    config.checkpoint.every = 20
    return config
