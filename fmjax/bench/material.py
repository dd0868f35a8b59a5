"""The inputs of both sides: a folder with the model's weights, batches in each side's form, and the
job's description.

JOB/model/        Hugging Face's layout, random weights
JOB/batches.npz   arrays "ours/3/input_ids", "peer/3/input_ids": a side's batch 3
JOB/job.json
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from fmjax import models, pytree, tasks
from fmjax.bench.workloads import SST2_LENGTHS, Result, Size, Workload
from fmjax.config.json_files import write_json
from fmjax.data.stream.buckets import Plan, fewest_borders
from fmjax.hub import families, folders
from fmjax.hub.reference import Reference
from fmjax.inference.pretrained import abstract_params

Arrays = dict[str, np.ndarray]
BATCHES, SST2_BATCHES = 2, 16  # in one pass
OPTIMIZER = {"name": "adamw", "learning_rate": 1e-4, "schedule": "constant", "weight_decay": 0.01}


def prepare(
    folder: Path, workload: Workload, size: Size, device: str, seed: int = 0, devices: int = 1
) -> Result:
    """Writes the job of a workload to a folder; returns its description. `devices` are those of
    fmjax's training.
    """
    reference = families.table_of(workload.family)
    model, classes = make_model(workload, size, reference)
    rng = np.random.default_rng(seed)
    params = pytree.map_named(
        lambda name, leaf: weights(rng, name, leaf.shape), abstract_params(model)
    )
    config = reference.write_config(model.settings, 0) | {"architectures": [workload.architecture]}
    if classes:
        config["id2label"] = {str(index): str(index) for index in range(classes)}
        config["label2id"] = {str(index): index for index in range(classes)}
    folders.write_folder(folder / "model", reference, config, params)

    ours, peer = batches(workload, size, model.settings, seed)
    arrays: Result = {}
    for side, own in (("ours", ours), ("peer", peer)):
        arrays |= {
            f"{side}/{index}/{name}": array
            for index, batch in enumerate(own)
            for name, array in batch.items()
        }
    np.savez(folder / "batches.npz", allow_pickle=False, **arrays)
    job = description(workload, size, reference, device, devices)
    job |= {
        "batches": len(ours),
        "useful_per_pass": useful(workload, size, ours),
        "flops_per_pass": flops(workload, model, ours),
        "parameters": sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params)),
    }
    write_json(folder / "job.json", job)
    return job


def make_model(workload: Workload, size: Size, reference: Reference) -> tuple[nn.Module, int]:
    """Returns the model of a workload, and how many classes it has: 0 if it classifies nothing."""
    positions = {"positions": max(size.length, 512)} if workload.family == "bert" else {}
    if workload.family == "gpt":
        positions = {"positions": max(size.length + size.target, 64)}
    kinds = reference.architectures[workload.architecture]
    heads = tasks.make(workload.task).heads if workload.task else {kind: {} for kind in kinds}
    settings = positions | dict(size.model)
    model: nn.Module = models.family(workload.family).build(heads=heads, **settings)
    counts = [numbers["classes"] for numbers in heads.values() if "classes" in numbers]
    return model, counts[0] if counts else 0


def description(
    workload: Workload, size: Size, reference: Reference, device: str, devices: int
) -> Result:
    """Returns what both sides are to do, without what follows from the batches."""
    off = dict.fromkeys(workload.dropout, 0.0)
    unbiased = workload.family in ("llama", "t5")
    no_decay = ["norm/scale$"] if unbiased else ["bias$", "norm/scale$"]
    return {
        "kind": workload.kind,
        "devices": devices,
        "architecture": workload.architecture,
        "task": dict(workload.task),
        "optimizer": OPTIMIZER | {"no_decay": no_decay},
        "dtype": "bfloat16" if device == "gpu" else "float32",
        "dropout": {"parity": off, "timing": dict(workload.dropout)},
        "peer_dropout": {
            phase: theirs(reference, rates)
            for phase, rates in (("parity", off), ("timing", workload.dropout))
        },
        "new_tokens": size.target if workload.kind == "generate" else 0,
        "beams": workload.beams,
        "dynamic": bool(workload.lengths),
        "sizes": {
            "model": dict(size.model),
            "rows": size.rows,
            "length": size.length,
            "target": size.target,
        },
    }


def flops(workload: Workload, model: nn.Module, batches: list[Arrays]) -> float | None:
    """Returns the floating-point operations of a pass over the batches; None if it generates."""
    if workload.kind == "generate":
        return None
    specs = [
        {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
        for batch in batches
    ]
    count: float = sum(map(model.forward_flops, specs)) * (3 if workload.kind == "train" else 1)
    return count


def weights(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns random values of a parameter, fp32: both sides are given the same, and no program is
    compiled to draw them.
    """
    if name.endswith(("scale", "bias")):
        return np.full(shape, float(name.endswith("scale")), np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


def theirs(reference: Reference, rates: Mapping[str, float]) -> dict[str, float]:
    """Returns rates of dropout by the reference's names."""
    return {name: rates[own] for name, (own, _) in reference.settings.items() if own in rates}


def useful(workload: Workload, size: Size, batches: list[Arrays]) -> int:
    """Returns the number of tokens without padding, images, or new tokens in a pass over the
    batches.
    """
    if workload.kind == "generate":
        return len(batches) * size.rows * size.target
    if workload.unit == "images":
        return sum(len(batch["images"]) for batch in batches)
    counted = sum(
        int(batch.get("attention_mask", np.ones_like(batch["input_ids"])).sum())
        for batch in batches
    )
    return counted + (
        sum(batch["labels"].size for batch in batches) if workload.family == "t5" else 0
    )


def batches(
    workload: Workload, size: Size, settings: Any, seed: int
) -> tuple[list[Arrays], list[Arrays]]:
    """Returns the batches of a pass in our form, and in the reference's."""
    rng = np.random.default_rng(seed)
    if workload.lengths == "sst2":
        return sst2(rng, size, settings.vocab_size)
    if workload.family == "vit":
        pairs = [pictures(rng, size, settings) for _ in range(BATCHES)]
    elif workload.kind == "train":
        make = {"mlm": masked, "clm": causal, "seq2seq": translated, "classify": labelled}[
            workload.task["name"]
        ]
        pairs = [make(rng, size, settings.vocab_size) for _ in range(BATCHES)]
    else:
        texts = [text(rng, size.rows, size.length, settings.vocab_size) for _ in range(BATCHES)]
        pairs = [(batch, batch) for batch in texts]
    return [own for own, _ in pairs], [their for _, their in pairs]


def text(rng: np.random.Generator, rows: int, length: int, vocabulary: int) -> Arrays:
    """Returns random tokens [rows,length] without padding; the first few of a vocabulary may be
    special.
    """
    ids = rng.integers(min(1000, vocabulary // 2), vocabulary, (rows, length), dtype=np.int64)
    return {"input_ids": ids.astype(np.int32), "attention_mask": np.ones((rows, length), np.int32)}


def labelled(rng: np.random.Generator, size: Size, vocabulary: int) -> tuple[Arrays, Arrays]:
    batch = text(rng, size.rows, size.length, vocabulary) | {
        "labels": rng.integers(0, 2, size.rows).astype(np.int32)
    }
    return batch, batch


def masked(rng: np.random.Generator, size: Size, vocabulary: int) -> tuple[Arrays, Arrays]:
    """15 % of each row: ours by their positions, the reference's as labels that are -100
    elsewhere.
    """
    batch = text(rng, size.rows, size.length, vocabulary)
    count = round(0.15 * size.length)
    places = np.sort(
        np.stack([rng.choice(size.length, count, replace=False) for _ in range(size.rows)]), axis=1
    )
    labels = np.take_along_axis(batch["input_ids"], places, axis=1)
    np.put_along_axis(batch["input_ids"], places, min(103, vocabulary - 1), axis=1)
    all_labels = np.full((size.rows, size.length), -100, np.int32)
    np.put_along_axis(all_labels, places, labels, axis=1)
    own = {"masked_positions": places.astype(np.int32), "masked_labels": labels}
    return batch | own | {"masked_weights": np.ones(labels.shape, np.float32)}, batch | {
        "labels": all_labels
    }


def causal(rng: np.random.Generator, size: Size, vocabulary: int) -> tuple[Arrays, Arrays]:
    """Rows without padding, each token's label the next one."""
    tokens = rng.integers(0, vocabulary, (size.rows, size.length + 1)).astype(np.int32)
    batch = {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
    return batch | {"label_weights": np.ones(batch["labels"].shape, np.float32)}, batch


def translated(rng: np.random.Generator, size: Size, vocabulary: int) -> tuple[Arrays, Arrays]:
    batch = text(rng, size.rows, size.length, vocabulary)
    batch["labels"] = text(rng, size.rows, size.target, vocabulary)["input_ids"]
    return batch | {"label_weights": np.ones(batch["labels"].shape, np.float32)}, batch


def pictures(rng: np.random.Generator, size: Size, settings: Any) -> tuple[Arrays, Arrays]:
    side = settings.image_size
    images = rng.standard_normal((size.rows, side, side, settings.channels), dtype=np.float32)
    labels = rng.integers(0, 10, size.rows).astype(np.int32)
    pixels = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return {"images": images, "labels": labels}, {"pixel_values": pixels, "labels": labels}


def sst2(
    rng: np.random.Generator, size: Size, vocabulary: int
) -> tuple[list[Arrays], list[Arrays]]:
    """Sentences of SST-2's lengths: ours as `data.buckets=auto`, the default, batches the whole
    data set, of which these are the first batches; the reference's the same sentences in random
    order, padded to the longest of a batch."""
    counts = np.array(SST2_LENGTHS[: size.length])
    lengths = rng.permutation(np.repeat(1 + np.arange(counts.size), counts))
    plan = Plan(lengths, fewest_borders(lengths, size.length, size.rows), size.rows)
    grouped = np.array(
        [[plan.example(batch, row, 0) for row in range(size.rows)] for batch in range(SST2_BATCHES)]
    )
    ids = {row: text(rng, 1, int(lengths[row]), vocabulary)["input_ids"][0] for row in grouped.flat}
    labels = rng.integers(0, 2, lengths.size).astype(np.int32)

    def padded(rows: np.ndarray, width: int) -> Arrays:
        batch = {
            name: np.zeros((rows.size, width), np.int32) for name in ("input_ids", "attention_mask")
        }
        for place, row in enumerate(rows):
            batch["input_ids"][place, : lengths[row]] = ids[row]
            batch["attention_mask"][place, : lengths[row]] = 1
        return batch | {"labels": labels[rows]}

    every = rng.permutation(grouped.flat).reshape(grouped.shape)
    ours = [padded(rows, plan.length(batch, 0)) for batch, rows in enumerate(grouped)]
    return ours, [padded(rows, int(lengths[rows].max())) for rows in every]
