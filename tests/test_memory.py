"""Memory that is freed stays with the process: taken again, its pages need not be mapped anew."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import numpy as np
from fmjax.memory import keep_freed
if sys.argv[1] == "kept":
    assert keep_freed()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    arrays = [np.ones(size << 20, np.uint8) for size in (1, 8, 40, 100)]
step()
before = faults()
for _ in range(5):
    step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_pages_are_mapped_once():
    found = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "returned")
    }
    assert found["kept"] < 50
    assert found["returned"] > 5000  # else there would be nothing to gain
