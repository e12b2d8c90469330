"""vmap, and what is kept between calls: how calls on arrays of any rank come down to calls on local rows.

vmap adds a leading axis to the rows where the weight is shared. Where each member has a weight of its own, all members
are normalised at once without a weight, and their weights multiply afterwards: the same roundings, no loop.
"""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# (It takes _dispatch, from which __init__.py imports, for a private name of that file; jax.jit and lax.psum have few
# types.)

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from . import _dispatch, _sharding, reference
from ._dtypes import AS_S, Dtypes, GradientDtypes, promoted
from ._sharding import COLUMNS
from ._spec import Spec

Arrays = dict[str, jax.Array]
Function = Callable[[Arrays], Arrays]

F32 = jnp.float32


def _batched(call: Function, of_members: Function, with_own_weights: Function) -> Function:
    """`call` with its vmap rule. `of_members` computes what `call` does for all members at once, the weight being
    shared; `with_own_weights`, where each has a weight, (members, n)."""

    @custom_vmap
    def batched(operands: Arrays) -> Arrays:
        return call(operands)

    @batched.def_vmap
    def rule(size: int, which: list[dict[str, bool]], operands: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (is_batched,) = which

        def with_axis(name: str, value: jax.Array) -> jax.Array:
            if is_batched[name] or name in COLUMNS:
                return value
            return jnp.broadcast_to(value[None], (size, *value.shape))

        whole = _sharding.aligned({name: with_axis(name, value) for name, value in operands.items()})
        results = (with_own_weights if is_batched.get("weight") else of_members)(whole)
        return results, dict.fromkeys(results, True)

    return batched


def _scale_of_members(weight: jax.Array, rows: jax.Array, spec: Spec, dtype: Any) -> jax.Array:
    """The float32 factors (members, 1, ..., 1, n) of rows (members, ..., n)."""
    scale = reference.scale(weight, spec.weight_offset, dtype)
    return lax.expand_dims(scale, range(1, rows.ndim - 1))


def _weightless(spec: Spec, dtypes: Dtypes) -> Spec:
    """What gives `unit` itself: it is what there is without a weight."""
    return dataclasses.replace(spec, weight_offset=0.0, round_weight=False, out_dtype=dtypes.unit.name)


def _without(operands: Arrays, name: str) -> Arrays:
    return {other: value for other, value in operands.items() if other != name}


# Kept, and below custom_vjp, whose rules are traced anew in every transformation: without it a gradient outside jit
# compiles in every call (1.3 s and 4 MB of a bfloat16 one, for ever), and each layer of a model lowers kernels of its
# own (64 layers, 128 norms: 384 kernels and 32 s; with it 5 kernels and 1.9 s).
@functools.partial(jax.jit, static_argnames=("spec", "with_rstd"))
def forward(operands: Arrays, spec: Spec, *, with_rstd: bool) -> Arrays:
    """y, with a residual also s, on request rstd; of x, and where given residual and weight. x is (..., n)."""

    def local(operands: Arrays, spec: Spec, summed_over: tuple[str, ...]) -> Arrays:
        del summed_over  # rows need no others
        return _dispatch.forward(operands, spec=spec, with_rstd=with_rstd)

    def call(operands: Arrays) -> Arrays:
        results = ["y", *(["s"] if "residual" in operands else []), *(["rstd"] if with_rstd else [])]
        return _sharding.by_shards(local, operands, spec, results)

    def of_members(operands: Arrays) -> Arrays:
        return forward(operands, spec, with_rstd=with_rstd)

    def with_own_weights(operands: Arrays) -> Arrays:
        weight = operands["weight"]
        dtypes = spec.dtypes(**{name: value.dtype for name, value in operands.items()})
        results = forward(_without(operands, "weight"), _weightless(spec, dtypes), with_rstd=with_rstd)
        y = results["y"].astype(F32) * _scale_of_members(weight, results["y"], spec, dtypes.weight)
        return results | {"y": reference.round_to(y, dtypes.y)}

    return _batched(call, of_members, with_own_weights)(operands)


@functools.partial(jax.jit, static_argnames=("spec", "with_dweight", "dx_dtypes"))
def backward(
    operands: Arrays,
    spec: Spec,
    *,
    with_dweight: bool = True,
    dx_dtypes: GradientDtypes = AS_S,
) -> Arrays:
    """dx, where it has another dtype dresidual, with a weight also dweight in its dtype; of x, rstd, dy, and where
    given weight and ds. x is (..., n)."""
    with_dweight = with_dweight and "weight" in operands
    own = ["dresidual"] if dx_dtypes.dresidual is not None else []

    def local(operands: Arrays, spec: Spec, summed_over: tuple[str, ...]) -> Arrays:
        run = functools.partial(_dispatch.backward, operands, spec=spec, dx_dtypes=dx_dtypes)
        if not with_dweight:
            return run(with_dweight=False)
        dtype = operands["weight"].dtype
        if not summed_over:
            return run(with_dweight=True, dweight_dtype=dtype)
        results = run(with_dweight=True)
        # In float32, before the one rounding.
        return results | {"dweight": reference.round_to(lax.psum(results["dweight"], summed_over), dtype)}

    def call(operands: Arrays) -> Arrays:
        return _sharding.by_shards(local, operands, spec, ["dx", *own, *(["dweight"] if with_dweight else [])])

    def dweight_of_members(operands: Arrays, dtype: Any) -> Arrays:
        # Each member has a dweight of its own, so the kernel, which adds up all rows, cannot give it. The members may
        # be many and small (one row each where a program is written for one token), so they are not looped over either.
        def dweight(x: jax.Array, rstd: jax.Array, dy: jax.Array) -> jax.Array:
            return reference.round_to(reference.weight_gradient(x, rstd, dy, **spec.unit), dtype)

        if not with_dweight:
            return {}
        rows = operands["x"], operands["rstd"], operands["dy"]
        return {"dweight": jax.vmap(dweight)(*rows)}

    def of_members(operands: Arrays) -> Arrays:
        dx = backward(operands, spec, with_dweight=False, dx_dtypes=dx_dtypes)
        return dx | (dweight_of_members(operands, operands["weight"].dtype) if with_dweight else {})

    def with_own_weights(operands: Arrays) -> Arrays:
        weight, dy = operands["weight"], operands["dy"]
        dtypes = spec.dtypes(operands["x"].dtype, weight=weight.dtype)
        g = reference.round_to(dy.astype(F32) * _scale_of_members(weight, dy, spec, dtypes.weight), dtypes.unit)
        if promoted(dtypes.unit, dy.dtype) == dy.dtype:  # which holds it: the plan is the one of dy
            g = g.astype(dy.dtype)
        rest = _without(operands, "weight") | {"dy": g}
        dx = backward(rest, _weightless(spec, dtypes), dx_dtypes=dx_dtypes)
        return dx | dweight_of_members(operands, weight.dtype)

    return _batched(call, of_members, with_own_weights)(operands)
