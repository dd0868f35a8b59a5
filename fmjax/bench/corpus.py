"""Training on a text that is larger than the memory it may take: `python -m fmjax.bench.corpus`.

A file of `--gigabytes` is made by repeating and numbering the paragraphs of a real text (`--text`;
by default the manual that ships with Python). `bert_mlm` and `gpt_clm` then train on it with tiny
models, in processes of their own:

- `build`: the rate at which the token store is built, and that of the tokenizer library's own
  `encode_batch` on the same texts in memory, in turns
- `first`: the peak memory of a run that builds the store, above that of a run on a small text
- `second`: a new run with the store: seconds to its first batch with all imports, and the bytes of
  the text that it reads: pages that are mapped, and system calls less those on a small text

`--folder` keeps the files for another call.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fmjax.bench.table import markdown
from fmjax.config import apply_overrides, load_config, override_texts, to_dict
from fmjax.config.shipped import shipped_configs
from fmjax.contracts import Record
from fmjax.data.kinds.encoding import Encoder, encode
from fmjax.data.kinds.text import texts
from fmjax.data.sources.open import open_source
from fmjax.data.tokenizers.tokenizer import load_tokenizer, train_tokenizer
from fmjax.distributed.hosts import say
from fmjax.errors import one_of

PARTS = ("build", "first", "second")
CONFIGS = ("bert_mlm", "gpt_clm")
KINDS = ("wordpiece", "bpe")
BARS = {"build": 0.9, "memory": 1.2e9, "seconds": 10, "share": 0.01}
SETTINGS = {"data.batch_size": 8, "data.max_length": 128, "model.positions": 128}
STEPS, ROUNDS = 20, 3
RATE_BYTES = 30_000_000  # of text whose rate is measured
CHUNK = 1000  # texts of a call of the library, as `datasets` passes them


def paragraphs(text: str | None) -> list[str]:
    """Returns the paragraphs of the real text."""
    source = open_source("text" if text else "python_docs", text, "train")
    return list(texts(source, "text"))


def write_corpus(path: Path, real: Sequence[str], size: int) -> None:
    """Writes the real paragraphs again and again, each with a number, until there are `size`
    bytes."""
    number = 0
    with path.open("w", encoding="utf-8") as stream:
        while stream.tell() < size:
            for paragraph in real:
                stream.write(f"{number} {paragraph}\n\n")
                number += 1


def rate(folder: Path, kind: str, side: str) -> Record:
    """Returns the tokens per second of one side."""
    tokenizer = load_tokenizer(folder / kind)
    source = open_source("text", str(folder / "rate.txt"), "train")
    begun, count = time.perf_counter(), 0
    if side == "fmjax":
        for found in encode(Encoder(source, "text", tokenizer)):
            count += found.part.ids.size
        return {"rate": count / (time.perf_counter() - begun)}
    import tokenizers  # the library itself

    library = tokenizers.Tokenizer.from_file(str(folder / kind / "tokenizer.json"))
    read = list(texts(source, "text"))
    begun = time.perf_counter()
    for at in range(0, len(read), CHUNK):
        rows = library.encode_batch(read[at : at + CHUNK], add_special_tokens=False)
        count += sum(len(row) for row in rows)
    return {"rate": count / (time.perf_counter() - begun)}


def settings(folder: Path, name: str, text: str) -> Record:
    """Returns the overrides of a run."""
    own = {key: value for key, value in SETTINGS.items() if name == "gpt_clm" or "model" not in key}
    return own | {
        "data.files.train": str(folder / text),
        "data.tokenizer": str(folder / KINDS[0]),
        "train.steps": STEPS,
        "train.eval_every": 0,
        "data.hold_out": 0.001,
    }


def train(folder: Path, name: str, text: str) -> Record:
    """Trains a few steps. Returns the peak memory of this process."""
    from fmjax import fit

    workdir = folder / "runs" / f"{name}-{text}"
    shutil.rmtree(workdir, ignore_errors=True)
    begun = time.perf_counter()
    fit(f"{shipped_configs()[name]}:tiny", workdir, settings(folder, name, text))
    return {"seconds": time.perf_counter() - begun, **memory()}


def start(folder: Path, name: str, text: str) -> Record:
    """Reads the first batch of a run that is started again. Returns the bytes of the text that were
    read."""
    from fmjax.train.experiment import prepare
    from fmjax.train.start import training_batches

    before = io_read()
    config = load_config(f"{shipped_configs()[name]}:tiny")
    apply_overrides(config, override_texts(settings(folder, name, text)))
    workdir = folder / "runs" / f"{name}-again"
    shutil.rmtree(workdir, ignore_errors=True)
    experiment = prepare(to_dict(config), workdir)
    batches = training_batches(experiment)
    next(batches)
    batches.close()
    return {"read": io_read() - before, "mapped": mapped_bytes(folder / text), **memory()}


def io_read() -> int:
    """Returns the bytes that this process has read by system calls."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text(encoding="utf-8"))
    assert found
    return int(found[1])


