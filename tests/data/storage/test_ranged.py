"""Remote files that are read by range: few bytes, one version of each file, faults, and the same data as from a local copy."""

from __future__ import annotations

import json
import pickle
import random
from types import SimpleNamespace

import fsspec
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from fmjax.data.identity import identity
from fmjax.data.sources.open import open_source
from fmjax.data.storage import cache, ranged, ranged_arrow, remote
from fmjax.data.storage.fingerprints import data_differences, needs_contents, with_digests
from fmjax.data.storage.ranged import TRAFFIC
from fmjax.data.storage.token_store import stored_in
from fmjax.data.tokenizers.tokenizer import load_tokenizer
from fmjax.errors import UserError
from fmjax.filesystems.paths import set_up
from fmjax.tasks import corpus
from fmjax.train import stages

KINDS = ("array_record", "parquet", "arrow")
draw = random.Random(0)
ROWS = [{"text": draw.randbytes(1000).hex(), "label": number % 3} for number in range(3000)]


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
    """An empty file system at memory://, of which files of any size are read by range."""
    monkeypatch.setenv("FMJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(remote.SCHEMES, "memory", "fsspec")
    monkeypatch.setattr(remote, "COPIED", 0)
    monkeypatch.setattr(ranged, "PAUSE", 0.0)
    system = fsspec.filesystem("memory")
    system.pipe_file("/b/none", b"")
    yield system
    system.rm("/b", recursive=True)


def write_records(path, rows=ROWS, options: str = "group_size:1"):
    writer = ArrayRecordWriter(str(path), options)
    for row in rows:
        writer.write(json.dumps(row).encode())
    writer.close()
    return path


def write(path, rows=ROWS):
    """Writes records in the format of the file's extension."""
    if path.suffix == ".array_record":
        return write_records(path, rows)
    table = pa.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=50, write_statistics=False)
        return path
    writer = (pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream)(str(path), table.schema)
    for batch in table.to_batches(max_chunksize=50):
        writer.write_batch(batch)
    writer.close()
    return path


def put(memory, path) -> str:
    memory.pipe_file(f"/b/{path.name}", path.read_bytes())
    return f"memory://b/{path.name}"


def spent(call):
    """Returns the result of a call, and the bytes that it read by range."""
    before = TRAFFIC.bytes
    return call(), TRAFFIC.bytes - before


@pytest.mark.parametrize("name", ["x.array_record", "x.parquet", "file.arrow", "stream.arrow"])
def test_the_first_batch_reads_a_small_share(memory, tmp_path, name):
    path = write(tmp_path / name)
    size, local = path.stat().st_size, open_source("auto", str(path), "train")
    address = put(memory, path)
    source, opening = spent(lambda: open_source("auto", address, "train"))
    assert len(source) == len(ROWS) and source.columns == local.columns and source.where(7) == local.where(7)
    chosen = range(100, 132)
    batch, reading = spent(lambda: [source[index] for index in chosen])
    assert batch == [ROWS[index] for index in chosen] and opening + reading < 0.15 * size
    assert not list((tmp_path / "cache").rglob(name))  # no copy
    packed = pickle.loads(pickle.dumps(source))
    again, read = spent(lambda: [packed[index] for index in (131, 2999, -1)])
    assert again == [ROWS[index] for index in (131, 2999, -1)] and read < 0.1 * size and len(pickle.dumps(source)) < 2000
    assert source.value(5, "label") == 2
    whole, read = spent(lambda: [source[index] for index in range(len(source))])
    assert whole == ROWS and read <= 1.05 * size


@pytest.mark.parametrize("options", ["64", "7,brotli:3", "3,snappy", "2,uncompressed"])
def test_records_of_any_compression(memory, tmp_path, options):
    rows = [{"n": number, "text": "é" * (70_000 if number % 97 == 0 else number % 300)} for number in range(700)]
    source = open_source("auto", put(memory, write_records(tmp_path / "a.array_record", rows, f"group_size:{options}")), "train")
    order = [*range(300, 330), 699, 0, 5, *range(700)]
    assert [source[index] for index in order] == [rows[index] for index in order]


