"""Pretrains a GPT as a causal language model on any text.

    python scripts/train.py --config configs/gpt_clm.py --workdir runs/clm --config.data.files.train='books/*.txt'
    echo '{"text": "The function returns"}' > prompts.jsonl
    python scripts/predict.py --workdir runs/clm --input prompts.jsonl --output continued.jsonl

Without files it reads the embedded corpus, the manual that ships with Python. Without `data.tokenizer`, a cased byte-level BPE
is trained on the training files. A twentieth of the records is held out for validation. Bits per byte can be compared
between vocabularies; the loss per token cannot.

Arguments: `:llama` (RoPE, RMSNorm and SwiGLU instead of GPT-2's layers), `:tiny` (seconds on one core).
"""

from fmjax.config import arguments
from fmjax.defaults import experiment


def get_config(arg: str = ""):
    chosen = arguments(arg, "llama", "tiny")
    llama = "llama" in chosen
    config = experiment("llama" if llama else "gpt", "clm")
    config.model.width, config.model.layers, config.model.attention_heads = 256, 6, 4
    config.model.mlp_width = 688 if llama else 1024
    config.model.attention_dropout = 0.0  # no fused kernel drops attention weights
    config.task.temperature = 0.8
    config.task.top_p = 0.95
    config.data.hold_out = 0.05
    config.data.tokenizer_kind = "bpe"
    config.data.lowercase = False
    config.data.batch_size = 16
    config.data.max_length = 256
    config.optim.learning_rate = 1e-3
    config.optim.schedule = "cosine"
    config.optim.end_fraction = 0.1
    config.optim.warmup_ratio = 0.02
    config.optim.b2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    if llama:
        config.model.kv_heads = 4
        config.optim.no_decay = ("norm/scale$",)  # there are no biases
    else:
        config.model.positions = 256
    config.train.steps = 10_000
    config.train.eval_every = 1000
    config.checkpoint.every = 500
    if "tiny" in chosen:
        config.model.width, config.model.layers, config.model.mlp_width = 32, 2, 64
        config.task.max_new_tokens = 16
        config.data.vocab_size = 500
        config.data.batch_size = 8
        config.data.max_length = 32
        config.train.steps = 20
        config.train.eval_every = 20
        config.checkpoint.every = 5
    return config
