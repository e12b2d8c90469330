"""Kernels compiled for an H200 on a machine without a GPU: registers and spills, from the assembler's own report.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of the installed JAX, and a ptxas on PATH.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150754820096 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""


class Report(NamedTuple):
    registers: int
    spill_bytes: int


def missing() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    wheels = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13")
    for wheel in wheels:
        try:
            found = importlib.util.find_spec(wheel)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return (
                f"compiling for a GPU needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt ({wheel} is not installed)"
            )
    if shutil.which("ptxas") is None:
        return "compiling for a GPU needs ptxas on PATH (wheel nvidia-cuda-nvcc)"
    if os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") != "1":
        return "the CUDA plugin loads without cuDNN only where JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 is set"
    return None


def _compiled(function: Callable[..., Any], *structs: jax.ShapeDtypeStruct) -> Any:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("h200", platform="cuda", target_config=H200, topology="1x1x1")
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    placed = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in structs]
    jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
    return jitted.trace(*placed).lower(lowering_platforms=("cuda",)).compile()


def optimised_for_h200(function: Callable[..., Any], *structs: jax.ShapeDtypeStruct) -> str:
    """XLA's program after all its passes."""
    return _compiled(function, *structs).as_text()


def compile_for_h200(function: Callable[..., Any], *structs: jax.ShapeDtypeStruct) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            _compiled(function, *structs)
        finally:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        report = "".join(path.read_text() for path in Path(folder).glob("*.ptxas"))
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", report)]
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", report)]
    return Report(max(registers), max(spills))
