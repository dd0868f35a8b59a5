"""The block of facts at the start of a run: data, labels, lengths, padding, model, devices, export.

A task may add its own (`contracts.Task.facts`). Facts about texts come from a sample of the
training data, which takes at most a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from fmjax import models, pytree
from fmjax.contracts import Config, Examples, Fact, Processors, Source, Value
from fmjax.data.kinds import text
from fmjax.data.records import Bundle, Selected
from fmjax.data.stream.balance import Resampled
from fmjax.data.stream.buckets import AUTO, Bucketed, bucketed
from fmjax.data.stream.examples import PARTS
from fmjax.data.stream.mixing import MixedExamples
from fmjax.data.stream.packing import fill_of
from fmjax.data.stream.tolerance import Tolerance
from fmjax.distributed.sharding import PARAMETERS, mesh_axes
from fmjax.errors import RecordError, UserError
from fmjax.inference.pretrained import Pretrained
from fmjax.tasks.facts import percent
from fmjax.train.experiment import Experiment
from fmjax.train.kernels import attention_kernels, described
from fmjax.train.wrappers import main_part

KEY = "facts"  # key of provenance.json
RECORDS, CHARACTERS = 2000, 2_000_000  # maximum records of a sample
LETTERS = 10_000  # characters per text in which unknown tokens are counted
MANY_UNKNOWN = 0.1  # fraction of unknown tokens above which a warning is shown
MUCH_PADDING = 0.3  # fraction of padding above which other lengths are proposed


def gather(experiment: Experiment) -> Config:
    """Returns the facts of a run by name, as stored in `provenance.json`: the line as `text`, a
    problem as `warning`, and the values."""
    return {
        fact.name: {"text": fact.text}
        | ({"warning": fact.warning} if fact.warning else {})
        | fact.values
        for fact in found(experiment)
    }


def lines(facts: Mapping[str, Config]) -> list[str]:
    """Returns the block for the screen: the facts in aligned columns, then the warnings."""
    width = max(map(len, facts), default=0)
    shown = [f"{name:{width}}  {fact['text']}" for name, fact in facts.items()]
    return shown + [f"warning: {fact['warning']}" for fact in facts.values() if "warning" in fact]


def found(experiment: Experiment) -> Iterator[Fact]:
    """Yields the facts of a run in display order."""
    config, built = experiment.config, experiment.built
    yield records(experiment)
    yield from of_data(experiment)
    train = built.examples["train"]
    yield from padding(train, config["data"])
    yield model(experiment)
    yield devices(experiment)
    yield export(experiment)


def records(experiment: Experiment) -> Fact:
    """Returns the number of records per split, and of examples if these differ from records."""
    examples = experiment.built.examples
    counts, made = {}, {}
    for split, source in experiment.data.sources.items():
        counts[split] = len(
            next(iter(source.parts.values())) if isinstance(source, Bundle) else source
        )
        made[split] = len(examples[split]) if split in examples else 0
    listed = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    rows = [
        f"{count:,} {split}" for split, count in made.items() if count not in (0, counts[split])
    ]
    others = {name: len(own) for name, own in examples.items() if name.startswith(PARTS)}
    more = f" ({', '.join(rows)} examples)" if rows else ""
    return Fact("records", listed + more, {"records": counts, "examples": made | others})


def of_data(experiment: Experiment) -> Iterator[Fact]:
    """Yields the facts of the main task and its tokenizer about the training data."""
    task, source = experiment.built.task, experiment.data.sources["train"]
    examples, processors = experiment.built.examples["train"], experiment.data.processors
    if isinstance(source, Bundle):  # a mixture of tasks; the first is the main one
        part = next(iter(source.parts))
        source, processors = source.parts[part], processors.part(part)
        examples = unwrapped(examples).parts[part]
    own = unwrapped(examples)
    parts = list(map(unwrapped, own.parts.values())) if isinstance(own, MixedExamples) else [own]
    columns = [name for name, kind in task.main.reads.items() if kind == text.Processor.kind]
    sample = sample_of(source, columns)
    if not len(sample):
        return
    length = int(experiment.config["data"]["max_length"])
    # Bad records that the run skips, or that no batch has reached yet, are also skipped here.
    tolerant = Tolerance(f"skip:{RECORDS}")
    _, facts = tolerant.apply(sample, lambda kept: task.main.facts(kept, parts, processors, length))
    yield from facts
    yield from unknown(sample, columns, processors)


def unwrapped(examples: Examples) -> Examples:
    """Returns a task's original examples, without buckets and resampling."""
    while isinstance(examples, Bucketed | Resampled):
        examples = examples.examples
    return examples


