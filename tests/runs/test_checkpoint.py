"""Checkpoints come back bit for bit or not at all: damage, kills, full disks and other meshes."""

from __future__ import annotations

import ctypes
import json
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fmjax.errors import UserError
from fmjax.runs.checkpoint import Best, CheckpointReader, Checkpoints
from fmjax.runs.manifest import MANIFEST

KILLER = """
import multiprocessing, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from fmjax.runs.checkpoint import Checkpoints

def save_forever(folder, told):
    checkpoints = Checkpoints(Path(folder), keep=2)
    for step in range(1, 10**6):
        params = {name: jax.random.normal(jax.random.key(step + i), (512, 256)) for i, name in enumerate("abc")}
        checkpoints.save(step, {"params": params, "step": jnp.int32(step)}, {"next": step})
        told.send(step)

for number, folder in enumerate(sys.argv[1:]):
    hears, tells = multiprocessing.Pipe(duplex=False)
    saver = multiprocessing.get_context("fork").Process(target=save_forever, args=(folder, tells))
    saver.start()
    while hears.recv() < 4:
        pass
    time.sleep(0.05 * number)
    saver.kill()
    saver.join()
"""

FULL_DISK = """
import resource, sys
from pathlib import Path
import jax
from fmjax.errors import UserError
from fmjax.runs.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(sys.argv[1]))
params = {name: jax.random.normal(jax.random.key(0), (256, 256)) for name in "abcdefghijkl"}
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for step in range(3):
    try:
        checkpoints.save(step, {"params": params, "opt_state": params}, {})
        checkpoints.wait()
    except UserError as error:
        print(error)
checkpoints.close()
"""


def mesh(*shape: int) -> Mesh:
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def make_items(step: int) -> dict[str, Any]:
    """A small state with what real ones have: named tuples, empty states, a scalar and two dtypes."""
    key = jax.random.key(step)
    params = {"mlp": {"kernel": jax.random.normal(key, (8, 16)), "bias": jnp.full((16,), step, jnp.bfloat16)}}
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return {"params": params, "opt_state": {"main": transform.init(params)}, "step": jnp.int32(step)}


def abstract_of(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(assert_same_array, found, expected)  # Raises where the structures differ.


def assert_same_array(found: jax.Array, expected: jax.Array) -> None:
    assert found.dtype == expected.dtype
    assert found.sharding.is_equivalent_to(expected.sharding, expected.ndim)
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


def write(directory: Path, *steps: int, keep: int = 9) -> None:
    with closing(Checkpoints(directory, keep=keep)) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_items(step), {"next": step})


def listing(directory: Path) -> dict[str, Any]:
    paths = sorted(directory.rglob("*"))
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def flip(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow past 64 KiB: writes fail as they do where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def big_items() -> dict[str, Any]:
    return {"params": {"kernel": jax.random.normal(jax.random.key(0), (512, 512))}}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole steps 1 and 2, to be copied."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    write(directory, 1, 2)
    return directory


@pytest.fixture
def saved(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "checkpoints"))


def test_what_was_saved_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    items, data = make_items(7), {"index": 2**60, "text": ["a", None], "rate": 0.1}
    with closing(Checkpoints(tmp_path / "run" / "checkpoints")) as checkpoints:
        assert checkpoints.latest() is None and checkpoints.best() is None and checkpoints.steps() == []
        checkpoints.save(7, items, data, {"accuracy": 0.5})
        data["index"] = 0
        checkpoints.wait()
        assert checkpoints.latest() == 7
        assert checkpoints.items(7) == ["params", "opt_state", "step"]
        assert checkpoints.data(7) == {"index": 2**60, "text": ["a", None], "rate": 0.1}
        assert checkpoints.metrics(7) == {"accuracy": 0.5}
        restored = checkpoints.restore(7, abstract_of(items))
        assert_same(restored, items)
    assert capfd.readouterr() == ("", "")


def test_items_are_read_alone(saved: Path) -> None:
    params = make_items(2)["params"]
    restored = CheckpointReader(saved).restore(2, {"params": abstract_of(params)})
    assert list(restored) == ["params"]
    assert_same(restored["params"], params)


def test_leaves_without_a_sharding_come_on_the_first_device(tmp_path: Path) -> None:
    bias = jnp.arange(16.0)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {"params": jax.device_put(bias, NamedSharding(mesh(8), PartitionSpec("data")))}, {})
    restored = CheckpointReader(tmp_path).restore(1, {"params": jax.ShapeDtypeStruct((16,), jnp.float32)})
    assert_same(restored["params"], bias)


