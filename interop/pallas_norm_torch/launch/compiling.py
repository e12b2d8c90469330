"""From a program to a kernel that is loaded on a device: from the disk cache or lowered, compiled in the device's own
context, recorded, proved, and kept."""

# pyright: reportOptionalMemberAccess=false, reportPrivateImportUsage=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch

import pallas_norm
from pallas_norm import _target  # pyright: ignore[reportPrivateUsage]
from pallas_norm.plans.hardware import Gpu, generation

from .. import cache
from ..programs import Program
from . import arguments, driver, lowering, proof, recording
from .driver import Unavailable
from .kernels import Kernel

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


@functools.cache
def _library() -> ctypes.CDLL:
    for name in PLUGINS:
        try:
            plugin = importlib.import_module(name)
            library = ctypes.CDLL(str(plugin._get_library_path()))
            library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
            library.MosaicGpuCompile.restype = ctypes.POINTER(ctypes.c_void_p)
        except (ImportError, OSError, AttributeError):
            continue
        return library
    raise Unavailable(
        "no CUDA plugin of JAX with MosaicGpuCompile is installed: pip install 'pallas-norm[cuda13]' (or cuda12)"
    )


def unavailable(device: int) -> str | None:
    """Why nothing can be launched on this CUDA device, or None."""
    if (reason := lowering.unknown_jax()) is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if (reason := _target.too_old(capability) or _target.assembled_for_another(capability)) is not None:
        return f"cuda:{device} has {reason}"
    try:
        _library()
        driver.driver()
    except Unavailable as reason:
        return str(reason)
    return None


@functools.cache
def _source_digest() -> str:
    """Of the release, and of its sources where there are any: an installation of .pyc files alone has none."""
    try:
        release = importlib.metadata.version("pallas-norm")
    except importlib.metadata.PackageNotFoundError:  # run from the tree
        release = "unreleased"
    packages = (Path(pallas_norm.__file__).parent, Path(__file__).parent.parent)
    files = sorted(file for package in packages for file in package.rglob("*.py*") if "__pycache__" not in file.parts)
    return hashlib.sha256(b"\0".join([release.encode(), *(file.read_bytes() for file in files)])).hexdigest()


def _cached_module(program: Program) -> tuple[bytes, int]:
    key = f"{jax.__version__} {jax.lib.__version__} {_source_digest()} {program.gpu} {program.plan} {program}"
    if (payload := cache.load(key)) is not None:
        return payload[1:], payload[0]
    module, addresses = lowering.module_of(program)
    cache.store(key, bytes([addresses]) + module)
    return module, addresses


def _host_function(module: bytes, device: int) -> Callable[[int, bytes], Any]:
    """Compiles the module for, and loads it into, the current context; host(stream, addresses) launches it."""
    compiled = _library().MosaicGpuCompile(module, len(module))
    if not compiled:
        raise Unavailable("MosaicGpuCompile could not compile the kernel")
    function, host, kernel = compiled[0], compiled[1], compiled[2]
    if jax.__version_info__ >= (0, 12):
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_char_p, ctypes.c_int)
        entry: Any = prototype(host)
        return lambda stream, addresses: entry(kernel, function, stream, addresses, device)
    entry = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(host)
    return functools.partial(entry, function)


def _loaded(program: Program, module: bytes, addresses: int, device: int) -> Kernel:
    """In the current context, which is the device's own."""
    clusters = program.gpu.clusters
    recorded = recording.record(_host_function(module, device), addresses, clusters=clusters)
    plan, wanted = program.plan, arguments.nominal_grid(program)
    if plan is not None and (recorded.grid, recorded.cluster) != (wanted, plan.cluster):
        raise Unavailable(
            f"the kernel launches {recorded.grid} CTAs in clusters of {recorded.cluster}; needed "
            f"{wanted} in clusters of {plan.cluster}"
        )
    return Kernel(recorded, device, f"the {program.kind.replace('_', ' ')} kernel for n = {program.n}")


@functools.cache
def gpu_of(device: int) -> Gpu:
    """The CUDA device of that index, as far as a kernel's code depends on it."""
    found = torch.cuda.get_device_properties(device)
    capability = found.major, found.minor
    shared_bytes = getattr(found, "shared_memory_per_block_optin", 0) or generation(capability).shared_bytes
    return Gpu(capability, shared_bytes, found.multi_processor_count)


def captures(device: int) -> bool:
    """Whether a CUDA graph is being captured there, on this thread's stream: nothing can be compiled then."""
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


_kernels: dict[tuple[Program, int], Kernel] = {}
_lock = threading.RLock()


def kernel(program: Program, device: int) -> Kernel:
    """For the CUDA device of that index; compiled at the first call. Raises Unavailable."""
    key = (program, device)
    if (found := _kernels.get(key)) is not None:
        return found
    with _lock:
        if (found := _kernels.get(key)) is not None:
            return found
        if (reason := unavailable(device)) is not None:
            raise Unavailable(reason)
        with driver.context_of(device), torch.cuda.device(device):
            if captures(device):
                raise RuntimeError(
                    f"the kernel for n = {program.n} is not compiled yet, and a CUDA graph is being captured; "
                    "call it once with these dtypes and strides before the capture"
                )
            module, addresses = _cached_module(program)
            _target.assemble_for(program.gpu.capability)
            with driver.context_of(device):  # again: whoever was called until here may have changed it
                made = _loaded(program, module, addresses, device)
                proof.prove(made, program)
        _kernels[key] = made
        return made