def sample_of(source: Source, columns: Sequence[str]) -> Source:
    """Returns readable records drawn from a source, as many as can be read fast.

    `columns` are the text columns.
    """
    count = len(source)
    drawn = np.sort(np.random.default_rng(0).choice(count, min(count, RECORDS), replace=False))
    kept, characters = [], 0
    for index in drawn.tolist() if columns else []:
        if characters > CHARACTERS:
            break
        try:
            characters += sum(map(len, strings(source[index], columns)))
        except RecordError:
            continue
        kept.append(index)
    return Selected(source, np.array(kept if columns else drawn, np.int64), {})


def strings(record: Mapping[str, Value], columns: Sequence[str]) -> Iterator[str]:
    """Yields the texts of a record; those of list columns one by one."""
    for name in columns:
        value = record[name]
        yield from [value] if isinstance(value, str) else value if isinstance(value, list) else []


def unknown(sample: Source, columns: Sequence[str], processors: Processors) -> Iterator[Fact]:
    """Yields the fraction of unknown tokens, if the tokenizer has an unknown token."""
    if text.Processor.kind not in processors:
        return
    tokenizer = processors.of(text.Processor).tokenizer
    if "unk" not in tokenizer.roles:
        return
    texts = [
        one[:LETTERS] for index in range(len(sample)) for one in strings(sample[index], columns)
    ]
    ids = np.concatenate([np.zeros(0, np.int32), *tokenizer.encode_batch(texts)])
    share = float(np.mean(ids == tokenizer.unk_id)) if ids.size else 0.0
    warning = (
        f"{percent(share)} of the tokens are unknown to the tokenizer, which was trained on other "
        "text; name one that fits in data.tokenizer, with weights that belong to it, or set "
        "neither to train one"
    )
    values = {"share": share, "tokens": int(ids.size)}
    yield Fact(
        "unknown",
        f"{percent(share)} of the tokens",
        values,
        warning if share >= MANY_UNKNOWN else "",
    )


def padding(train: Examples, data: Config) -> Iterator[Fact]:
    """Yields the fraction of padding in the training batches, and the setting that would lower
    it."""
    fill = fill_of(train)
    if not fill:
        return
    shares = {name: 1 - share for name, share in fill.items()}
    listed = ", ".join(f"{percent(share)} of {name}" for name, share in shares.items())
    values: Config = {"padding": shares}
    if isinstance(train, Bucketed):
        values["buckets"] = train.borders
        rows = f"batches of {', '.join(map(str, train.borders))} tokens (data.buckets)"
    elif train.lengths is not None:
        rows = f"batches of {train.max_length or data['max_length']} tokens"
        best = bucketed(train, (AUTO,), data["max_length"], data["batch_size"])
        better = {name: 1 - share for name, share in fill_of(best).items()}
        if max(shares.values()) >= MUCH_PADDING and max(better.values()) < max(shares.values()):
            values["with_buckets"] = better
            rows += f"; data.buckets=auto would leave {percent(max(better.values()))}"
    elif any(part.lengths is not None for part in train.parts.values()):
        rows = f"batches of {data['max_length']} tokens, as mixtures have no length buckets"
    else:
        rows = "packed rows" if train.fill is not None else ""
    yield Fact("padding", listed + (f" in {rows}" if rows else ""), values)


