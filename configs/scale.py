"""Large models, to plan with `scripts/plan.py` before paying for chips, and then to train.

    python scripts/plan.py --config configs/scale.py:bert_large --topology v5e:4x4
    python scripts/train.py --config configs/scale.py:bert_large --workdir /mnt/bucket/run --distributed \
        --config.data.files.train='corpus/*.txt'

| argument | model | slice |
|---|---|---|
| `:bert_large` (the default) | BERT-large, MLM on 512 tokens | v5e:4x4 |
| `:t5_xxl` | T5 1.1 XXL, span corruption on 512 | v5p:4x4x4 |
| `:vit_g` | ViT-g/14 (Zhai et al. 2022), 224 x 224 | v5e:16x16 |
| `:gpt_7b` | GPT, 32 layers of 4,096, 2,048 tokens | v5p:8x8x4 |
| `:gpt_175b` | GPT-3's sizes, 2,048 tokens | v5p:8x8x16 |

Parameters are fp32 and are created sharded; compute is bf16; layers are scanned and rematerialized in the backward pass.
`scripts/README.md` has the cost of each. Without files, the configs read the embedded corpus or scikit-learn's digits. `:tiny` is
a BERT that trains in seconds on one core.
"""

from fmjax.config import arguments, open_dict
from fmjax.defaults import experiment

GPT = {
    "gpt_7b": {"width": 4096, "layers": 32, "attention_heads": 32, "mlp_width": 16384},
    "gpt_175b": {"width": 12288, "layers": 96, "attention_heads": 96, "mlp_width": 49152},
}


def get_config(arg: str = ""):
    chosen = arguments(arg, "bert_large", "t5_xxl", "vit_g", *GPT, "tiny")
    if "t5_xxl" in chosen:
        config = t5_xxl()
    elif "vit_g" in chosen:
        config = vit_g()
    elif name := next((name for name in GPT if name in chosen), ""):
        config = gpt(name)
    else:
        config = bert_large()
    config.model.dtype = "bfloat16"
    config.model.scan_layers = True
    config.model.remat = "everything"
    config.mesh.rules = "fsdp"
    config.mesh.axes = open_dict(fsdp=-1)
    if "gpt_175b" in chosen:
        config.mesh.rules = "fsdp_tp"
        config.mesh.axes = open_dict(fsdp=-1, tensor=8)
    if "vit_g" in chosen:
        config.mesh.axes = open_dict(data=-1, fsdp=64)  # 1,408 does not divide over 256
    config.optim.schedule = "cosine"
    config.optim.warmup_ratio = 0.02
    config.optim.clip_norm = 1.0
    config.train.log_every = 100
    config.train.dropout_rng = "rbg"
    config.checkpoint.every = 1000
    return tiny(config) if "tiny" in chosen else config


def bert_large():
    config = experiment("bert", "mlm")
    config.model.size = "large"
    config.model.attention_dropout = 0.0  # no fused kernel drops attention weights
    config.data.vocab_size = 30_592
    config.data.max_length = 512
    config.data.batch_size = 1024
    config.optim.learning_rate = 4e-4
    config.train.accumulate = 4
    config.train.steps = 100_000
    return config


def t5_xxl():
    config = experiment("t5", "span_corruption")
    config.model.size = "v1_1-xxl"
    config.model.dropout = 0.0
    config.data.tokenizer_kind, config.data.lowercase = "t5", False
    config.data.vocab_size = 32_128
    config.data.max_length = 512
    config.data.batch_size = 2048
    config.optim.name = "adafactor"
    config.optim.learning_rate = 1e-2
    config.optim.weight_decay = 0.0
    config.optim.no_decay = ("norm/scale$", "relative$")  # T5 has no biases
    config.train.steps = 1_000_000
    return config


def vit_g():
    config = experiment("vit", "image_classify")
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 1408, 40, 16, 6144
    config.model.image_size, config.model.patch_size, config.model.channels = 224, 14, 3
    config.model.class_tokens, config.model.pool = 0, "mean"  # 256 tokens
    config.task.image_size, config.task.channels = 224, 3
    config.task.flip = 0.5
    config.data.source = "digits"
    config.data.batch_size = 4096
    config.optim.learning_rate = 8e-4
    config.train.epochs = 90.0
    return config


def gpt(name: str):
    config = experiment("gpt", "clm")
    for size, value in GPT[name].items():
        config.model[size] = value
    config.model.positions = config.data.max_length = 2048
    config.model.dropout = config.model.embedding_dropout = config.model.attention_dropout = 0.0
    config.data.tokenizer_kind, config.data.lowercase = "bpe", False
    config.data.vocab_size = 50_304
    config.data.batch_size = 1024
    config.optim.learning_rate = 1.2e-4
    config.optim.b2 = 0.95
    config.optim.weight_decay = 0.1
    config.train.steps = 150_000
    return config


def tiny(config):
    (
        config.model.width,
        config.model.layers,
        config.model.attention_heads,
        config.model.mlp_width,
    ) = 32, 2, 2, 64
    config.data.vocab_size = 500
    config.data.batch_size = 8
    config.data.max_length = 32
    config.train.steps, config.train.accumulate = 20, 1
    config.train.log_every = 5
    config.checkpoint.every = 20
    return config