def test_item_without_arrays(tmp_path: Path) -> None:
    items = {"params": {"bias": jnp.ones(3)}, "opt_state": optax.sgd(0.1).init({})}
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, items, {})
        checkpoints.wait()
        assert_same(checkpoints.restore(1, abstract_of(items)), items)
        assert checkpoints.restore(1, {"opt_state": items["opt_state"]}) == {"opt_state": items["opt_state"]}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (((8,), ("data",)), ((2, 4), ("model", "data"))),
        (((2, 4), ("data", "model")), ((1,), ())),
        (((1,), ()), ((8,), (None, "data"))),
    ],
)
def test_restores_onto_another_mesh(tmp_path: Path, before: Any, after: Any) -> None:
    kernel = jax.random.normal(jax.random.key(0), (16, 32))
    meshes = [mesh(*shape) for shape, _ in (before, after)]
    places = [NamedSharding(one, PartitionSpec(*spec)) for one, (_, spec) in zip(meshes, (before, after), strict=True)]
    items, expected = ({"params": {"kernel": jax.device_put(kernel, place)}} for place in places)
    with closing(Checkpoints(tmp_path)) as checkpoints, jax.set_mesh(meshes[0]):
        checkpoints.save(1, items, {})
    with jax.set_mesh(meshes[1]):
        assert_same(CheckpointReader(tmp_path).restore(1, abstract_of(expected)), expected)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("data")])
def test_donating_the_state_does_not_change_what_is_written(tmp_path: Path, spec: PartitionSpec) -> None:
    place = NamedSharding(mesh(2), spec)
    train_step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * -1.5 + 1, state), donate_argnums=0)
    state = {name: jax.device_put(jax.random.normal(jax.random.key(i), (1024, 512)), place) for i, name in enumerate("ab")}
    twin, expected = jax.tree.map(jnp.copy, state), {}
    with closing(Checkpoints(tmp_path, keep=9)) as checkpoints:
        for step in range(4):
            # The twin is looked at instead of the state: a view that NumPy holds would keep the buffer from being donated.
            expected[step] = jax.tree.map(np.array, twin)
            old = state["a"]
            checkpoints.save(step, {"params": state}, {})
            for _ in range(3):
                state, twin = train_step(state), train_step(twin)
            assert old.is_deleted()
        checkpoints.wait()
        for step in expected:
            found = checkpoints.restore(step, {"params": abstract_of(state)})["params"]
            assert all(np.array_equal(found[name], expected[step][name]) for name in "ab")


def test_overwriting_the_state_does_not_change_what_is_written(tmp_path: Path) -> None:
    """As if a runtime donated without asking: the bytes of the saved arrays are overwritten as soon as `save` returns."""
    with closing(Checkpoints(tmp_path, keep=9)) as checkpoints:
        for step in range(3):
            params = {name: jax.random.normal(jax.random.key(step), (1024, 512)) for name in "abcd"}
            expected = np.array(jnp.copy(params["a"]))
            checkpoints.save(step, {"params": params}, {})
            for leaf in params.values():
                ctypes.memset(leaf.unsafe_buffer_pointer(), 0x55, leaf.nbytes)
            checkpoints.wait()
            for found in checkpoints.restore(step, {"params": abstract_of(params)})["params"].values():
                assert np.array_equal(found, expected)


def test_saving_goes_on_behind_the_training(tmp_path: Path) -> None:
    params = {name: jax.random.normal(jax.random.key(0), (1024, 1024)) for name in "abcd"}
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(0, {"params": params}, {})
        checkpoints.wait()
        checkpoints.save(1, {"params": params}, {})
        assert checkpoints.steps() == [0]
        checkpoints.wait()
        assert checkpoints.steps() == [0, 1]


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    best = Best("loss", "min")
    with closing(Checkpoints(tmp_path, keep=2, best=best)) as checkpoints:
        for step, loss in enumerate([float("nan"), 1.0, 3.0, 1.0, 2.0, None]):
            checkpoints.save(step, {"params": {"w": jnp.ones(2)}}, {}, None if loss is None else {"loss": loss})
    assert CheckpointReader(tmp_path).steps() == [1, 4, 5]
    assert CheckpointReader(tmp_path, best=best).best() == 1
    assert CheckpointReader(tmp_path, best=Best("loss")).best() == 4
    assert CheckpointReader(tmp_path, best=Best("accuracy")).best() is None
    assert CheckpointReader(tmp_path).best() is None
    flip(tmp_path / "1" / MANIFEST)
    assert CheckpointReader(tmp_path, best=best).best() == 4


