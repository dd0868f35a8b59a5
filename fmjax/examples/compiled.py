"""Programs that several runs share are compiled once."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

FOLDER = "jax_compilation_cache_dir"
ALL: dict[str, object] = {
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compiled_programs(small: bool = False) -> Iterator[None]:
    """Compiles a program that several runs share, such as the step of fine-tuning, only once:
    with JAX's compilation cache, in a temporary folder unless the user has named one.

    Args:
      small: also keep programs that compile fast, which JAX leaves out.
    """
    if jax.config.values[FOLDER]:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fmjax-compiled-") as folder:
        values: dict[str, object] = {FOLDER: folder}
        if small:
            values |= ALL
        before = {name: jax.config.values[name] for name in values}
        try:
            change(values)
            yield
        finally:
            change(before)


def change(values: dict[str, object]) -> None:
    """Changes settings of the cache. JAX reads them only once, so the cache starts anew."""
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
