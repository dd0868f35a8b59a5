"""Trains a GPT on the characters of tiny Shakespeare: nanoGPT's CPU setting, 4 layers and 64 characters of context.

    F=DATA/input.txt     # tinyshakespeare of karpathy/char-rnn on GitHub, 1,115,394 characters; or any text
    python scripts/train.py --config configs/gpt_char.py --workdir runs/char-0 --config.train.seed=0 \
        --config.data.files.train="$F[:90%]" --config.data.files.validation="$F[90%:]"
    echo '{"text": "ROMEO:"}' > prompts.jsonl
    python scripts/predict.py --workdir runs/char-0 --input prompts.jsonl --output continued.jsonl

As in nanoGPT, rows start anywhere in the text, and there is no dropout and no bias (biases are frozen at 0). The validation
loss covers all 111,540 characters in non-overlapping blocks, in nats per character; nanoGPT reports 1.88.
Seeds 0, 1 and 2: 1.705, 1.717, 1.704, mean 1.709; 4 CPU minutes each.

Arguments: `:tiny` (seconds on one core, on the embedded corpus).
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "tiny")
    config = experiment("gpt", "clm")
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 128, 4, 4, 512
    config.model.positions = 64
    config.model.initializer_range = 0.06  # 2,000 steps are too few to grow from nanoGPT's 0.02
    config.model.dropout = config.model.embedding_dropout = config.model.attention_dropout = 0.0
    config.task.rows = "offset"
    config.task.max_new_tokens = 48  # with the prompt, no more than the model has positions
    config.task.temperature = 0.8
    config.data.record = "file"
    config.data.tokenizer_kind = "char"
    config.data.batch_size = 12
    config.data.max_length = 64
    config.optim.learning_rate = 3e-3
    config.optim.schedule = "cosine"
    config.optim.end_fraction = 0.03
    config.optim.warmup_steps = 100
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.optim.freeze = ("bias$",)
    config.train.steps = 2000
    config.train.log_every = 50
    config.train.eval_every = 1000
    config.checkpoint.every = 1000
    if "tiny" in chosen:
        config.data.record = None
        config.data.batch_size = 8
        config.model.width, config.model.mlp_width, config.model.layers = 32, 64, 2
        config.optim.warmup_steps = 2
        config.train.steps = 20
        config.train.eval_every = 20
    return config