def test_a_damaged_bit_is_found_in_any_file(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = [path for path in sorted((saved / "2").rglob("*")) if path.is_file()]
    assert len(files) > 10 and saved / "2" / MANIFEST in files
    for path in files:
        whole = path.read_bytes()
        for place in (0, 0.3, 1):
            flip(path, place)
            assert CheckpointReader(saved).latest() == 1
            output, line = capfd.readouterr()
            assert output == "" and line.count("\n") == 1 and line.startswith("warning: ")
            assert str(saved / "2") in line and path.name in line
            path.write_bytes(whole)
    assert CheckpointReader(saved).latest() == 2
    assert capfd.readouterr().err == ""


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_the_writer_sets_a_damaged_step_aside(saved: Path, harm: Any, capfd: pytest.CaptureFixture[str]) -> None:
    largest = max((saved / "2" / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    harm(largest)
    left = sorted(path.name for path in (saved / "2").rglob("*"))
    with closing(Checkpoints(saved)) as checkpoints:
        assert checkpoints.latest() == 1
        line = capfd.readouterr().err
        assert line.count("\n") == 1 and "set aside as 2.damaged" in line and largest.name in line
        assert sorted(path.name for path in (saved / "2.damaged").rglob("*")) == left
        assert_same(checkpoints.restore(1, abstract_of(make_items(1))), make_items(1))
        checkpoints.save(2, make_items(2), {})
        checkpoints.wait()
        flip(saved / "2" / MANIFEST)
        assert checkpoints.latest() == 1
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2.damaged", "2.damaged+"]
    with closing(Checkpoints(saved)) as checkpoints:
        assert checkpoints.latest() == 1


def test_no_whole_step_is_an_error_and_stays_one(saved: Path) -> None:
    for step in ("1", "2"):
        flip(saved / step / MANIFEST)
    for kind in (CheckpointReader, Checkpoints, Checkpoints, CheckpointReader):
        with pytest.raises(UserError, match="every checkpoint is damaged; put one back"):
            kind(saved).latest()


def test_a_damaged_step_is_not_restored(saved: Path) -> None:
    flip(saved / "2" / "params" / "_METADATA")
    with pytest.raises(UserError, match="2: this checkpoint is damaged: params/_METADATA does not match its checksum"):
        CheckpointReader(saved).restore(2, abstract_of(make_items(2)))


def test_a_renamed_step_is_not_taken_for_another(saved: Path) -> None:
    (saved / "2").rename(saved / "9")
    assert CheckpointReader(saved).latest() == 1


def test_only_what_a_kill_left_is_cleaned_away(saved: Path) -> None:
    (saved / "2" / MANIFEST).unlink()
    (saved / "2" / f"{MANIFEST}.new").touch()
    shutil.copytree(saved / "1", saved / "3.orbax-checkpoint-tmp")
    shutil.copytree(saved / "1", saved / "4.deleted")
    (saved / "4.deleted" / MANIFEST).unlink()
    (saved / "99").mkdir()
    foreign = ["notes.txt", "2024/photo.png", "best/params.npz", "7.zip", ".hidden", "5"]
    for name in foreign:
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text("mine")
    before = listing(saved)
    reader = CheckpointReader(saved, best=Best("loss"))
    assert reader.latest() == 1 and reader.steps() == [1] and reader.best() is None
    reader.restore(1, abstract_of(make_items(1)))
    assert listing(saved) == before

    with closing(Checkpoints(saved)) as checkpoints:
        assert checkpoints.latest() == 1
        assert sorted(path.name for path in saved.iterdir()) == sorted({"1"} | {name.split("/")[0] for name in foreign})
        checkpoints.save(99, make_items(99), {})
    assert CheckpointReader(saved).latest() == 99
    assert all((saved / name).read_text() == "mine" for name in foreign)


def test_reading_makes_no_folder(tmp_path: Path) -> None:
    reader = CheckpointReader(tmp_path / "none")
    assert reader.latest() is None and reader.steps() == []
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_not_there(saved: Path) -> None:
    reader = CheckpointReader(saved)
    for ask in (reader.items, reader.data, reader.metrics, lambda step: reader.restore(step, {})):
        with pytest.raises(UserError, match=r"has no checkpoint of step 3; choose one of its steps: 1, 2$"):
            ask(3)


def test_misfits_are_listed_by_name(saved: Path) -> None:
    abstract = abstract_of(make_items(1))
    abstract["params"] = {
        "mlp": {"kernel": jax.ShapeDtypeStruct((8, 17), jnp.float32), "bias": jax.ShapeDtypeStruct((16,), jnp.float32)},
        "head": {f"layer_{i}": jax.ShapeDtypeStruct((1,), jnp.float32) for i in range(12)},
    }
    abstract["opt_state"] = {}
    with pytest.raises(UserError) as caught:
        CheckpointReader(saved).restore(1, abstract)
    message = str(caught.value)
    assert "missing (12): params/head/layer_0, " in message and message.count("params/head") == 10 and ", ...;" in message
    assert "unexpected (5): opt_state/main/1/0/count, opt_state/main/1/0/mu/mlp/bias" in message
    assert "misshapen (2): params/mlp/bias bfloat16[16], expected float32[16]" in message
    assert "params/mlp/kernel float32[8,16], expected float32[8,17]" in message
    with pytest.raises(UserError, match=r"missing \(1\): ema/value"):
        CheckpointReader(saved).restore(1, {"ema": jax.ShapeDtypeStruct((), jnp.float32)})


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_a_failed_save_is_told_at_the_next_call(saved: Path, call: str) -> None:
    checkpoints = Checkpoints(saved)
    with full_disk():
        checkpoints.save(3, big_items(), {})
        calls = {"save": lambda: checkpoints.save(4, big_items(), {}), "wait": checkpoints.wait, "close": checkpoints.close}
        with pytest.raises(UserError, match=r"3: the checkpoint could not be written .*File too large.* from step 2$") as caught:
            calls[call]()
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in saved.iterdir()) == ["1", "2"]
    if call != "close":
        checkpoints.save(3, big_items(), {})
        checkpoints.close()
        assert CheckpointReader(saved).latest() == 3


def test_a_failed_save_leaves_the_screen_clean(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, tmp_path], capture_output=True, text=True, timeout=100)
    assert ended.stdout.count("could not be written") == ended.stdout.count("\n") == 3
    assert (ended.stderr, ended.returncode) == ("", 0)


def test_a_folder_in_the_way(saved: Path, tmp_path: Path) -> None:
    with closing(Checkpoints(saved)) as checkpoints:
        with pytest.raises(UserError, match="2: the checkpoint could not be written"):
            checkpoints.save(2, make_items(2), {})
        assert checkpoints.latest() == 2
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: cannot be made"):
        Checkpoints(tmp_path / "file")


def test_bad_settings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep=0: .*; use 1 or more"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(UserError, match='mode "most" of the metric loss is unknown; choose max or min'):
        Best("loss", "most")


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_items(1), {})
    checkpoints.close()
    checkpoints.close()
    assert set(threading.enumerate()) <= before


