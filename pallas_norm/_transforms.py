"""vmap and sharding: how calls on arrays of any rank come down to calls on local rows.

vmap adds a leading axis to the rows where the weight is shared, and loops where each member has a weight of its own.
Under jit with sharded operands every device works on its own rows with no communication. A sharded last axis is
gathered first, because every element of y depends on the whole row. dweight is summed over the devices in float32,
before it is rounded.
"""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# (It takes _dispatch, from which __init__.py imports, for a private name of that file; lax.map and lax.psum have few
# types.)

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec

from . import _dispatch, reference
from ._spec import Spec

Arrays = dict[str, jax.Array]
Function = Callable[[Arrays], Arrays]

COLUMNS = ("weight", "dweight")  # (n,)
PER_ROW = ("rstd",)  # (...,); everything else is whole rows, (..., n)


def _on_rows(function: Function) -> Function:
    """`function`, which takes rows (rows, n), for operands with any leading axes."""

    def call(operands: Arrays) -> Arrays:
        *batch, n = operands["x"].shape
        rows = math.prod(batch)

        def shape(name: str, *leading: int) -> tuple[int, ...]:
            return (n,) if name in COLUMNS else leading if name in PER_ROW else (*leading, n)

        flat = {name: value.reshape(shape(name, rows)) for name, value in operands.items()}
        return {name: value.reshape(shape(name, *batch)) for name, value in function(flat).items()}

    return call


def _partitioned(
    function: Function, part: Function, operands: Iterable[str], results: Iterable[str], rank: int
) -> Function:
    """`function` with a Shardy rule: batch axes stay as they are, n is not split. Columns are summed over the devices:
    those of `part`, which does not round them."""
    batch = " ".join(f"b{axis}" for axis in range(rank - 1))

    def factors(name: str) -> str:
        return "n" if name in COLUMNS else batch if name in PER_ROW else f"{batch} n"

    def partition(mesh: Any, arguments: tuple[Any], _: Any) -> Any:
        rows = (*arguments[0]["x"].sharding.spec, *[None] * rank)[: rank - 1]
        axes = [axis for axis in jax.tree.leaves(rows) if axis is not None]

        def sharding(name: str) -> NamedSharding:
            spec = (None,) if name in COLUMNS else rows if name in PER_ROW else (*rows, None)
            return NamedSharding(mesh, PartitionSpec(*spec))

        def summed(operands: Arrays) -> Arrays:
            results = part(operands)
            for name in results.keys() & set(COLUMNS):
                results[name] = reference.round_to(lax.psum(results[name], tuple(axes)), operands["weight"].dtype)
            return results

        of_results, of_operands = ({name: sharding(name) for name in names} for names in (results, operands))
        return mesh, summed if axes else function, of_results, (of_operands,)

    wrapped = custom_partitioning(function)
    wrapped.def_partition(
        partition=partition,
        # A dict is flattened in the order of its names.
        sharding_rule=f"{', '.join(map(factors, sorted(operands)))} -> {', '.join(map(factors, sorted(results)))}",
        need_replication_factors=("n",),
    )
    return wrapped


def _operation(
    function: Function, spec: Spec, operands: Arrays, results: Iterable[str], part: Function | None = None
) -> Arrays:
    """`part` is `function` for a part of the rows, whose columns are still to be summed and rounded."""
    call = _on_rows(function)
    if spec.implementation == "interpret":  # an interpreted kernel cannot run inside custom_partitioning
        return call(operands)
    return _partitioned(call, _on_rows(part or function), operands, results, operands["x"].ndim)(operands)


def _batched(call: Function, with_leading_axis: Function | None = None) -> Function:
    """`call` with its vmap rule. `with_leading_axis` computes what `call` does for all members at once, the weight
    being shared; by default that is `call` itself."""

    @custom_vmap
    def batched(operands: Arrays) -> Arrays:
        return call(operands)

    @batched.def_vmap
    def rule(size: int, which: list[dict[str, bool]], operands: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (is_batched,) = which
        own_weight = is_batched.get("weight", False)

        def with_axis(name: str, value: jax.Array) -> jax.Array:
            shared = name in COLUMNS and not own_weight
            return value if is_batched[name] or shared else jnp.broadcast_to(value, (size, *value.shape))

        whole = {name: with_axis(name, value) for name, value in operands.items()}
        results = lax.map(batched, whole) if own_weight else (with_leading_axis or batched)(whole)
        return results, dict.fromkeys(results, True)

    return batched


# Kept, and below custom_vjp, whose rules are traced anew in every transformation: without it a gradient outside jit
# compiles in every call (1.3 s and 4 MB of a bfloat16 one, for ever), and each layer of a model lowers kernels of its
# own (64 layers, 128 norms: 384 kernels and 32 s; with it 5 kernels and 1.9 s).
@functools.partial(jax.jit, static_argnames=("spec", "with_rstd"))
def forward(operands: Arrays, spec: Spec, *, with_rstd: bool) -> Arrays:
    """y, with a residual also s, on request rstd; of x, and where given residual and weight. x is (..., n)."""
    results = ["y", *(["s"] if "residual" in operands else []), *(["rstd"] if with_rstd else [])]
    function = functools.partial(_dispatch.forward, spec=spec, with_rstd=with_rstd)
    return _batched(lambda operands: _operation(function, spec, operands, results))(operands)


@functools.partial(jax.jit, static_argnames="spec")
def backward(operands: Arrays, spec: Spec) -> Arrays:
    """dx, with a weight also dweight in its dtype; of x, rstd, dy, and where given weight and ds. x is (..., n)."""

    def rows_only(operands: Arrays) -> Arrays:
        function = functools.partial(_dispatch.backward, spec=spec, with_dweight=False)
        return _operation(function, spec, operands, ["dx"])

    if "weight" not in operands:
        return _batched(rows_only)(operands)

    def whole(operands: Arrays) -> Arrays:
        part = functools.partial(_dispatch.backward, spec=spec, with_dweight=True)
        function = functools.partial(part, dweight_dtype=operands["weight"].dtype)
        return _operation(function, spec, operands, ["dx", "dweight"], part)

    def with_leading_axis(operands: Arrays) -> Arrays:
        # Each member has a dweight of its own, so the kernel, which adds up all rows, cannot give it. The members may
        # be many and small (one row each where a program is written for one token), so they are not looped over either.
        def dweight(x: jax.Array, rstd: jax.Array, dy: jax.Array) -> jax.Array:
            exact = reference.weight_gradient(x, rstd, dy, cast_before_scale=spec.cast_before_scale)
            return reference.round_to(exact, operands["weight"].dtype)

        rows = operands["x"], operands["rstd"], operands["dy"]
        return _batched(rows_only)(operands) | {"dweight": jax.vmap(dweight)(*rows)}

    return _batched(whole, with_leading_axis)(operands)
