"""JAX's versions: which are tested, and what differs between them; in this package the only file but _spmd.py that
asks for one.

Tested: 0.10.2, 0.11.2, 0.12.0.1. What Mosaic GPU has in all of these, files of kernels/ take from here;
interop/pallas_norm_torch/launch/ keeps the launch's.
"""

# pyright: reportMissingTypeStubs=false, reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUnusedImport=false
# (Files of kernels/ take the imports from here.)

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import lax

from .plans.hardware import HOPPER, SMS, Gpu, generation

TESTED_JAX = ((0, 10), (0, 13))  # from, up to but without

# Pallas has few types, and MLIR none.
arith: Any
fragments: Any
ir: Any
llvm: Any
memref: Any
pl: Any
plgpu: Any
vector: Any
_import_error: ImportError | None = None

try:
    from jax.experimental import pallas as pl
    from jax.experimental.mosaic.gpu import fragmented_array as fragments
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir as ir
    from jaxlib.mlir.dialects import arith as arith
    from jaxlib.mlir.dialects import llvm as llvm
    from jaxlib.mlir.dialects import memref as memref
    from jaxlib.mlir.dialects import vector as vector
except ImportError as error:  # a JAX without Mosaic GPU (some Windows and macOS builds): only the XLA path runs
    _import_error = error
    arith = fragments = ir = llvm = memref = pl = plgpu = vector = None


def kernels_unavailable() -> str | None:
    """Why this JAX cannot build the kernels, or None."""
    if _import_error is not None:
        return f"jax {jax.__version__} on this machine has no Mosaic GPU ({_import_error})"
    version = jax.__version_info__[:2]
    if not TESTED_JAX[0] <= version < TESTED_JAX[1]:
        low, high = (".".join(map(str, v)) for v in TESTED_JAX)
        return f"jax {jax.__version__} is outside the range the kernels are tested with (>= {low}, < {high})"
    return None


OLDEST_CAPABILITY = (8, 0)  # of GPUs that kernels are compiled for, by the JAX that can
VERSION = jax.__version__
COMPUTES_OPERANDS_AGAIN = jax.__version_info__[:2] < (0, 11)  # on CPUs, in other instructions: see _held


def oldest_capability() -> tuple[int, int]:
    """Before 0.11, Mosaic has instructions of Hopper in every kernel, and LLVM ends the process for an older GPU."""
    return OLDEST_CAPABILITY if jax.__version_info__[:2] >= (0, 11) else HOPPER


def _nvidia(devices: Iterable[Any]) -> list[Any]:
    return [device for device in devices if device.platform == "gpu" and "nvidia" in device.device_kind.lower()]


def cuda_devices() -> list[Any]:
    """The NVIDIA GPUs of this process; starts JAX's backends, as any computation would."""
    return _nvidia(jax.local_devices())


def cuda_devices_of(context: Any) -> list[Any]:
    """Those of the client that a program is lowered for, of other processes and described ones among them; first those
    of this process. `context` is that of a lowering rule."""
    backend = context.module_context.backend
    if backend is None:
        return []
    return sorted(_nvidia(backend.devices()), key=lambda device: device.process_index != backend.process_index())


def gpu_of(device: Any) -> Gpu:
    major, minor = map(int, device.compute_capability.split("."))
    known = generation((major, minor)).shared_bytes if (major, minor) >= OLDEST_CAPABILITY else 0
    shared_bytes = getattr(device, "shared_memory_per_block_optin", None) or known
    return Gpu((major, minor), shared_bytes, getattr(device, "core_count", None) or SMS)


def cuda_capabilities() -> list[tuple[int, int]]:
    """The compute capability of each CUDA device of this process."""
    return [gpu_of(device).capability for device in cuda_devices()]


def devices_are_known() -> bool:
    """Whether JAX's backends run already. Before that nothing here may start them: jax.distributed.initialize would
    fail."""
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()


def mosaic_architecture() -> tuple[int, int]:
    """The compute capability that a kernel gets which is lowered now."""
    from jax.experimental.mosaic.gpu import core, utils

    module: Any = utils if hasattr(utils, "_infer_arch") else core  # core until 0.10
    return module._infer_arch()


def default_device(device: Any) -> Any:
    return jax.default_device(device)


def exceeds_shared_memory(error: ValueError) -> bool:
    """Mosaic GPU says so while it lowers, of the local GPU, of 227 KB without one."""
    return "exceeds available shared memory" in str(error)


# --- manual axes: inside jax.shard_map ------------------------------------------------------------------------------


def _varying(value: jax.Array) -> frozenset[str]:
    return jax.typeof(value).manual_axis_type.varying


def missing_axes(operand: jax.Array, like: jax.Array) -> tuple[str, ...]:
    """The mesh axes over which `like` varies and `operand` does not."""
    return tuple(sorted(_varying(like) - _varying(operand)))


def vary_alike(operands: dict[str, jax.Array], *, weights: tuple[str, ...] = ("weight",)) -> dict[str, jax.Array]:
    """Inside shard_map, rows that vary over the same mesh axes, those of the weights among them; the cast's transpose
    sums the gradient of replicated rows over the shards."""
    axes = frozenset[str]().union(*map(_varying, operands.values()))

    def cast(name: str, value: jax.Array) -> jax.Array:
        missing = () if name in weights else tuple(sorted(axes - _varying(value)))
        return lax.pcast(value, missing, to="varying") if missing else value

    return {name: cast(name, value) for name, value in operands.items()}


