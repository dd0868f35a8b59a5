"""What JAX says of devices and memory becomes one line with a remedy; other errors stay as they are."""

from __future__ import annotations

import jax
import pytest

from fmjax.errors import UserError
from fmjax.hardware import explained, memory_of_devices, memory_of_machine

TPU = (
    "Unable to initialize backend 'tpu': INTERNAL: Failed to open libtpu.so: libtpu.so: cannot open shared object file: "
    "No such file or directory (set JAX_PLATFORMS='' to automatically choose an available backend)"
)
GPU = "Unable to initialize backend 'cuda': Backend 'cuda' is not in the list of known backends: ['cpu', 'tpu']."
ALLOCATION = "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.\nBufferAssignment OOM Debugging.\n  more\n"


@pytest.mark.parametrize(
    ("error", "platforms", "parts"),
    [
        (RuntimeError(TPU), "tpu", ("JAX_PLATFORMS=tpu: JAX finds no such device (Failed to open libtpu.so", "-e '.[tpu]'")),
        (RuntimeError(GPU), "cuda", ("JAX_PLATFORMS=cuda", "unset JAX_PLATFORMS", "pip install -e '.[cuda]'")),
        (jax.errors.JaxRuntimeError(ALLOCATION), "", ("out of memory for 17179869184 bytes", "lower data.batch_size")),
        (MemoryError("Unable to allocate 3.2 GiB for an array"), "", ("out of memory for 3.2 GiB",)),
        (MemoryError(), "", ("out of memory;",)),
    ],
)
def test_one_line_with_a_remedy(error, platforms, parts):
    jax.devices()  # started: what follows changes a name
    before = jax.config.jax_platforms
    try:
        jax.config.update("jax_platforms", platforms or before)
        with pytest.raises(UserError) as caught, explained():
            raise error
    finally:
        jax.config.update("jax_platforms", before)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_an_assertion_of_jax_without_a_word():
    def _init_backend() -> None:
        raise AssertionError  # as JAX_PLATFORMS=cuda does where there is no GPU

    with pytest.raises(UserError, match="JAX finds no such device; unset JAX_PLATFORMS"), explained():
        _init_backend()


@pytest.mark.parametrize("error", [RuntimeError("something else"), AssertionError("ours"), ValueError("x"), UserError("y")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as caught, explained():
        raise error
    assert caught.value is error


def test_the_memory_of_this_machine():
    machine = memory_of_machine()
    assert machine is not None and machine > 2**28
    room = memory_of_devices()
    assert room is not None and room.per_device == pytest.approx(machine / jax.local_device_count())
