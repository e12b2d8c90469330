"""Operands whose sharding is part of their type (Explicit mesh axes): every device works on its own rows.

A shard_map over the operands' own shardings. Rows split over any axes need no communication, and y lies where x lies.
dweight is summed over the shards in float32, before it is rounded. Where the rows themselves are split, each shard adds
up its own columns, and a psum of (rows,) float32 adds up the shards: nothing is gathered.

Auto axes are the partitioner's: plain JAX needs nothing for them, and a kernel what _partitioning tells.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (jax.shard_map and jax.sharding have few types.)

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from . import _compat, reference
from ._spec import Spec

if TYPE_CHECKING:
    from jax.typing import DTypeLike

Arrays = dict[str, jax.Array]

COLUMNS = ("weight", "dweight")  # (n,)
PER_ROW = ("rstd",)  # (...,)
PER_GROUP = ("rstds",)  # (..., groups)
SCALARS = ("scale",)  # (); everything else is whole rows, (..., n), but for "scales", a result, (..., groups)


def needs_whole_rows(names: Iterable[str]) -> bool:
    """Whether a last axis that is split is gathered first: of quantised and of gated results no part is computed from a
    part. names: of operands and results."""
    return not {"q", "gate"}.isdisjoint(names)


def _explicit(mesh: Any) -> set[str]:
    """Without the axes of members, which a vmap around works on."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit} - _compat.vmapped_mesh_axes()


def _mesh(operands: Arrays) -> Any:
    """The mesh with Explicit axes on which an operand lies, or None."""
    meshes = (jax.typeof(value).sharding.mesh for value in operands.values())
    return next((mesh for mesh in meshes if _explicit(mesh)), None)


def _spec(value: jax.Array) -> tuple[Any, ...]:
    spec = tuple(jax.typeof(value).sharding.spec)
    return (*spec, *[None] * (value.ndim - len(spec)))


def _axes(entries: Iterable[Any]) -> tuple[str, ...]:
    return tuple(axis for axis in jax.tree.leaves(tuple(entries)) if axis is not None)


def _rows(operands: Arrays) -> tuple[Any, ...]:
    """How the whole rows are split, (..., n), where the operands agree; JAX's own error where they do not."""
    whole = [value for name, value in operands.items() if name not in COLUMNS + PER_ROW + PER_GROUP + SCALARS]
    specs = {_spec(value) for value in whole}
    if len(specs) == 1:
        return specs.pop()
    structs = [
        jax.ShapeDtypeStruct(value.shape, "float32", sharding=jax.typeof(value).sharding) for value in whole
    ]  # fmt: skip

    def total(*values: Any) -> Any:
        return reduce(operator.add, values)

    found: Any = jax.eval_shape(total, *structs)
    spec = tuple(found.sharding.spec)
    return (*spec, *[None] * (len(found.shape) - len(spec)))


def _of(name: str, rows: tuple[Any, ...], rank: int) -> PartitionSpec:
    """The spec of an operand or a result: columns have the axes of the last axis, and those of members lead."""
    if name in SCALARS:
        return PartitionSpec()
    if name in COLUMNS:
        return PartitionSpec(*rows[: rank - 1], rows[-1])
    if name in PER_GROUP:
        return PartitionSpec(*rows[:-1], None)
    return PartitionSpec(*(rows[:-1] if name in PER_ROW else rows))


def of_members(
    operands: Arrays, is_batched: Mapping[str, bool], size: int, shared: Collection[str] = COLUMNS
) -> Arrays:
    """With one more leading axis, of vmap's members; what is `shared` by them has none, unless each has its own."""
    return {
        name: value if is_batched[name] or name in shared else jnp.broadcast_to(value[None], (size, *value.shape))
        for name, value in operands.items()
    }


def aligned(operands: Arrays) -> Arrays:
    """On Explicit axes, operands that are split alike: the weight as the columns of x, gathered where x is whole."""
    mesh = _mesh(operands)
    if mesh is None:
        return operands
    rows = _rows(operands)

    def placed(name: str, value: jax.Array) -> jax.Array:
        spec = _of(name, rows, value.ndim)
        # What lies on no mesh (an array from before it, outside jit) may go with any; only jit knows the devices.
        if jax.typeof(value).sharding.mesh.empty or _spec(value) == tuple(spec):
            return value
        return jax.sharding.reshard(value, NamedSharding(mesh, spec))

    return {name: placed(name, value) for name, value in operands.items()}


def whole_rows(operands: Arrays) -> Arrays:
    """Aligned operands on Explicit axes, the last axis gathered where it is split."""
    mesh = _mesh(operands)
    if mesh is None or not _axes((rows := _rows(operands))[-1:]):
        return operands

    def gathered(name: str, value: jax.Array) -> jax.Array:
        return jax.sharding.reshard(value, NamedSharding(mesh, _of(name, (*rows[:-1], None), value.ndim)))

    return {name: gathered(name, value) for name, value in operands.items()}


def last_axis_whole(value: jax.Array) -> jax.Array:
    """On Explicit axes, gathered where its last axis is split."""
    sharding = jax.typeof(value).sharding
    if not any(sharding.spec[value.ndim - 1 :]) or not _explicit(sharding.mesh):  # the first costs a call least
        return value
    return jax.sharding.reshard(value, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1], None)))


def lying_as(value: jax.Array, like: jax.Array) -> jax.Array:
    """On Explicit axes, split as `like` is."""
    mesh = jax.typeof(like).sharding.mesh
    if _spec(value) == _spec(like) or not _explicit(mesh):
        return value
    return jax.sharding.reshard(value, NamedSharding(mesh, PartitionSpec(*_spec(like))))


def summed_over(operands: Arrays) -> tuple[str, ...]:
    """The axes of a shard_map around over whose shards dweight is to be summed: the weight is the same there."""
    return _compat.missing_axes(operands["weight"], operands["x"]) if "weight" in operands else ()


def dweight_of_all(sums: jax.Array, over: tuple[str, ...], dtype: DTypeLike) -> jax.Array:
    """dweight in `dtype`, of each shard's sums in float32 over its rows, which are added before the one rounding."""
    return reference.round_to(lax.psum(sums, over) if over else sums, dtype)


def by_shards(
    function: Callable[[Arrays, Spec, tuple[str, ...]], Arrays], operands: Arrays, spec: Spec, results: Iterable[str]
) -> Arrays:
    """function(local operands, spec, the axes over whose shards dweight is to be summed) of aligned operands."""
    mesh, around = _mesh(operands), summed_over(operands)
    if mesh is None:
        x = operands["x"]
        return function({name: _compat.vary_like(value, x) for name, value in operands.items()}, spec, around)
    rows = _rows(operands)
    shared_out = _axes(rows[:-1])
    split = tuple(axis for axis in _axes(rows[-1:]) if mesh.shape[axis] > 1)
    here = dataclasses.replace(spec, axis_name=spec.axis_name + split)

    def local(operands: Arrays) -> Arrays:
        return function(operands, here, around + shared_out)

    found = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=({name: _of(name, rows, value.ndim) for name, value in operands.items()},),
        out_specs={name: _of(name, rows, 1) for name in results},
        axis_names=_explicit(mesh),
        check_vma=False,  # nothing differentiates it: custom_vjp is above. The interpreter's values have no axes.
    )(operands)
    like = {"dweight": operands.get("weight", operands["x"])}
    return {name: _compat.vary_like(value, like.get(name, operands["x"])) for name, value in found.items()}
