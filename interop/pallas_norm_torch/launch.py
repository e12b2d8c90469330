"""A Pallas kernel on the caller's stream, without JAX's runtime: compiled once, launched with raw addresses.

JAX has no stable interface for this. What is used of it is all here: the lowered program's custom call, whose module is
given a grid that follows the row count; MosaicGpuCompile of the CUDA plugin, which loads it into the current CUDA
context; and the function that launches it. Known: jax 0.11 and 0.12.
"""

# pyright: reportMissingTypeStubs=false, reportOptionalMemberAccess=false, reportPrivateImportUsage=false
# pyright: reportPrivateUsage=false, reportUnknownLambdaType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (the MLIR bindings have no types)

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import io
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import torch

import pallas_norm
from pallas_norm import _dispatch
from pallas_norm.kernels.grid import counts_of
from pallas_norm.kernels.launch_arguments import COUNT

from . import cache
from .programs import NOMINAL_ROWS, Program

KNOWN_JAX = ((0, 11), (0, 13))  # from, up to but without
PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


class Unavailable(Exception):
    """Why a kernel cannot be launched directly."""


# --- what this process can do -----------------------------------------------------------------------------------------


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
    version = jax.__version_info__[:2]
    if not KNOWN_JAX[0] <= version < KNOWN_JAX[1]:
        low, high = (".".join(map(str, v)) for v in KNOWN_JAX)
        return f"the launch interface of jax {jax.__version__} is not known (known: >= {low}, < {high})"
    capability = torch.cuda.get_device_capability(device)
    if capability < _dispatch.NEEDED_CAPABILITY:
        return f"cuda:{device} has compute capability {capability[0]}.{capability[1]}; the kernels need 9.0 or newer"
    try:
        _library()
    except Unavailable as reason:
        return str(reason)
    return None


# --- from a program to a module ---------------------------------------------------------------------------------------


def _custom_call(program: Program) -> tuple[bytes, int]:
    """The serialised kernel inside the lowered program, and how many addresses it takes. Needs no GPU."""
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


def _with_grid_of_rows(module_bytes: bytes, program: Program) -> bytes:
    """The module, launched with as many programs as the row count of the launch needs, not NOMINAL_ROWS."""
    from jax._src.interpreters import mlir as jax_mlir
    from jax._src.lib import mosaic_gpu_dialect
    from jax.experimental.mosaic.gpu import core
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, llvm

    plan = program.plan
    assert plan is not None
    context = jax_mlir.make_ir_context()
    mosaic_gpu_dialect.register_dialect(context)
    with context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        module = core._run_serde_pass(ir.Module.parse(module_bytes), serialize=False)
        hosts = [
            operation
            for operation in module.body.operations
            if "llvm.emit_c_interface" in operation.operation.attributes
        ]
        launches = [
            operation
            for host in hosts
            for operation in host.regions[0].blocks[0].operations
            if operation.operation.name == "gpu.launch"
        ]
        if len(hosts) != 1 or len(launches) != 1:
            raise Unavailable(f"the kernel's module has {len(hosts)} host functions and {len(launches)} launches")
        (host,), (launch,) = hosts, launches
        i64, pointer = ir.IntegerType.get_signless(64), llvm.PointerType.get()

        def constant(value: int) -> Any:
            return arith.constant(i64, value)

        with ir.InsertionPoint(launch):
            addresses = host.regions[0].blocks[0].arguments[1]
            slot = llvm.getelementptr(pointer, addresses, [], [program.inputs.index("programs")], pointer, 0)
            programs = arith.divui(llvm.ptrtoint(i64, llvm.load(pointer, slot)), constant(COUNT))
            grid = arith.index_cast(ir.IndexType.get(), arith.muli(programs, constant(plan.cluster)))
        _, _, nominal = counts_of(plan, NOMINAL_ROWS)
        if "value" not in launch.operands[1].owner.attributes or (
            ir.IntegerAttr(launch.operands[1].owner.attributes["value"]).value != nominal * plan.cluster
        ):
            raise Unavailable("the kernel's grid is not where it was expected")
        launch.operands[1] = grid
        module.operation.verify()
        module = core._run_serde_pass(module, serialize=True)
        buffer = io.BytesIO()
        module.operation.write_bytecode(buffer, desired_version=0)
        return buffer.getvalue()


def module_of(program: Program) -> tuple[bytes, int]:
    """What MosaicGpuCompile takes, and how many addresses the kernel takes. Raises Unavailable."""
    try:
        module, addresses = _custom_call(program)
        return (module if program.plan is None else _with_grid_of_rows(module, program)), addresses
    except (AttributeError, ImportError, KeyError, IndexError, TypeError) as error:  # a private name of JAX's has gone
        raise Unavailable(
            f"jax {jax.__version__} lowers kernels in another way than is known here ({error!r})"
        ) from error


@functools.cache
def _source_digest() -> str:
    files = sorted([*Path(pallas_norm.__file__).parent.rglob("*.py"), *Path(__file__).parent.rglob("*.py")])
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _cached_module(program: Program, device: int) -> tuple[bytes, int]:
    capability = torch.cuda.get_device_capability(device)
    key = f"{jax.__version__} {jax.lib.__version__} {_source_digest()} {capability} {program.plan} {program}"
    if (payload := cache.load(key)) is not None:
        return payload[1:], payload[0]
    module, addresses = module_of(program)
    cache.store(key, bytes([addresses]) + module)
    return module, addresses


# --- from a module to a launch ----------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """run(stream, pack(*addresses)): inputs, numbers (times what Program.numbers says), outputs."""

    run: Callable[[int, bytes], None]
    pack: Callable[
        ..., bytes
    ]  # bytes of the call's own, so that threads share nothing; a c_void_p array costs 0.5 us more


def _loaded(module: bytes, addresses: int, device: int) -> Kernel:
    """Compiles for, and loads into, the current CUDA context."""
    compiled = _library().MosaicGpuCompile(module, len(module))
    if not compiled:
        raise Unavailable("MosaicGpuCompile could not compile the kernel")
    function, host_function, kernel = compiled[0], compiled[1], compiled[2]
    pack = struct.Struct(f"{addresses}Q").pack
    if jax.__version_info__ >= (0, 12):
        prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3, ctypes.c_char_p, ctypes.c_int)
        entry = prototype(host_function)
        return Kernel(lambda stream, packed: entry(kernel, function, stream, packed, device), pack)
    entry = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(host_function)
    return Kernel(functools.partial(entry, function), pack)


def clamped(pack: Callable[..., bytes], index: int, most: int) -> Callable[..., bytes]:
    """`pack` for a persistent grid, which has no more programs than `most`."""
    return lambda *values: pack(*values[:index], min(values[index], most), *values[index + 1 :])


_kernels: dict[tuple[Program, int], Kernel] = {}
_lock = threading.Lock()


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
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the kernel for n = {program.n} is not compiled yet, and a CUDA graph is being captured; "
                "call it once with these dtypes and strides before the capture"
            )
        with torch.cuda.device(device):
            torch.cuda.mem_get_info()  # as in current_context
            made = _loaded(*_cached_module(program, device), device)
        _kernels[key] = made
        return made


threads = threading.local()


def current_context() -> None:
    """Makes the current device's context current in this thread, which CUDA does at a thread's first call only.

    set_device does not do: torch leaves CUDA alone where the device is the current one already.
    """
    if not hasattr(threads, "ready"):
        torch.cuda.mem_get_info()
        threads.ready = True
