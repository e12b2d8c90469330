"""Lines of L2 that a kernel asked to keep (evict_last): ordinary reads and writes do not drive them out.

torch.compile's kernels ask for it where they read a row twice. What such a kernel had read was still in L2 after a
flush: the next call on the same operands took 2 to 7 % less (bench/results/hints_h200_2026-11-30.log).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import jax


@functools.cache
def driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _ask(function: str, *arguments: Any) -> None:
    if status := getattr(driver(), function)(*arguments):
        raise RuntimeError(f"{function} answered {status}, a CUresult; lines that a kernel asked to keep stay in L2")


@functools.cache
def _context(device: int) -> ctypes.c_void_p:
    """The primary one, which JAX and torch use. It stays for the life of the process."""
    found = ctypes.c_void_p()
    _ask("cuDevicePrimaryCtxRetain", ctypes.byref(found), device)
    return found


def release() -> None:
    """Makes them ordinary lines, on JAX's first GPU, on which nothing may run meanwhile."""
    before = ctypes.c_void_p()
    _ask("cuCtxPushCurrent_v2", _context(jax.devices()[0].local_hardware_id))
    try:
        _ask("cuCtxResetPersistingL2Cache")
    finally:
        _ask("cuCtxPopCurrent_v2", ctypes.byref(before))
