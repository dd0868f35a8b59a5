"""Settings that every test runs under: eight fake CPU devices, strict shapes, no network, no TensorFlow, quick compilation."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
# Compiling takes longer than running what is as small as here. Scripts that tests start inherit this.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
if importlib.metadata.version("jax").startswith("0.10."):  # newer ones end with an error at a flag that they do not know
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import jax
import pytest
from support import bucket

# No test depends on how fast the machine is.
hypothesis.settings.register_profile("no_clock", deadline=None)
hypothesis.settings.load_profile("no_clock")
jax.config.update("jax_numpy_rank_promotion", "raise")

LARGE = 1.2e9  # bytes; the next file takes up to half as many again
ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="run one test in N, always the same")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    count = config.getoption("--one-in")
    if count == 1:
        return
    kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % count == 0]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps what tests unpack out of the user's cache."""
    os.environ["FMJAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def bucket_service() -> Iterator[bucket.Service]:
    """Google Cloud Storage with one bucket; skips the test where the packages are missing."""
    if name := bucket.missing():
        pytest.skip(f"{name} is not installed: pip install gcsfs gcp-storage-emulator")
    with bucket.serving() as service:
        yield service


@pytest.fixture(scope="module", autouse=True)
def compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles as users do in a file that is marked `optimized`; frees compiled programs once they take much memory."""
    optimized = request.node.get_closest_marker("optimized") is not None
    if optimized:
        free()
        jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
    if optimized or resident() > LARGE:
        free()


def resident() -> float:
    """Returns the bytes of memory that this process holds; infinity where only Linux could tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return math.inf
    return pages * os.sysconf("SC_PAGE_SIZE")


def free() -> None:
    jax.clear_caches()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's; otherwise it keeps what was freed
        trim(0)


@pytest.fixture
def eager() -> Iterator[None]:
    """Runs operation by operation what is so small that compiling it takes longer."""
    with jax.disable_jit():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which is beside the checkout in development and absent for most users."""
    folder = Path(os.environ.get("FMJAX_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets: {folder} is not there (set FMJAX_DATA)")
    return folder
