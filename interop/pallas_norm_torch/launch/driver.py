"""The CUDA driver: whose context is current, and what an error of it is called.

Everything that happens once a kernel goes through cuda.bindings. The launch itself, which happens at every call, goes
through ctypes with one address for each argument: 0.5 us, not 3.
"""

# pyright: reportMissingImports=false, reportMissingTypeStubs=false, reportAttributeAccessIssue=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# (cuda.bindings is there where torch has CUDA, and has few types)

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Generator
from typing import Any


class Unavailable(Exception):
    """Why a kernel cannot be launched directly."""


class DriverError(RuntimeError):
    """What the driver answered, in its own words."""


@functools.cache
def driver() -> Any:
    try:
        from cuda.bindings import driver as found
    except ImportError as error:
        raise Unavailable(
            "cuda-bindings is not installed, by which CUDA is asked about kernels: "
            "pip install cuda-bindings, of the CUDA version of your torch"
        ) from error
    return found


def words(status: int) -> str:
    """CUDA_ERROR_... (its description) of a CUresult."""
    cuda = driver()
    found: list[str] = []
    for function in (cuda.cuGetErrorName, cuda.cuGetErrorString):
        code, text = function(cuda.CUresult(status))
        found.append(text.decode() if int(code) == 0 else f"CUresult {status}")
    return f"{found[0]} ({found[1]})"


def ask(function: str, *arguments: Any) -> Any:
    """What that function of the driver returns; raises DriverError."""
    code, *values = getattr(driver(), function)(*arguments)
    if int(code) != 0:
        raise DriverError(f"{function}: {words(int(code))}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def primary_context(device: int) -> int:
    """Of the CUDA device of that index: the context that torch uses. It stays for the life of the process."""
    return int(ask("cuDevicePrimaryCtxRetain", ask("cuDeviceGet", device)))


def current_context() -> int:
    """0 where this thread has none."""
    return int(ask("cuCtxGetCurrent"))


def enter(device: int) -> None:
    """The device's context in a thread that has none, as after any other first call of CUDA there; autograd's threads
    have none. set_device does not do: torch leaves CUDA alone where the device is the current one already."""
    if current_context() == 0:
        ask("cuCtxSetCurrent", primary_context(device))


@contextlib.contextmanager
def context_of(device: int) -> Generator[None]:
    """The device's context is current inside; afterwards the one from before is, whatever happened inside.

    JAX leaves the last GPU's context current in a thread that starts its backends, whatever torch has set; a kernel
    that was loaded then went to that GPU and gave garbage on the tensor's.
    """
    before = current_context()
    ask("cuCtxSetCurrent", primary_context(device))
    try:
        yield
    finally:
        ask("cuCtxSetCurrent", before)


@functools.cache
def launcher() -> Callable[..., int]:
    """cuLaunchKernelEx(configuration, function, None, extra), which are objects of ctypes."""
    try:
        function = ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
    except (OSError, AttributeError) as error:
        raise Unavailable(f"this driver of CUDA has no cuLaunchKernelEx ({error}); needed one of CUDA 12") from error
    function.restype = ctypes.c_int
    return function


@functools.cache
def address_replacer() -> Callable[[Any, int], int]:
    """cuTensorMapReplaceAddress(descriptor, address)."""
    function = ctypes.CDLL("libcuda.so.1").cuTensorMapReplaceAddress
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    function.restype = ctypes.c_int
    return function
