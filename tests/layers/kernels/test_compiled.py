"""What the TPU compiler says of the kernels, where libtpu is installed: `pip install -e '.[plan]'`."""

from __future__ import annotations

import pytest

from fmjax.bench.kernels import CASES, gradient
from fmjax.planning.topology import read_topology

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def device():
    pytest.importorskip("libtpu")
    return read_topology("v5e:2x2").devices()[0]


FEWER = [("all", "splash"), ("window 128", "splash"), ("a bias", "flash"), ("a bias of distances", "relative")]


@pytest.mark.parametrize(("case", "kernel"), FEWER)
def test_a_kernel_moves_at_most_three_fifths_of_the_bytes(device, case, kernel):
    causal, window, biased, _ = CASES[case]
    moved = [gradient(name, causal, window, biased, device).cost_analysis()["bytes accessed"] for name in (kernel, "xla")]
    assert moved[0] < 0.6 * moved[1]
