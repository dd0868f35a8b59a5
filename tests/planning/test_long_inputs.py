"""Long inputs in a ring fit onto chips, as the TPU's compiler counts; no TPU is touched.

The figures are those of fmjax/bench/README.md: pytest -m full -s tests/planning/test_long_inputs.py, with libtpu.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
LLAMA_1B = {
    "model.width": 2048, "model.layers": 16, "model.attention_heads": 32, "model.kv_heads": 8, "model.mlp_width": 8192,
    "model.tied": True, "model.dtype": "bfloat16", "model.remat": "dots", "data.vocab_size": 128256, "mesh.rules": "fsdp_context",
}  # fmt: skip


@pytest.mark.parametrize(
    ("topology", "length", "rows", "axes", "most"),
    [("v5e:4x4", 8192, 8, {"fsdp": 8, "context": 2}, 9), ("v5p:2x2x2", 32768, 1, {"context": 8}, 40)],
)
def test_a_step_of_llama_1b_fits(topology, length, rows, axes, most):
    """In a process of its own: libtpu plans for one kind of chip."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu")
    sizes = LLAMA_1B | {"data.max_length": length, "data.batch_size": rows, "mesh.axes": json.dumps(axes)}
    flags = [f"--config.{key}={value}" for key, value in sizes.items()]
    command = [sys.executable, "scripts/plan.py", "--config", "configs/gpt_clm.py:llama", "--topology", topology, "--json"]
    # A program compiled with few optimizations, as in other tests, needs more memory.
    dropped = ("TPU_ACCELERATOR_TYPE", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    given = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run([*command, *flags], cwd=ROOT, env=given, capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout.splitlines()[-1])
    needed = plan["total_bytes"] / 2**30
    print(f"{topology}: {needed:.1f} GiB per chip")
    assert plan["fits"] and plan["attention"] == "ring" and needed <= most