def test_a_kill_at_any_moment_leaves_whole_steps(tmp_path: Path) -> None:
    """Processes that save without pause are killed, each at another moment of a save; then their folders are used on.

    They are forked from one that has imported JAX but not started it, which spares most of their start.
    """
    folders = [tmp_path / str(number) for number in range(3)]
    subprocess.run([sys.executable, "-W", "ignore", "-c", KILLER, *folders], check=True, timeout=100)
    left = [path for folder in folders for path in folder.iterdir() if not (path / MANIFEST).exists()]
    assert left, "no process was killed while it saved"
    for folder in folders:
        whole = CheckpointReader(folder).steps()
        assert whole and max(whole) >= 3
        with closing(Checkpoints(folder)) as checkpoints:
            assert checkpoints.latest() == max(whole)
            assert {path.name for path in folder.iterdir()} == {str(step) for step in whole}
            for step in whole:
                assert checkpoints.data(step) == {"next": step}
                shapes = {"params": {name: jax.ShapeDtypeStruct((512, 256), jnp.float32) for name in "abc"}}
                items = checkpoints.restore(step, shapes | {"step": jax.ShapeDtypeStruct((), jnp.int32)})
                assert int(items["step"]) == step
                for i, name in enumerate("abc"):
                    assert np.array_equal(items["params"][name], jax.random.normal(jax.random.key(step + i), (512, 256)))
            checkpoints.save(max(whole) + 1, {"step": jnp.int32(0)}, {})
        assert CheckpointReader(folder).latest() == max(whole) + 1


def test_the_manifest_can_be_checked_by_hand(saved: Path) -> None:
    """`sha256sum` on any file gives what stands in the manifest."""
    manifest = json.loads((saved / "2" / MANIFEST).read_text())
    assert manifest["step"] == 2 and manifest["items"]["params"]["mlp/kernel"] == "float32[8,16]"
    name = next(name for name in manifest["files"] if name.startswith("params/"))
    digest = subprocess.run(["sha256sum", saved / "2" / name], capture_output=True, text=True, check=True).stdout.split()[0]
    assert manifest["files"][name] == {"size": (saved / "2" / name).stat().st_size, "sha256": digest}
