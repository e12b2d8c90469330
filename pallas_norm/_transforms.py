"""vmap, and what is kept between calls: how calls on arrays of any rank come down to calls on local rows.

vmap adds a leading axis to the rows where the weight is shared. Where each member has a weight of its own, all members
are normalised at once without a weight, and their weights multiply afterwards: the same roundings, no loop.
"""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# (It takes _dispatch, from which __init__.py imports, for a private name of that file; jax.jit has few types.)

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
from ._held import all_held, apart, held
from ._spec import Spec
from .plans.backward import backward_order
from .plans.order import Order

Arrays = dict[str, jax.Array]
Function = Callable[[Arrays], Arrays]

F32 = jnp.float32


def _batched(call: Function, of_members: Function, with_own_weights: Function) -> Function:
    """`call` with its vmap rule. `of_members` computes what `call` does for all members at once, the weight being
    shared; `with_own_weights`, where each has a weight, (members, n)."""

    batched = custom_vmap(call)

    @batched.def_vmap
    def rule(size: int, which: list[dict[str, bool]], operands: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (is_batched,) = which

        whole = _sharding.aligned(_sharding.of_members(operands, is_batched, size))
        results = (with_own_weights if is_batched.get("weight") else of_members)(whole)
        return results, dict.fromkeys(results, True)

    return batched


def _scale_of_members(weight: jax.Array, rows: jax.Array, spec: Spec, dtype: Any) -> jax.Array:
    """The float32 factors (members, 1, ..., 1, n) of rows (members, ..., n)."""
    scale = reference.scale(weight, spec.weight_offset, dtype)
    return lax.expand_dims(scale, range(1, rows.ndim - 1))


def _order(operands: Arrays, dy: Any) -> Order:
    """Of the products in the rows of dx."""
    x = operands["x"]
    return backward_order(x.shape[-1], x.dtype, dy_dtype=dy, residual="ds" in operands)


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

    def call(operands: Arrays) -> Arrays:
        results = ["y", *(["s"] if "residual" in operands else []), *(["rstd"] if with_rstd else [])]
        local = functools.partial(_dispatch.forward, with_rstd=with_rstd)
        return _sharding.by_shards(local, operands, spec, results)

    def of_members(operands: Arrays) -> Arrays:
        return forward(operands, spec, with_rstd=with_rstd)

    def with_own_weights(operands: Arrays) -> Arrays:
        weight = all_held({"weight": operands["weight"]})["weight"]
        dtypes = spec.dtypes(**{name: value.dtype for name, value in operands.items()})
        results = forward(_without(operands, "weight"), _weightless(spec, dtypes), with_rstd=with_rstd)
        y = results["y"].astype(F32) * _scale_of_members(weight, results["y"], spec, dtypes.weight)
        return results | {"y": held(reference.round_to(y, dtypes.y))}

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

    def call(operands: Arrays) -> Arrays:
        dtype = operands["weight"].dtype if with_dweight else None
        local = functools.partial(_dispatch.backward, dweight_dtype=dtype, dx_dtypes=dx_dtypes)
        return _sharding.by_shards(local, operands, spec, ["dx", *own, *(["dweight"] if with_dweight else [])])

    def dweight_of_members(operands: Arrays, dtype: Any) -> Arrays:
        # Each member has a dweight of its own, so the kernel, which adds up all rows, cannot give it. The members may
        # be many and small (one row each where a program is written for one token), so they are not looped over either.
        if not with_dweight:
            return {}
        rows = all_held({name: operands[name] for name in ("x", "rstd", "dy")})
        sums = jax.vmap(functools.partial(reference.weight_gradient, **spec.unit))(*rows.values())
        return {"dweight": _sharding.dweight_of_all(sums, _sharding.summed_over(operands), dtype)}

    def of_members(operands: Arrays) -> Arrays:
        dx = backward(operands, spec, with_dweight=False, dx_dtypes=dx_dtypes)
        return dx | (dweight_of_members(operands, operands["weight"].dtype) if with_dweight else {})

    def with_own_weights(operands: Arrays) -> Arrays:
        weight, dy = all_held({name: operands[name] for name in ("weight", "dy")}).values()
        dtypes = spec.dtypes(operands["x"].dtype, weight=weight.dtype)
        g = reference.round_to(dy.astype(F32) * _scale_of_members(weight, dy, spec, dtypes.weight), dtypes.unit)
        if promoted(dtypes.unit, dy.dtype) == dy.dtype:  # which holds it: the plan is the one of dy
            g = g.astype(dy.dtype)
        if _order(operands, g.dtype) == _order(operands, dy.dtype):
            rest = _without(operands, "weight") | {"dy": g}
            dx = backward(rest, _weightless(spec, dtypes), dx_dtypes=dx_dtypes)
        else:  # at some n, of float32 rows whose dy has 16 bits
            alone = _dispatch.Call("backward", tuple(operands), spec, dx_dtypes=dx_dtypes)
            by_kernel = spec.implementation in ("mosaic_gpu", "interpret")
            dx = lax.map(alone.run, operands) if by_kernel else jax.vmap(apart(alone.by_reference))(operands)
        return dx | dweight_of_members(operands, weight.dtype)

    return _batched(call, of_members, with_own_weights)(operands)
