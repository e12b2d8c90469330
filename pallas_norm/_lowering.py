"""What runs is decided when a program is lowered, for each platform: a primitive with a rule for CUDA, one for CPUs and
one for the rest. Tracing it asks no device, and traces no kernel.

Where the partitioner still has to divide the program over devices (Auto mesh axes), it is asked how the rows lie: a row
that is split must not be brought together only to be added up in order. That needs this process's compiler or a CUDA
plugin; on other platforms XLA then adds in an order of its own.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUntypedFunctionDecorator=false
# (Primitives and lowering rules have no types.)

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.extend.core
from jax.interpreters import mlir

from . import _compat, _partitioning, _spmd, _target
from ._held import apart
from .plans.fitting import Misfit
from .plans.hardware import H200, Gpu

Arrays = dict[str, jax.Array]


class Call(Protocol):
    """As `_dispatch.Call`."""

    names: tuple[str, ...]
    spec: Any
    is_partitioned: ClassVar[bool]  # whether `_partitioning` knows how its operands lie

    @property
    def tensor(self) -> str: ...  # what is normalised
    @property
    def results(self) -> tuple[str, ...]: ...
    def by_reference(self, operands: Arrays) -> Arrays: ...
    def by_kernel(self, operands: Arrays, *, gpu: Gpu) -> Arrays: ...
    def in_any_order(self, operands: Arrays) -> Arrays: ...
    def plan_on(self, gpu: Gpu, operands: Mapping[str, Any]) -> Any: ...


_chosen = jax.extend.core.Primitive("pallas_norm")
_chosen.multiple_results = True


def chosen(call: Any, operands: Arrays) -> Arrays:
    """call.by_kernel(operands) where that can run and nothing else was asked for, else call.by_reference(operands)."""
    values = [operands[name] for name in call.names]
    reference = jax.make_jaxpr(functools.partial(_flat, call, apart(call.by_reference)))(*values)
    return dict(zip(call.results, _chosen.bind(*values, call=call, reference=reference), strict=True))


OWN_WEIGHTS = "each member of a vmap has a weight of its own, and a kernel has one for all rows"
KERNELS = ("mosaic_gpu", "interpret")  # implementations that run one


def not_forced(spec: Any, reason: str) -> None:
    """Raises where a kernel was asked for, which there is none for `reason`."""
    if spec.implementation in KERNELS:
        raise NotImplementedError(
            f'implementation="{spec.implementation}" cannot run: {reason}; pass implementation=None to let XLA compile '
            "the reference"
        ) from None


def forced_or_chosen(call: Any, operands: Arrays, *, empty: bool) -> Arrays:
    """By the path that call.spec forces, if it has a kernel for these, else by the one that is chosen; of no rows by
    the reference."""
    forced = call.spec.implementation
    if forced in KERNELS:
        try:
            call.plan_on(H200, operands)
        except Misfit as reason:
            not_forced(call.spec, str(reason))
    if empty:  # of some operand, perhaps not of all: of q's heads, say, and not of k's
        return apart(call.by_reference)(operands)
    if forced == "interpret":
        return call.by_kernel(operands, interpret=True)
    return chosen(call, operands)


def _flat(call: Any, way: Callable[[Arrays], Arrays], *values: jax.Array) -> list[jax.Array]:
    found = way(dict(zip(call.names, values, strict=True)))
    return [found[name] for name in call.results]


@_chosen.def_abstract_eval
def _abstract_eval(*_: Any, call: Any, reference: Any) -> Any:
    del call
    return reference.out_avals


@_chosen.def_impl
def _impl(*values: Any, **params: Any) -> Any:
    with jax.disable_jit(False):  # noqa: FBT003  only there a primitive meets arrays
        return jax.jit(functools.partial(_chosen.bind, **params))(*values)


def _cannot_run(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f'implementation="mosaic_gpu" cannot run: {reason}; pass implementation=None to let XLA compile the reference '
        "where there is no such GPU"
    )


def _check_not_forced(call: Any) -> None:
    if call.spec.implementation == "mosaic_gpu":
        none = not _compat.cuda_capabilities()
        raise _cannot_run("this process has no CUDA device" if none else "the program is lowered for another platform")


def _is_divided(context: Any, call: Any) -> bool:
    """Whether the partitioner has to ask; it cannot where sizes are unknown yet, and then no program is divided."""
    sizes = (size for aval in context.avals_in for size in aval.shape)
    return call.is_partitioned and _compat.spans_devices(context) and all(isinstance(size, int) for size in sizes)


def _asks(context: Any, call: Any) -> bool:
    return _is_divided(context, call) and _spmd.unavailable() is None


def _inlined(context: Any, values: Any, reference: Any) -> Any:
    return mlir.lower_fun(jax.extend.core.jaxpr_as_fun(reference))(context, *values)


def _on_cpu(context: Any, *values: Any, call: Any, reference: Any) -> Any:
    _check_not_forced(call)
    if _asks(context, call) and not _compat.is_exported(context):
        return _partitioning.lowered(context, values, call, None, platform="cpu")
    return _inlined(context, values, reference)


def _elsewhere(context: Any, *values: Any, call: Any, reference: Any) -> Any:
    _check_not_forced(call)
    if _is_divided(context, call):
        return mlir.lower_fun(functools.partial(_flat, call, apart(call.in_any_order)))(context, *values)
    return _inlined(context, values, reference)


def _by_kernel(context: Any, *values: Any, call: Any, reference: Any) -> Any:
    x = context.avals_in[call.names.index(call.tensor)]
    try:
        target = _target.of_program(context)
        call.plan_on(target.gpu, dict(zip(call.names, context.avals_in, strict=True)))
        if not all(isinstance(size, int) for size in x.shape):
            rows = ", ".join(map(str, x.shape[:-1]))
            raise NotImplementedError(
                f"{call.tensor} has {rows} rows, a number that this program does not know, and a kernel's grid is "
                'compiled for its rows; export one program for each number of rows, or pass implementation="xla"'
            )
        if _compat.spans_devices(context):
            if not call.is_partitioned:
                raise _target.NoKernel(
                    "the program is divided over devices, and this kernel runs inside shard_map only"
                )
            if (reason := _spmd.unavailable()) is not None:
                raise _target.NoKernel(f"the program is divided over devices, and {reason}")
            return _partitioning.lowered(context, values, call, target.gpu if target.device is not None else None)
        with _target.in_mosaic(target):
            kernel = functools.partial(_flat, call, functools.partial(call.by_kernel, gpu=target.gpu))
            return mlir.lower_fun(kernel)(context, *values)
    except (_target.NoKernel, Misfit) as found:
        reason = str(found)
    except ValueError as error:
        if not _compat.exceeds_shared_memory(error):
            raise
        reason = f"its plan for n = {x.shape[-1]} takes more shared memory than the GPU has ({error})"
    if call.spec.implementation == "mosaic_gpu":
        raise _cannot_run(reason)
    if _asks(context, call):
        return _partitioning.lowered(context, values, call, None)
    return _inlined(context, values, reference)


mlir.register_lowering(_chosen, _elsewhere)
mlir.register_lowering(_chosen, _on_cpu, platform="cpu")
mlir.register_lowering(_chosen, _by_kernel, platform="cuda")
