"""The race detector of Pallas's GPU interpreter."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator
from unittest import mock

from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_norm import _compat


@contextlib.contextmanager
def race_detection() -> Generator[Callable[[], bool]]:
    """Kernels interpreted inside have their races detected; the value tells whether the last one had any."""
    detecting = functools.partial(_compat.interpret_params, detect_races=True)
    with mock.patch.object(_compat, "interpret_params", detecting):
        yield lambda: gpu_callbacks.get_races().races_found