def test_reading_in_order_takes_few_requests(memory, tmp_path):
    source = open_source("auto", put(memory, write_records(tmp_path / "a.array_record")), "train")
    before = TRAFFIC.requests
    assert [source[index] for index in range(len(ROWS))] == ROWS and TRAFFIC.requests - before < 15


def test_what_is_refused(memory, tmp_path):
    for name in ("cut.array_record", "cut.parquet", "cut.arrow", "file.arrow"):
        content = write(tmp_path / name, ROWS[:200]).read_bytes()
        memory.pipe_file(f"/b/{name}", content[: len(content) // 2])
        with pytest.raises(UserError, match=f"memory://b/{name}: is not a complete .* file") as caught:
            open_source("auto", f"memory://b/{name}", "train")
        assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_by_range_are_copied(memory, tmp_path, monkeypatch):
    """Transposed records, dictionaries, and batches that would take much memory."""
    write_records(tmp_path / "a.array_record", ROWS[:50], "group_size:4,transpose:true")
    table = pa.table({"text": pa.array(["a", "b"]).dictionary_encode()})
    with pa.ipc.new_stream(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    write(tmp_path / "large.arrow", ROWS[:200])
    monkeypatch.setattr(ranged_arrow, "MOST", 2**12)
    for name, first in (("a.array_record", ROWS[0]), ("d.arrow", {"text": "a"}), ("large.arrow", ROWS[0])):
        source = open_source("auto", put(memory, tmp_path / name), "train")
        assert source[0] == first and "sha256" in source.fingerprint()["files"][0]
    assert [record["text"] for record in open_source("auto", "memory://b/d.arrow[50%:]", "train")] == ["b"]


def test_small_and_other_files_are_copied(memory, tmp_path, monkeypatch):
    address = put(memory, write_records(tmp_path / "a.array_record"))
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert open_source("auto", put(memory, tmp_path / "a.txt"), "train")[1] == {"text": "two"}
    monkeypatch.setattr(remote, "COPIED", 2**30)
    source = open_source("auto", address, "train")
    assert source[3] == ROWS[3] and "sha256" in source.fingerprint()["files"][0]


def test_a_file_that_changes_ends_the_run(memory, tmp_path):
    path = write_records(tmp_path / "a.array_record")
    source = open_source("auto", put(memory, path), "train")
    assert source[0] == ROWS[0]
    put(memory, path)
    with pytest.raises(UserError, match="memory://b/a.array_record: was replaced or removed since this run opened it") as caught:
        source[2000]
    assert "\n" not in str(caught.value)
    memory.rm("/b/a.array_record")
    with pytest.raises(UserError, match="was replaced or removed"):
        source[1000]


def test_requests_that_fail_are_repeated(memory, tmp_path, monkeypatch):
    source = open_source("auto", put(memory, write_records(tmp_path / "a.array_record")), "train")
    real, faults = type(memory).cat_file, [OSError("reset"), 10, ValueError("odd")]

    def cat_file(self, path, start=None, end=None, **options):
        fault = faults.pop() if faults else None
        if isinstance(fault, Exception):
            raise fault
        return real(self, path, start, end, **options)[:fault]

    monkeypatch.setattr(type(memory), "cat_file", cat_file)
    before = TRAFFIC.repeated
    assert source[2000] == ROWS[2000] and TRAFFIC.repeated == before + 3
    faults += [OSError("reset")] * 5
    with pytest.raises(UserError, match=r"memory://b/a.array_record: bytes .* cannot be read \(reset\); check the network"):
        source[1000]
    faults[:] = [PermissionError("no")]
    with pytest.raises(UserError, match=r"cannot be read \(no\)"):
        source[1000]


MD5 = "0cc175b9c0f1b6a831c399e269772661"
GOOGLE = {"md5Hash": "DMF1ucDxtqgxw5niaXcmYQ==", "crc32c": "wdBDMA==", "generation": "7", "etag": "x", "updated": "then"}


@pytest.mark.parametrize(
    ("about", "marks"),
    [
        (GOOGLE, {"md5": MD5, "crc32c": "c1d04330"}),
        ({"ETag": f'"{MD5}"', "LastModified": "then"}, {"etag": MD5}),
        ({"content_settings": {"content_md5": bytearray.fromhex(MD5)}, "etag": "y"}, {"md5": MD5}),
        ({"lfs": {"sha256": "ab" * 32}, "blob_id": "z"}, {"sha256": "ab" * 32}),
        ({"blob_id": "ab" * 20}, {"git": "ab" * 20}),
        ({"created": 1}, {}),
    ],
)
def test_what_stores_say_about_a_file(about, marks):
    assert ranged.marks_of(about) == marks


def test_a_run_knows_its_data_from_a_bucket_and_from_a_copy(memory, tmp_path, monkeypatch):
    """Checksums do not depend on the address; a SHA-256 that an earlier version stored is computed once."""
    path = write_records(tmp_path / "a.array_record")
    real = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, name: real(self, name) | GOOGLE | {"generation": ""})
    local, far = (open_source("auto", name, "train") for name in (str(path), put(memory, path)))
    old, new = {"train": local.fingerprint()}, {"train": far.fingerprint()}
    (mark,) = far.fingerprint()["files"]
    assert mark == {"name": "a.array_record", "size": path.stat().st_size, "md5": MD5, "crc32c": "c1d04330"}
    memory.pipe_file("/b/other/b.array_record", path.read_bytes())
    moved = open_source("auto", "memory://b/other/b.array_record", "train")
    assert not data_differences(new, {"train": moved.fingerprint()}) and identity(moved) == identity(far) != identity(local)
    assert len(data_differences(old, new)) == 1  # without a common digest
    assert needs_contents(old, KINDS, remote=True) and not needs_contents(old, KINDS, remote=False)
    assert needs_contents(new, KINDS, remote=False) and not needs_contents(new, KINDS, remote=True)
    with cache.verifying(True):
        verified, read = spent(lambda: {"train": far.fingerprint()})
        again, nothing = spent(lambda: {"train": moved.fingerprint()})
        assert read == path.stat().st_size and nothing == 0 and identity(far) == identity(moved)
    assert not data_differences(old, verified) and not data_differences(new, verified) and not data_differences(old, again)
    kept = with_digests(verified, old)
    assert not needs_contents(kept, KINDS, remote=True) and not needs_contents(kept, KINDS, remote=False)
    monkeypatch.setattr(ranged, "checksums", lambda path: {"md5": MD5})
    with cache.verifying(True):
        assert not data_differences(new, {"train": local.fingerprint()})


def test_a_run_is_resumed_where_its_data_were_copied_before(memory, tmp_path, monkeypatch):
    path = write_records(tmp_path / "a.array_record", ROWS[:9])
    monkeypatch.setattr(stages.tasks, "make", lambda settings: SimpleNamespace(splits={}, resolve=lambda source: {}))
    monkeypatch.setattr(stages, "choose_processors", lambda *given: None)
    monkeypatch.setattr(stages.lifecycle, "hashes", lambda processors: {})
    monkeypatch.setattr(stages.best, "check_metrics", lambda config, task: None)
    real = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, name: real(self, name) | {"md5Hash": ranged.checksums(path)["md5"]})
    monkeypatch.setattr(ranged, "marks_of", lambda about: {"md5": about["md5Hash"]})
    names = [str(path), put(memory, path)]
    for before, after in (names, names[::-1]):
        config = {"task": {}, "data": {"source": "auto", "files": {"train": before}}}
        first = stages.open_data(config, tmp_path, resumed=False)
        (tmp_path / "provenance.json").write_text(json.dumps({"data": first.fingerprints}))
        config["data"]["files"] = {"train": after}
        assert len(stages.open_data(config, tmp_path, resumed=True).sources["train"]) == 9
    put(memory, write_records(tmp_path / "a.array_record", ROWS[1:10]))
    with pytest.raises(UserError, match="the data has changed since the run started"):
        stages.open_data(config, tmp_path, resumed=True)


def test_versions_are_compared_where_requests_do_not_name_them(memory, tmp_path, monkeypatch):
    """As with versions of gcsfs that ignore the generation."""
    real = type(memory).info
    with_generation = lambda about: about | {"generation": str(about.get("created"))}  # noqa: E731
    monkeypatch.setattr(type(memory), "info", lambda self, name: with_generation(real(self, name)))
    monkeypatch.setattr(type(memory), "url", lambda self, path: path, raising=False)
    path = write_records(tmp_path / "a.array_record")
    source = open_source("auto", put(memory, path), "train")
    assert source[0] == ROWS[0]
    put(memory, path)
    with pytest.raises(UserError, match="was replaced or removed"):
        source[2000]


def test_the_token_store_beside_shards(memory, tmp_path):
    """It is found by what the bucket says about the shards, and only the tokens that are used are read."""
    rows = [{"text": " ".join(f"w{(number * step) % 25}" for step in range(60))} for number in range(400)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(25))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = load_tokenizer(tmp_path)
    (tmp_path / "p").mkdir()
    path = write_records(tmp_path / "p" / "p.array_record", rows)
    source = open_source("auto", str(path), "train")
    with stored_in(str(tmp_path / "stores")):
        local = corpus.tokenize(source, "text", tokenizer)
    memory.pipe_file("/b/p/p.array_record", path.read_bytes())
    far = open_source("auto", "memory://b/p/p.array_record", "train")
    folder = local.documents.folder
    header = json.loads((folder / "store.json").read_text())
    mark = {name: value for name, value in far.fingerprint()["files"][0].items() if name != "name"}
    for name in ("tokens.ds", "tokens.ds.index", "tokens.ds.sizes"):
        memory.pipe_file(f"/b/p/{folder.name}/{name}", (folder / name).read_bytes())
    store = f"/b/p/{folder.name}/store.json"
    made = corpus.Made("text", tokenizer)
    own = {"shards": [mark]}
    for other in ({}, {"shards": [mark | {"version": "0"}]}, own | {"tokenizer": "x"}, own | {"format": 9}):
        memory.pipe_file(store, json.dumps(header | other).encode())
        assert made.find(far) is None
    memory.pipe_file(store, json.dumps(header | own).encode())
    found, read = spent(lambda: corpus.tokenize(far, "text", tokenizer))
    assert found.characters == local.characters and found.bytes == local.bytes and found.size == local.size
    assert read == len(far) * 8  # the ends of documents
    row, read = spent(lambda: pickle.loads(pickle.dumps(found)).read(500, 600))
    assert row.tolist() == local.read(500, 600).tolist() and read == 200
    with stored_in("memory://b/p"):  # by the name, which the texts have in another file system, too
        assert made.find(source).read(0, 9).tolist() == local.read(0, 9).tolist()
    memory.pipe_file(f"/b/p/{folder.name}/tokens.ds", b"")
    assert made.find(far) is None
    with pytest.raises(UserError, match="tokens.ds: was replaced or removed"):
        found.read(700, 800)


def test_the_bucket_of_google(bucket_service, tmp_path, monkeypatch):
    """503, broken connections and answers that end in the middle are repeated; a new generation is refused."""
    set_up()
    monkeypatch.setitem(fsspec.config.conf, "gs", fsspec.config.conf["gs"] | {"token": "anon"})
    system = fsspec.filesystem("gs")
    path = write_records(tmp_path / "a.array_record")
    system.pipe_file("runs/ranged/a.array_record", path.read_bytes())
    source, read = spent(lambda: open_source("auto", "gs://runs/ranged/a.array_record", "train"))
    mark = source.fingerprint()["files"][0]
    assert mark["md5"] == ranged.checksums(path)["md5"] and ranged.checksums(path).items() <= mark.items()
    assert source[7] == ROWS[7] and read < 0.15 * path.stat().st_size
    left = []
    with bucket_service.faults(lambda method, path: left.pop() if left and "alt=media" in path else None):
        for index, fault in {1000: 503, 1500: "break", 2000: "cut"}.items():
            left.append(fault)
            assert source[index] == ROWS[index] and not left
    system.pipe_file("runs/ranged/a.array_record", path.read_bytes())
    with pytest.raises(UserError, match="gs://runs/ranged/a.array_record: was replaced or removed"):
        source[11]
