"""The workloads: models, sizes, batches and targets, with sizes for a CPU (fp32) and for a GPU
(bf16).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from fmjax.errors import UserError, nearest

# Numbers of examples of SST-2's training split (6,920 sentences) by their length in BERT's uncased
# word pieces, from 1 on, with [CLS] and [SEP]: the mean is 23, the maximum 67.
SST2_LENGTHS = (
    *(
        0,
        0,
        12,
        43,
        66,
        86,
        128,
        135,
        157,
        173,
        193,
        210,
        202,
        205,
        206,
        235,
        237,
        259,
        248,
        220,
        233,
        245,
        241,
        222,
        242,
        230,
    ),
    *(
        205,
        198,
        191,
        163,
        187,
        155,
        150,
        143,
        132,
        113,
        103,
        82,
        86,
        94,
        79,
        62,
        50,
        46,
        51,
        19,
        28,
        22,
        22,
        18,
        19,
        21,
        14,
        11,
    ),
    *(9, 3, 2, 2, 5, 0, 2, 0, 0, 1, 1, 2, 1),
)


Result: TypeAlias = dict[str, Any]  # JSON values
Facts: TypeAlias = Mapping[str, Any]  # a result, a job or a machine, read-only


@dataclasses.dataclass(frozen=True)
class Size:
    """The sizes for one device: the model's settings and the batch."""

    model: Facts
    rows: int
    length: int
    # Target length of an encoder-decoder; number of new tokens of generation
    target: int = 0


@dataclasses.dataclass(frozen=True)
class Workload:
    """One or more rows of the table: one for each variant of the peer."""

    title: str
    kind: str  # train, forward or generate
    family: str
    architecture: str  # the reference's class
    cpu: Size
    gpu: Size
    bar: Mapping[str, float]  # ours over the peer's best, by device
    mfu: float | None = None  # target on a GPU
    task: Facts = dataclasses.field(default_factory=dict)
    dropout: Mapping[str, float] = dataclasses.field(default_factory=dict)  # while timed
    lengths: str = ""  # "sst2": rows of its lengths, padded
    beams: int = 1
    unit: str = "tokens"

    def size(self, device: str, tiny: bool = False) -> Size:
        """Returns the sizes for a device. With `tiny` they run in seconds, and results are not
        meaningful."""
        size = self.gpu if device == "gpu" else self.cpu
        if not tiny:
            return size
        small = {"layers": 1, "width": 16, "attention_heads": 2, "mlp_width": 32}
        small |= {"decoder_layers": 1, "head_width": 8} if self.family == "t5" else {}
        small |= {} if self.family == "vit" else {"vocab_size": 50}
        model = {name: value for name, value in size.model.items() if name != "size"} | small
        return Size(model, 2, min(size.length, 16), min(size.target, 8))


