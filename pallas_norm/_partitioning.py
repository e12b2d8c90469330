"""Auto mesh axes on CUDA and CPUs: only the partitioner knows how operands lie, so it is asked while the program is
compiled.

Not jax.experimental.custom_partitioning: that writes the address of a Python object into the program, which no cache
and no other process can use, and wants one concrete mesh for the whole program. Here the call's description is in the
program, and the devices come from the operands' own shardings.

Each device works on its own rows. Where the last axis is split, XLA compiles the reference for the shards, with a psum
of (rows,), and gathers nothing. Axes that the devices do not divide are gathered where they are summed over: the last
one, and for dweight those of the rows.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (The compiler's shapes and shardings have no types.)

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import _compat, _spmd, _target, reference
from ._held import apart
from ._sharding import COLUMNS, PER_ROW, SCALARS, needs_whole_rows
from .plans.fitting import Misfit
from .plans.hardware import Gpu

TARGET = "pallas_norm"
FACTORS = {"scales": "groups", "rstds": "groups"}  # of the last axis, where it is not that of x
SHARDS = "shards"  # the axis of all devices, in the order of their numbers in the program

_decoders: dict[str, Callable[[str], Any]] = {}  # by operation


def register(operation: str, decode: Callable[[str], Any]) -> None:
    """On import: a program from a file or a cache may hold calls that this process never lowered."""
    if not _decoders and _spmd.unavailable() is None:
        _spmd.register_partitioner(TARGET, _partition, _infer)
    _decoders[operation] = decode


def _decoded(text: str) -> Any:
    return _decoders[json.loads(text)["operation"]](text)


def version() -> str:
    """In the program's text, which is the key of JAX's caches on disk: what this file makes of a call is not."""
    from . import __version__

    return __version__


def lowered(context: Any, values: Sequence[Any], call: Any, gpu: Gpu | None, *, platform: str = "cuda") -> Any:
    """The call, still to be partitioned, in the program that is being lowered; for that GPU, where it is known."""
    rank = len(context.avals_in[call.names.index("x")].shape)
    batch = " ".join(f"b{axis}" for axis in range(rank - 1))

    def factors(name: str) -> str:
        if name in SCALARS:
            return ""
        return "columns" if name in COLUMNS else batch if name in PER_ROW else f"{batch} {FACTORS.get(name, 'n')}"

    def side(names: Sequence[str]) -> str:
        return ", ".join(factors(name) for name in names)

    # The weight's factor is its own: a weight that lies split over the columns (FSDP) must not split the rows of x.
    replicated = ("columns",) if {*call.names, *call.results} & {*COLUMNS} else ()
    if needs_whole_rows((*call.names, *call.results)):
        replicated += ("n", *{FACTORS[name] for name in (*call.names, *call.results) if name in FACTORS})
    rule = f"{side(call.names)} -> {side(call.results)}".replace(",", " ,")
    return _spmd.partitioned_call(
        context,
        values,
        target=TARGET,
        config=json.dumps(
            {
                "call": call.encoded(),
                "mesh": _compat.mesh_around(context),
                "gpu": gpu,
                "platform": platform,
                "version": version(),
            }
        ),
        rule=rule,
        replicated=tuple(sorted(replicated, key=rule.split().index)),  # as Shardy numbers them
    )


def _sharding(name: str, rows: Any) -> Any:
    """Of an operand or a result, from the tiling of x: (rows..., columns, replicas, manual)."""
    if name in SCALARS:
        rows = rows.reshape(rows.size // rows.shape[-1], rows.shape[-1])
    elif name in PER_ROW:
        *tiles, replicas, manual = rows.shape
        rows = rows.reshape(*tiles[:-1], tiles[-1] * replicas, manual)
    elif name in COLUMNS:
        *batch, columns, replicas, manual = rows.shape
        order = [len(batch), *range(len(batch)), len(batch) + 1, len(batch) + 2]
        rows = rows.transpose(order).reshape(columns, math.prod(batch) * replicas, manual)
    return _spmd.from_tiling(rows)


def _groups(rows: Any, axes: range) -> list[list[int]]:
    """The devices that differ in these axes of the tiling only."""
    others = [axis for axis in range(rows.ndim) if axis not in axes]
    moved = rows.transpose([*others, *axes])
    return moved.reshape(-1, math.prod(rows.shape[axis] for axis in axes)).tolist()


def _tiles(call: Any, arg_shapes: Sequence[Any], arg_shardings: Sequence[Any]) -> Any:
    at = call.names.index("x")
    given = [sharding for sharding in arg_shardings if sharding is not None and not sharding.is_replicated()]
    devices = max([math.prod(sharding.tile_assignment_dimensions()) for sharding in given], default=1)
    sizes = arg_shapes[at].dimensions()
    tiling = _spmd.tiling(arg_shardings[at], len(sizes), devices)
    columns, whole_rows = len(sizes) - 1, needs_whole_rows((*call.names, *call.results))
    for axis, size in enumerate(sizes):
        # XLA fills uneven tiles up with whatever its other programs left there, which a sum may not see.
        is_summed = axis == columns or "dweight" in call.results
        if (is_summed and size % tiling.shape[axis]) or (whole_rows and axis == columns):
            tiling = _replicated(tiling, axis)
    return tiling


def _replicated(tiling: Any, axis: int) -> Any:
    """The tiling with the tiles of that axis among the replicas: every device has it whole."""
    *others, tiles, replicas, manual = np.moveaxis(tiling, axis, -3).shape
    return np.expand_dims(np.moveaxis(tiling, axis, -3).reshape(*others, tiles * replicas, manual), axis)


def _numbers(rows: Any, mesh: Sequence[tuple[int, bool]]) -> Any:
    """The tiling with the devices' numbers in the whole program.

    In a shard_map over some axes the partitioner numbers the devices that differ in the others only, and copies the
    program for each such group; the collectives in it have to name all groups.
    """
    sizes, manual = [size for size, _ in mesh], [at for at, (_, is_manual) in enumerate(mesh) if is_manual]
    if math.prod(sizes) <= rows.size:
        return rows
    others = [at for at in range(len(mesh)) if at not in manual]
    groups = np.arange(math.prod(sizes)).reshape(sizes).transpose([*manual, *others]).reshape(-1, rows.size)
    whole = np.stack([group[rows] for group in groups], axis=-1)
    return whole.reshape(*rows.shape[:-1], rows.shape[-1] * len(groups))


def _local(call: Any, rows: Any, gpu: Gpu | None) -> Callable[..., Any]:
    """What a device does with its operands; without a GPU that has a kernel, by the reference."""
    rank = rows.ndim - 2
    shared_out, split = (_groups(rows, axes) for axes in (range(rank - 1), range(rank - 1, rank)))
    sums_dweight = len(shared_out[0]) > 1 and "dweight" in call.results
    part = dataclasses.replace(call, dweight_dtype="float32") if sums_dweight else call
    is_split = len(split[0]) > 1
    if is_split:
        groups = tuple(map(tuple, split))
        part = dataclasses.replace(
            part, spec=dataclasses.replace(part.spec, axis_name=(SHARDS,), axis_index_groups=groups)
        )

    def run(*values: jax.Array) -> list[jax.Array]:
        operands = dict(zip(call.names, values, strict=True))
        by_reference = is_split or gpu is None
        results = apart(part.by_reference)(operands) if by_reference else part.by_kernel(operands, gpu=gpu)
        if sums_dweight:
            total = lax.psum(results["dweight"], SHARDS, axis_index_groups=shared_out)
            results["dweight"] = reference.round_to(total, jnp.dtype(call.dweight_dtype))
        return [results[name] for name in call.results]

    return run


def _program(call: Any, numbers: Any, structs: Sequence[jax.ShapeDtypeStruct], gpu: Gpu | None, platform: str) -> bytes:
    """gpu: that the call was lowered for. A stored program may have come to another one."""
    shards = SHARDS, numbers.size
    if platform == "cpu":
        return _spmd.local_program(_local(call, numbers, None), structs, shards, platform)
    try:
        target = _target.of_stored(gpu)
        call.plan_on(target.gpu, dict(zip(call.names, structs, strict=True)))
        with _target.in_mosaic(target):
            return _spmd.local_program(_local(call, numbers, target.gpu), structs, shards, "cuda")
    except (_target.NoKernel, Misfit) as reason:
        if call.spec.implementation == "mosaic_gpu":
            raise NotImplementedError(
                f'implementation="mosaic_gpu" cannot run: {reason}; pass implementation=None'
            ) from None
    return _spmd.local_program(_local(call, numbers, None), structs, shards, "cuda")


def _partition(
    arg_shapes: Sequence[Any], arg_shardings: Sequence[Any], result_shape: Any, result_sharding: Any, config: bytes
) -> tuple[bytes, Sequence[Any], Any]:
    """The compiler's question: a program for one device, and how its operands and results lie."""
    del result_sharding
    given = json.loads(config)
    call = _decoded(given["call"])
    rows = _tiles(call, arg_shapes, arg_shardings)
    operands = [_sharding(name, rows) for name in call.names]
    structs = [
        jax.ShapeDtypeStruct(sharding.tile(shape).dimensions(), shape.numpy_dtype())
        for sharding, shape in zip(operands, arg_shapes, strict=True)
    ]
    numbers = _numbers(rows, given["mesh"])
    gpu = None if given["gpu"] is None else Gpu(tuple(given["gpu"][0]), *given["gpu"][1:])
    program = _program(call, numbers, structs, gpu, given.get("platform", "cuda"))
    results = [_sharding(name, rows) for name in call.results]
    return program, operands, _spmd.tuple_of_shardings(result_shape, results)


def _infer(arg_shapes: Sequence[Any], arg_shardings: Sequence[Any], result_shape: Any, config: bytes) -> Any:
    call = _decoded(json.loads(config)["call"])
    rows = _tiles(call, arg_shapes, arg_shardings)
    return _spmd.tuple_of_shardings(result_shape, [_sharding(name, rows) for name in call.results])
