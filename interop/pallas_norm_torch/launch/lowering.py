"""From a program to the module that MosaicGpuCompile takes, without a device: JAX's backends are never started.

JAX has no stable interface for this. What is used of it is here: the lowered program's custom call, and the two places
from which Mosaic takes what it wants to know of the GPU. Known: jax 0.11 and 0.12.
"""

# pyright: reportMissingTypeStubs=false, reportPrivateImportUsage=false, reportOptionalMemberAccess=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (the MLIR bindings have no types)

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Generator
from typing import Any

import jax

from pallas_norm import _compat, _target  # pyright: ignore[reportPrivateUsage]
from pallas_norm.plans.hardware import Gpu, named

from ..programs import Program
from .driver import Unavailable

KNOWN_JAX = ((0, 11), (0, 13))  # from, up to but without


def unknown_jax() -> str | None:
    """Why the launch interface of this JAX is not used, or None."""
    if KNOWN_JAX[0] <= jax.__version_info__[:2] < KNOWN_JAX[1]:
        return None
    low, high = (".".join(map(str, v)) for v in KNOWN_JAX)
    return f"the launch interface of jax {jax.__version__} is not known (known: >= {low}, < {high})"


@functools.cache
def _described(gpu: Gpu) -> Any:
    """A device of JAX's that is only a description."""
    from jax.experimental import topologies

    major, minor = gpu.capability
    description = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 core_count: {gpu.multiprocessors}
          shared_memory_per_block_optin: {gpu.shared_bytes} cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
    """
    topology = topologies.get_topology_desc("gpu", platform="cuda", target_config=description, topology="1x1x1")
    return topology.devices[0]


class _OneDevice:
    """The module jax, to a thread of which `local_devices` is asked: that device alone."""

    def __init__(self, device: Any) -> None:
        self._device, self._thread = device, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(jax, name)

    def local_devices(self, *arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == self._thread and not arguments and not options:
            return [self._device]
        return jax.local_devices(*arguments, **options)


_lock = threading.RLock()


@contextlib.contextmanager
def _without_backends(gpu: Gpu) -> Generator[None]:
    """Mosaic takes the GPU's architecture from JAX's default device, and its shared memory from jax.local_devices(),
    which starts every backend: a context on each GPU, most of the memory of the first, and the last GPU's context left
    current in this thread."""
    from jax.experimental.mosaic.gpu import core

    device = _described(gpu)
    with _lock, jax.default_device(device):
        before, core.jax = core.jax, _OneDevice(device)  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            core.jax = before  # pyright: ignore[reportAttributeAccessIssue]


def _custom_call(program: Program) -> tuple[bytes, int]:
    """The serialised kernel inside the lowered program, and how many addresses it takes."""
    from jaxlib.mlir import ir  # not at the top: its import starts the MLIR bindings

    lowered = jax.jit(program.function()).trace(*program.structs).lower(lowering_platforms=("cuda",))
    found: list[Any] = []

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            found.append(operation)
        return ir.WalkResult.ADVANCE

    module = lowered.compiler_ir()
    with module.context:
        module.operation.walk(visit)
        if len(found) != 1:
            raise Unavailable(f"the lowered program has {len(found)} kernels; needed one")
        (call,) = found
        operands, results = len(call.operands), len(call.results)
        if (operands, results) != (len(program.inputs), len(program.outputs)):
            raise Unavailable(f"the kernel takes {operands} operands and {results} results, which is not as expected")
        return call.attributes["mhlo.backend_config"]["module"].value_bytes, operands + results


def module_of(program: Program) -> tuple[bytes, int]:
    """What MosaicGpuCompile takes, and how many addresses the kernel takes. Raises Unavailable."""
    try:
        with _without_backends(program.gpu):
            found = _compat.mosaic_architecture()
            if not _target.takes(program.gpu.capability, found):  # the assembler would end the process
                raise Unavailable(
                    f"Mosaic would lower the kernel for compute capability {named(found)}, and the GPU has "
                    f"{named(program.gpu.capability)}"
                )
            return _custom_call(program)
    except ValueError as error:  # more shared memory than the GPU has
        raise Unavailable(f"the kernel does not fit this GPU: {error}") from error
    except (AttributeError, ImportError, KeyError, IndexError, TypeError, NotImplementedError) as error:
        raise Unavailable(  # a private name of JAX's has gone
            f"jax {jax.__version__} lowers kernels in another way than is known here ({error!r})"
        ) from error
