"""Options of XLA's compiler for programs on several devices, by platform."""

from __future__ import annotations

from jax.sharding import Mesh

# GPUs: the scheduler that runs collectives beside products. NVIDIA's JAX images set it, too
# (docs.nvidia.com/jax-toolbox/environment-variables). Its effect is not measured here.
# TPUs: none. Their compiler overlaps most collectives by default (fmjax/bench/README.md).
OPTIONS: dict[str, dict[str, bool]] = {"gpu": {"xla_gpu_enable_latency_hiding_scheduler": True}}


def compiler_options(mesh: Mesh) -> dict[str, bool]:
    """Returns the options for a program on the devices of a mesh; none for a single device."""
    return OPTIONS.get(mesh.devices.flat[0].platform, {}) if mesh.size > 1 else {}
