"""GPUs that are not here, as JAX describes them: what a program is lowered and compiled for on a machine without one.

Needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt of the installed JAX, from 0.11 on.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import jax

from pallas_norm.plans.hardware import Gpu, generation


class Card(NamedTuple):
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    threads: int = 2048  # that an SM holds
    ctas: int = 32

    @property
    def shared_bytes(self) -> int:
        return generation(self.capability).shared_bytes

    @property
    def gpu(self) -> Gpu:
        return Gpu(self.capability, self.shared_bytes, self.multiprocessors)


# NVIDIA's data sheets, and the CUDA C++ Programming Guide's technical specifications by compute capability.
CARDS = {
    "A100": Card("NVIDIA A100-SXM4-40GB", (8, 0), 108),
    "A10": Card("NVIDIA A10", (8, 6), 72, 1536, 16),
    "RTX 3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 1536, 16),
    "L4": Card("NVIDIA L4", (8, 9), 58, 1536, 24),
    "L40S": Card("NVIDIA L40S", (8, 9), 142, 1536, 24),
    "RTX 4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 1536, 24),
    "H200": Card("NVIDIA H200", (9, 0), 132),
    "B200": Card("NVIDIA B200", (10, 0), 148),
    "B300": Card("NVIDIA B300", (10, 3), 148),
    "RTX 5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 170, 1536, 24),
    "GB10": Card("NVIDIA GB10", (12, 1), 48, 1536, 24),
}


def name_of(card: Card) -> str:
    return next(name for name, known in CARDS.items() if known == card)


def missing() -> str | None:
    """Why no GPU can be described here, or None."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} describes no GPU that is not here; needed 0.11 or newer"
    for wheel in ("jax_cuda13_plugin", "jax_plugins.xla_cuda13"):
        try:
            found = importlib.util.find_spec(wheel)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return f"describing a GPU needs the wheels jax-cuda13-plugin and jax-cuda13-pjrt ({wheel} is not installed)"
    if os.environ.get("JAX_SKIP_CUDA_CONSTRAINTS_CHECK") != "1":
        return "the CUDA plugin loads without cuDNN only where JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 is set"
    return None


def description(card: Card) -> str:
    major, minor = card.capability
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"  # sm_90a, sm_100a, sm_120a, as XLA says of such a GPU
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared_bytes + 1024} shared_memory_per_block_optin: {card.shared_bytes}
  threads_per_core_limit: {card.threads} core_count: {card.multiprocessors} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 1500000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.7 device_memory_size: 42949672960
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 13 }}
device_description_str: "{card.name}"
"""


@functools.cache
def described(card: str, *, count: int = 1) -> list[Any]:
    """Devices of JAX's of that card, for which programs are lowered and compiled, not run."""
    from jax.experimental import topologies

    text = description(CARDS[card])
    return topologies.get_topology_desc("gpu", platform="cuda", target_config=text, topology=f"1x1x{count}").devices
