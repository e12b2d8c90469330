"""Which GPU a program is lowered for, and why no kernel is compiled for it.

A program is lowered once for all GPUs of its client, and Mosaic takes the architecture from JAX's default device. A
module for another architecture than the GPU's ends the process in LLVM, so a kernel is lowered here only for the one
kind of GPU that the program can run on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterable
from typing import Any, NamedTuple

from . import _compat
from .plans.hardware import H200, HOPPER, Gpu, generation, named


class Target(NamedTuple):
    gpu: Gpu
    device: Any = None  # of JAX's, of that kind; None where none is known: for an export or a look at a program


class NoKernel(Exception):
    """Why none is lowered for the GPUs of a program."""


def too_old(capability: tuple[int, int]) -> str | None:
    """Why a GPU of that compute capability runs no kernel, or None."""
    oldest = _compat.oldest_capability()
    if capability >= oldest:
        return None
    family = generation(oldest).name.split(":")[0]
    reason = f"compute capability {named(capability)}; the kernels need {named(oldest)} ({family}) or newer"
    if capability >= _compat.OLDEST_CAPABILITY:
        reason += f" with jax {_compat.VERSION}, and {named(_compat.OLDEST_CAPABILITY)} with jax 0.11"
    return reason


def takes(capability: tuple[int, int], module: tuple[int, int]) -> bool:
    """Whether a GPU's assembler takes a module that was lowered for another compute capability. jax 0.10 gives
    Hopper's inside a mesh, whose modules every later GPU takes."""
    return module == capability or HOPPER <= module <= capability


# --- one for each process ---------------------------------------------------------------------------------------------

_assembled_for: list[tuple[int, int]] = []


def assemble_for(capability: tuple[int, int]) -> None:
    """Called before a kernel is compiled. The assembler in JAX's CUDA plugin keeps the first GPU's architecture for the
    life of the process, and tells modules apart by their text alone."""
    _assembled_for[:] = _assembled_for or [capability]


def assembled_for_another(capability: tuple[int, int]) -> str | None:
    """Why nothing can be compiled for that compute capability in this process, or None."""
    if _assembled_for in ([], [capability]):
        return None
    other = named(_assembled_for[0])
    return f"compute capability {named(capability)}, and this process has compiled kernels for {other}"


# --- the GPU of a program ---------------------------------------------------------------------------------------------

_seen: dict[Gpu, Any] = {}  # a device of each that programs were lowered for, local or described


def _of(devices: Iterable[Any]) -> Target:
    """What runs on any of the devices."""
    gpus = {_compat.gpu_of(device): device for device in devices}
    capabilities = sorted({gpu.capability for gpu in gpus})
    if not capabilities:
        return Target(H200)
    if (reason := too_old(capabilities[0])) is not None:
        raise NoKernel(f"a GPU has {reason}")
    if len(capabilities) > 1:
        several = " and ".join(map(named, capabilities))
        raise NoKernel(
            f"the GPUs have compute capabilities {several}, and a program is lowered for all of them; "
            "CUDA_VISIBLE_DEVICES leaves those of one"
        )
    if (reason := assembled_for_another(capabilities[0])) is not None:
        raise NoKernel(f"a GPU has {reason}")
    least = [min(getattr(gpu, field) for gpu in gpus) for field in ("shared_bytes", "multiprocessors")]
    target = Target(Gpu(capabilities[0], *least), next(iter(gpus.values())))
    _seen[target.gpu] = target.device
    return target


def here() -> Target:
    """The GPU of this process; starts JAX's backends, as any computation would. Without one Hopper, for exports. Raises
    NoKernel."""
    return _of(_compat.cuda_devices())


def of_program(context: Any) -> Target:
    """`context` is that of a lowering rule. A backend that does not run yet is not started. Raises NoKernel."""
    if devices := _compat.cuda_devices_of(context):
        return _of(devices)
    return here() if _compat.devices_are_known() else Target(H200)


def of_stored(gpu: Gpu | None) -> Target:
    """Of a program that was lowered for `gpu`, here or in another process, and is compiled now. Raises NoKernel."""
    if gpu is not None and gpu in _seen:
        return Target(gpu, _seen[gpu])
    target = here()
    if target.device is not None or gpu is None:
        return target
    if gpu.clusters:
        return Target(gpu)
    raise NoKernel(f"the program was lowered for compute capability {named(gpu.capability)}, and no such GPU is here")


@contextlib.contextmanager
def in_mosaic(target: Target) -> Generator[None]:
    """Kernels that are lowered inside are for the target. Raises NoKernel."""
    capability = target.gpu.capability
    with contextlib.ExitStack() as stack:
        if target.device is not None:
            if _compat.mosaic_architecture() != capability:  # the default device is a CPU, or another GPU
                stack.enter_context(_compat.default_device(target.device))
            assemble_for(capability)
        found = _compat.mosaic_architecture()
        if not takes(capability, found):
            raise NoKernel(
                f"Mosaic would lower for compute capability {named(found)}, and the GPU has {named(capability)}"
            )
        yield