NO_DROPOUT = {"dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0}
HIDDEN_DROPOUT = {
    "dropout": 0.1,
    "embedding_dropout": 0.1,
    "attention_dropout": 0.0,
    "classifier_dropout": 0.1,
}
LABELS = {"name": "classify", "labels": ("no", "yes")}
BERT_MINI = {"size": "mini", "vocab_size": 30522}
BERT_BASE = {"size": "base", "vocab_size": 30522}
GPT_4 = {"width": 256, "layers": 4, "attention_heads": 4, "mlp_width": 1024, "vocab_size": 50257}
GPT_BASE = {"size": "base", "vocab_size": 50257}
T5_SMALL, T5_BASE = ({"size": size, "vocab_size": 32128} for size in ("small", "base"))
NANOGPT = {"size": "tiny", "vocab_size": 65, "positions": 64}
VIT_TINY = {"size": "tiny", "image_size": 32, "patch_size": 4}

BERT_FORWARD = Workload(
    title="BERT inference",
    kind="forward",
    family="bert",
    architecture="BertModel",
    cpu=Size(BERT_MINI, 16, 128),
    gpu=Size(BERT_BASE, 16, 128),
    bar={"cpu": 1.5, "gpu": 1.15},
)
BERT_TUNE = Workload(
    title="BERT fine-tuning step",
    kind="train",
    family="bert",
    architecture="BertForSequenceClassification",
    cpu=Size(BERT_MINI, 16, 128),
    gpu=Size(BERT_BASE, 64, 128),
    bar={"cpu": 1.2, "gpu": 1.15},
    mfu=0.5,
    task=LABELS,
    dropout=HIDDEN_DROPOUT,
)
GENERATE = Workload(
    title="",
    kind="generate",
    family="",
    architecture="",
    cpu=Size({}, 8, 16, 64),
    gpu=Size({}, 8, 16, 64),
    bar={"cpu": 3.0, "gpu": 1.2},
    unit="new tokens",
)


def generating(title: str, family: str, architecture: str, model: Facts, beams: int) -> Workload:
    """Returns a workload of decoding."""
    size = Size(model, 8, 16, 64)
    return dataclasses.replace(
        GENERATE,
        title=title,
        family=family,
        architecture=architecture,
        cpu=size,
        gpu=size,
        beams=beams,
    )


WORKLOADS: dict[str, Workload] = {
    "bert_forward": BERT_FORWARD,
    "bert_forward_base": dataclasses.replace(
        BERT_FORWARD, title="BERT-base inference", cpu=Size(BERT_BASE, 16, 128), bar={"gpu": 1.15}
    ),
    "bert_train": BERT_TUNE,
    "bert_sst2": dataclasses.replace(
        BERT_TUNE,
        title="BERT fine-tuning, SST-2's lengths",
        cpu=Size(BERT_MINI, 16, 72),
        gpu=Size(BERT_BASE, 64, 72),
        bar={"cpu": 1.5, "gpu": 1.8},
        mfu=None,
        lengths="sst2",
    ),
    "bert_mlm": Workload(
        title="BERT MLM pretraining, 15 % masked",
        kind="train",
        family="bert",
        architecture="BertForMaskedLM",
        cpu=Size(BERT_MINI, 8, 512),
        gpu=Size(BERT_BASE, 64, 512),
        bar={"cpu": 1.3, "gpu": 1.3},
        mfu=0.55,
        task={"name": "mlm"},
        dropout={
            name: rate for name, rate in HIDDEN_DROPOUT.items() if name != "classifier_dropout"
        },
    ),
    "gpt_train": Workload(
        title="GPT training (nanoGPT's CPU setting)",
        kind="train",
        family="gpt",
        architecture="GPT2LMHeadModel",
        cpu=Size(NANOGPT, 12, 64),
        gpu=Size(GPT_BASE, 16, 1024),
        bar={"cpu": 1.2, "gpu": 1.1},
        mfu=0.55,
        task={"name": "clm"},
        dropout=NO_DROPOUT,
    ),
    "t5_train": Workload(
        title="T5 training",
        kind="train",
        family="t5",
        architecture="T5ForConditionalGeneration",
        cpu=Size(T5_SMALL, 4, 128, 64),
        gpu=Size(T5_BASE, 32, 512, 114),
        bar={"cpu": 1.2, "gpu": 1.5},
        mfu=0.45,
        task={"name": "seq2seq", "scores": ()},
        dropout={"dropout": 0.1},
    ),
    "vit_train": Workload(
        title="ViT training",
        kind="train",
        family="vit",
        architecture="ViTForImageClassification",
        cpu=Size(VIT_TINY, 32, 65),
        gpu=Size({"size": "base"}, 128, 197),
        bar={"cpu": 1.2, "gpu": 1.1},
        mfu=0.5,
        task={"name": "image_classify", "labels": tuple("0123456789")},
        dropout={"dropout": 0.0, "attention_dropout": 0.0},
        unit="images",
    ),
    "gpt_greedy": generating("GPT greedy decoding", "gpt", "GPT2LMHeadModel", GPT_4, 1),
    "gpt_beam": generating("GPT beam-4 decoding", "gpt", "GPT2LMHeadModel", GPT_4, 4),
    "t5_greedy": generating(
        "T5-small greedy decoding", "t5", "T5ForConditionalGeneration", T5_SMALL, 1
    ),
    "t5_beam": generating(
        "T5-small beam-4 decoding", "t5", "T5ForConditionalGeneration", T5_SMALL, 4
    ),
}
# Not measured side by side; see their modules.
OTHERS = {
    "data": "input pipelines of BERT's pretraining and fine-tuning, from text to batches",
    "cold": (
        "time to the first step of each workload, cold and with the persistent compilation cache"
    ),
    "growth": "step time and memory by batch size, length, width and depth",
}
ON_DEMAND = ("bert_forward_base", "growth")  # takes minutes and adds little information
DEFAULT = tuple(name for name in (*WORKLOADS, *OTHERS) if name not in ON_DEMAND)


def chosen(names: Sequence[str]) -> list[str]:
    """Returns the names, or DEFAULT if none are given. Raises UserError for an unknown name."""
    known = (*WORKLOADS, *OTHERS)
    for name in names:
        if name not in known:
            raise UserError(
                f'"{name}": no such workload{nearest(name, known)}; choose from {", ".join(known)}'
            )
    return list(dict.fromkeys(names)) or list(DEFAULT)


def listing() -> str:
    """Returns a line for each workload: its name and title."""
    titles = {name: workload.title for name, workload in WORKLOADS.items()} | OTHERS
    notes = dict.fromkeys(ON_DEMAND, " (only if requested by name)")
    return "\n".join(f"{name:18} {title}{notes.get(name, '')}" for name, title in titles.items())