def model(experiment: Experiment) -> Fact:
    """Returns the fact about the model, its compute type and its attention kernels.

    Raises UserError if the kernel that is set cannot compute an attention.
    """
    config, abstract, built = experiment.config, experiment.abstract, experiment.built
    params, processors = abstract.state.params, experiment.data.processors
    settings = config["model"]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    pieces = processors.sizes().get("vocab_size", 0)
    dtype = settings.get("dtype", "float32")
    kernels = attention_kernels(
        built.model, built.task, params, abstract.spec, abstract.layout, config
    )
    values = {
        "name": settings["name"],
        "parameters": count,
        "dtype": dtype,
        "attention": {choice.where: choice.kernel for choice in kernels} or "xla",
    }
    parts = [f"{settings['name']}, {count:,} parameters"]
    parts += [f"vocabulary {pieces:,}"] if pieces else []
    how = [f"remat {settings['remat']}"] if settings.get("remat", "none") != "none" else []
    parts += [f"computes in {dtype}, attention kernel: {described(kernels)}", *how]
    return Fact("model", ", ".join(parts), values)


def devices(experiment: Experiment) -> Fact:
    """Returns the fact about the devices, the mesh, and which parameters are sharded or
    replicated."""
    layout, section = experiment.abstract.layout, experiment.config["mesh"]
    mesh = layout.mesh
    kind = mesh.devices.flat[0].device_kind
    axes = {axis: int(size) for axis, size in mesh.shape.items()}
    rules = "mesh.table" if section.get("table") else section["rules"]
    leaves = pytree.names(experiment.abstract.state.params)
    sizes = {name: math.prod(leaf.shape) for name, leaf in leaves.items()}
    whole = [name for name, leaf in leaves.items() if leaf.sharding.is_fully_replicated]
    share = sum(sizes[name] for name in whole) / max(sum(sizes.values()), 1)
    values = {"count": mesh.size, "kind": kind, "mesh": axes, "rules": rules, "replicated": share}
    if mesh.size == 1:
        return Fact("devices", f"1 x {kind}", values)
    shape = " x ".join(f"{axis} {size}" for axis, size in axes.items())
    text = f"{mesh.size} x {kind}, mesh {shape}, rules {rules}"
    if len(whole) < len(leaves):
        largest = sorted(whole, key=lambda name: -sizes[name])[:3]
        named = f", the largest {', '.join(largest)}" if largest else ""
        divided = (
            f"{percent(1 - share)} of the parameters sharded, {percent(share)} replicated{named}"
        )
        return Fact("devices", f"{text}: {divided}", values)
    warning = ""
    wanted = [name for name in PARAMETERS if layout.rules.get(name)]
    if wanted and not any(mesh_axes(name, layout.rules, mesh) for name in wanted):
        axis = layout.rules[wanted[0]]
        axis = axis if isinstance(axis, str) else axis[0]
        warning = (
            f"rules {rules} shard no parameter over the mesh {axes}, so each device holds all of "
            f"them; add the axis, mesh.axes='{{\"{axis}\": -1}}'"
        )
    return Fact("devices", f"{text}: batches sharded, all parameters replicated", values, warning)


def export(experiment: Experiment) -> Fact:
    """Returns whether the run can be exported to Hugging Face's format, or why not."""
    built = experiment.built
    own, task, _ = main_part(built.model, built.task, experiment.abstract.spec)
    name = experiment.config["model"]["name"]
    trained = Pretrained(
        experiment.config, models.family(name), own, {}, experiment.data.processors, task
    )
    try:
        architecture = trained.exported()[1]["architectures"][0]
    except UserError as error:
        return Fact("export", f"no: {error}", {"possible": False, "why": str(error)})
    text = f"yes, as {architecture} (scripts/convert.py)"
    return Fact("export", text, {"possible": True, "architecture": architecture})