def vmapped_mesh_axes() -> frozenset[str]:
    """Explicit axes over which the members of a vmap around lie; a shard_map inside may not name them."""
    from jax._src import core

    return frozenset(core.get_axis_env().explicit_mesh_axis_names)


def spans_devices(context: Any) -> bool:
    """Whether what is lowered here still is to be partitioned: of a program of several devices, outside a shard_map
    over all mesh axes. `context` is that of a lowering rule."""
    axes = context.module_context.axis_context
    if hasattr(axes, "manual_axes"):  # SPMDAxisContext
        sizes = dict(axes.mesh.shape)
        return math.prod(size for name, size in sizes.items() if name not in axes.manual_axes) > 1
    return getattr(axes, "num_devices", 1) > 1  # ShardingContext, or pmap's


def is_exported(context: Any) -> bool:
    """Whether what is lowered here goes to a file, for processes that may not know our partitioner."""
    return bool(context.module_context.lowering_parameters.for_export)


def mesh_around(context: Any) -> list[tuple[int, bool]]:
    """Of each axis of the mesh of a shard_map around: its size, and whether it is Manual. Empty outside of one."""
    axes = context.module_context.axis_context
    if not getattr(axes, "manual_axes", None):
        return []
    return [(int(size), name in axes.manual_axes) for name, size in axes.mesh.shape.items()]


def takes_references(operands: Iterable[jax.Array]) -> bool:
    """Whether a kernel can be given these as references, to write to. Before 0.11 custom_vmap, which is around every
    kernel of Mosaic GPU, took none; Pallas takes none whose type says that they vary over a mesh."""
    return jax.__version_info__[:2] >= (0, 11) and not any(map(_varying, operands))


def vary_like(result: jax.Array, operand: jax.Array) -> jax.Array:
    """A kernel's result, of which Pallas forgets the mesh axes over which its operands vary."""
    axes = missing_axes(result, operand)
    return lax.pcast(result, axes, to="varying") if axes else result


# --- what Pallas names and takes in each version ----------------------------------------------------------------------


def _load_takes_index() -> bool:
    parameter = inspect.signature(plgpu.load).parameters.get("idx")
    return parameter is not None and parameter.default is inspect.Parameter.empty


_LOAD_TAKES_INDEX = _import_error is None and _load_takes_index()


def load(ref: Any, layout: Any) -> jax.Array:
    """optimized=False: the optimised path wants SMEM. 0.10's load takes an index, and its interpreter has no rule for
    it."""
    if _LOAD_TAKES_INDEX:
        return plgpu.load(ref, (), layout=layout, optimized=False)
    return plgpu.load(ref, layout=layout, optimized=False)


def store(ref: Any, value: jax.Array) -> None:
    """0.12's `ref[...] = value` refuses stores that touch partial cache lines of GMEM; older versions have no
    plgpu.store."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def barrier(num_arrivals: int, num_barriers: int = 0) -> Any:
    """One barrier, or an array of them. 0.10 writes one as num_barriers=1, later versions as ()."""
    if num_barriers:
        return plgpu.Barrier(num_arrivals=num_arrivals, num_barriers=num_barriers)
    return plgpu.Barrier(num_arrivals=num_arrivals)


def interpret_params(*, detect_races: bool = False) -> Any:
    if hasattr(plgpu, "InterpretGPUParams"):
        params = plgpu.InterpretGPUParams
    else:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params  # 0.10: not exported yet
    return params(detect_races=detect_races)


# --- tensors of other frameworks --------------------------------------------------------------------------------------


@functools.cache
def _device(platform: str, index: int) -> Any:
    try:
        devices = jax.local_devices(backend=platform)
    except RuntimeError as error:
        raise NotImplementedError(
            f"JAX has no {platform} device here ({error}); needed for a tensor of {platform}:{index}: "
            "pip install 'pallas-norm[cuda13]' (or cuda12)"
        ) from error
    found = [device for device in devices if device.local_hardware_id == index]
    if not found:
        raise NotImplementedError(f"JAX sees {len(devices)} {platform} devices, none of which is {platform}:{index}")
    return found[0]


def adopt(capsules: Sequence[Any], platform: str, index: int, wait_for: Callable[[int], None]) -> list[jax.Array]:
    """DLPack capsules, operands of one call, as arrays without a copy. JAX's work waits for what `wait_for` makes the
    stream of that address wait for.

    jnp.from_dlpack takes 30 to 60 us for each. Of these the first, on which all else in the call then waits, takes 19
    on a GPU and the others 7.
    """
    from jax._src.lib import _jax

    device, stream = _device(platform, index), None
    if platform == "cuda":
        stream = device.get_stream_for_external_ready_events()
        wait_for(stream)
    kind = {"cpu": 1, "cuda": 2}[platform]  # DLDeviceType
    streams = [stream, *[None] * (len(capsules) - 1)]
    return [
        _jax.dlpack_managed_tensor_to_buffer(capsule, device, stream, None, kind)
        for capsule, stream in zip(capsules, streams, strict=True)
    ]
