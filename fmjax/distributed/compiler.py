"""Options of XLA's compiler, by platform."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

# Programs on several devices.
# GPUs: the scheduler that runs collectives beside products. NVIDIA's JAX images set it, too
# (docs.nvidia.com/jax-toolbox/environment-variables). Its effect is not measured here.
# TPUs: none. Their compiler overlaps most collectives by default (fmjax/bench/README.md).
OPTIONS: dict[str, dict[str, bool]] = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}

# Programs that run once, such as the one that draws the initial parameters. LLVM at level 1 makes
# the same machine arithmetic of them with fewer passes: the quickstart's BERT takes 3.3 instead of
# 8.4 s of CPU time on jax 0.12, 4.1 instead of 7.6 on 0.10.2, with equal bits. Level 0 does not
# give equal bits.
ONCE: dict[str, dict[str, int]] = {"cpu": {"xla_backend_optimization_level": 1}}


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Returns the options for a program on the devices of a mesh; none for a single device."""
    return OPTIONS.get(mesh.devices.flat[0].platform, {}) if mesh.size > 1 else {}


def options_once(mesh: Mesh) -> dict[str, int]:
    """Returns the options for a program that runs once.

    None if JAX is told to disable most optimizations, which says more than they do.
    """
    if jax.config.read("jax_disable_most_optimizations"):
        return {}
    return ONCE.get(mesh.devices.flat[0].platform, {})
