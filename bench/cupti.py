"""The GPU kernels that a process runs, by CUPTI, which JAX's CUDA plugin has."""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
from collections.abc import Generator


@contextlib.contextmanager
def gpu_kernels(found: list[tuple[str, float]]) -> Generator[None]:
    """Appends (name, microseconds) of every GPU kernel that this process ran inside, JAX's or not, in order (CUPTI)."""
    from jax._src.lib import mosaic_gpu as library  # absent where jaxlib was built without CUDA

    cupti = library._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        yield
    finally:
        found.extend((name, 1e3 * milliseconds) for name, milliseconds in cupti._cupti_get_timings(True))  # noqa: FBT003