def mapped_bytes(path: Path) -> int:
    """Returns the bytes of a file that are mapped into this process and were touched."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def memory() -> Record:
    """Returns the peak memory of this process in bytes, mapped files included, and what it has
    allocated now."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kinds = {"peak": "VmHWM", "allocated": "RssAnon"}
    return {
        name: 1024 * int(found[1])
        for name, kind in kinds.items()
        if (found := re.search(rf"{kind}:\s+(\d+)", status))
    }


def asked(folder: Path, *call: str) -> Record:
    """Returns the answer of a process of its own, with its seconds in all as `whole`."""
    env = os.environ | {"FMJAX_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "fmjax.bench.corpus", "--child", str(folder), *call]
    begun = time.perf_counter()
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    answer: Record = json.loads(done.stdout.splitlines()[-1])
    return answer | {"whole": time.perf_counter() - begun}


def rows(folder: Path, parts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yields the rows of the table."""
    size = (folder / "large.txt").stat().st_size
    for kind in KINDS if "build" in parts else ():
        own: list[float] = []
        library: list[float] = []
        for _ in range(ROUNDS):
            own.append(asked(folder, "rate", kind, "fmjax")["rate"])
            library.append(asked(folder, "rate", kind, "library")["rate"])
        ratio = statistics.median(own) / statistics.median(library)
        shown = f"{statistics.median(own):,.0f} tokens/s, {ratio:.2f} x `encode_batch`"
        yield f"build, {kind}", shown, f">= {BARS['build']}", met(ratio >= BARS["build"])
    for name in CONFIGS:
        if "first" in parts:
            small = asked(folder, "train", name, "small.txt")
            large = asked(folder, "train", name, "large.txt")
            more = large["peak"] - small["peak"]
            shown = f"{more / 1e6:,.0f} MB above {small['peak'] / 1e6:,.0f}, {large['whole']:.0f} s"
            yield f"first start, {name}", shown, "< 1.2 GB", met(more < BARS["memory"])
        if "second" in parts:
            again = asked(folder, "start", name, "large.txt")
            base = asked(folder, "start", name, "small.txt")
            share = (max(again["read"] - base["read"], 0) + again["mapped"]) / size
            shown = f"{again['whole']:.1f} s, {share:.2%} of the text"
            fine = again["whole"] < BARS["seconds"] and share < BARS["share"]
            yield f"second start, {name}", shown, "< 10 s, < 1 %", met(fine)


def met(fine: bool) -> str:
    return "yes" if fine else "no"


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["--child"]:
        kind, *rest = argv[2:]
        call = {"rate": rate, "train": train, "start": start}[kind]
        print(json.dumps(call(Path(argv[1]), *rest)))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", help="a file of text (default: the manual of Python)")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, help="where files are kept (default: nowhere)")
    parser.add_argument("parts", nargs="*", help=f"{', '.join(PARTS)} (default: all)")
    args = parser.parse_args(argv)
    for part in args.parts:
        one_of("PART", part, PARTS)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fmjax-corpus-"))
    try:
        prepare_files(folder, args.text, int(args.gigabytes * 1e9))
        found = []
        for row in rows(folder, args.parts or PARTS):
            say(": ".join(row[:2]))
            found.append(row)
        print(markdown(("what", "measured", "bar", "met"), found))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


def prepare_files(folder: Path, text: str | None, size: int) -> None:
    """Writes the texts and the tokenizers, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / KINDS[-1]).exists():
        return
    real = paragraphs(text)
    for name, most in (("small", 10**6), ("rate", RATE_BYTES), ("large", size)):
        write_corpus(folder / f"{name}.txt", real, most)
    for kind in KINDS:
        train_tokenizer(real, kind, 8000).save(folder / kind)


if __name__ == "__main__":
    main(sys.argv[1:])
