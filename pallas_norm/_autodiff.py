"""Reverse-mode differentiation.

rstd is kept in float32 from the forward pass, whatever the dtype of x, under the checkpoint name RSTD. Forward mode
raises JAX's own TypeError for a custom_vjp: tangents are never silently zero. The second derivative is that of the
backward formula, by JAX.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (jax.custom_vjp and jax.vjp have few types.)

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from . import _sharding, _transforms, reference
from ._dtypes import AS_S, GradientDtypes
from ._held import held
from ._inverse_root import inverse_root
from ._row_sum import row_mean
from ._spec import Spec

Arrays = dict[str, jax.Array]

RSTD = "pallas_norm_rstd"  # for jax.checkpoint_policies.save_only_these_names


def custom_vjp(*static: int) -> Callable[[Callable[..., Any]], Any]:
    return functools.partial(jax.custom_vjp, nondiff_argnums=static)


def norm(operands: Arrays, spec: Spec, with_rstd: bool) -> Arrays:  # noqa: FBT001
    """y, with a residual also s, on request rstd, through which no gradient flows."""
    return _norm(_sharding.aligned(operands), spec, with_rstd, gradient_dtypes(operands, spec))


# A call outside any jit would trace its kernel, and compile for each platform, again every time (60 ms on a CPU).
# Inside a transformation this would only hide rstd's name from checkpoint policies (jax 0.12).
jitted = jax.jit(norm, static_argnums=(1, 2))


def gradient_dtypes(operands: Arrays, spec: Spec) -> GradientDtypes:
    """Those of dx and dresidual, of which dtypes of arrays say nothing where what is kept for them is s alone."""
    if "residual" not in operands:
        return AS_S
    x, residual = operands["x"].dtype, operands["residual"].dtype
    same = x == spec.dtypes(x, residual).s
    return GradientDtypes(None if same else x.name, None if residual == x else residual.name)


@custom_vjp(1, 2, 3)
def _norm(operands: Arrays, spec: Spec, with_rstd: bool, dx_dtypes: GradientDtypes) -> Arrays:  # noqa: FBT001 (custom_vjp knows no keywords)
    del dx_dtypes
    return _transforms.forward(operands, spec, with_rstd=with_rstd)


def _norm_forward(primals: Any, spec: Spec, with_rstd: bool, dx_dtypes: GradientDtypes) -> tuple[Arrays, Arrays]:  # noqa: FBT001
    operands: Arrays = {name: primal.value for name, primal in primals.items()}
    results: Arrays = _norm(operands, spec, True, dx_dtypes)  # noqa: FBT003  so that it can be differentiated again
    saved = {"x": results.get("s", operands["x"]), "rstd": checkpoint_name(results["rstd"], RSTD)}
    if "weight" in operands:
        saved["weight"] = operands["weight"]
    return results if with_rstd else {name: results[name] for name in results if name != "rstd"}, saved


def _norm_backward(
    spec: Spec,
    with_rstd: bool,  # noqa: FBT001
    dx_dtypes: GradientDtypes,
    saved: Arrays,
    cotangents: Any,
) -> tuple[Any]:
    del with_rstd
    given: Arrays = {
        name: cotangents[of]
        for name, of in (("dy", "y"), ("ds", "s"))
        if of in cotangents and not isinstance(cotangents[of], SymbolicZero)
    }
    # Where y is not used, what reaches x is the gradient of s as it is: no product makes 0 * inf of it. None is zeros.
    gradients: dict[str, Any] = {}
    if "dy" in given:
        gradients = gradient(saved | given, spec, dx_dtypes)
    elif "ds" in given:
        gradients = reference.passed_on(held(given["ds"]), dx_dtypes)
    names = ("x", "residual", "weight") if "s" in cotangents else ("x", "weight")
    of = {"x": "dx", "residual": "dx" if dx_dtypes.dresidual is None else "dresidual", "weight": "dweight"}
    return ({name: gradients.get(of[name]) for name in names if name != "weight" or name in saved},)


_norm.defvjp(_norm_forward, _norm_backward, symbolic_zeros=True)


@custom_vjp(1, 2)
def gradient(operands: Arrays, spec: Spec, dx_dtypes: GradientDtypes = AS_S) -> Arrays:
    """dx, where it has another dtype dresidual, with a weight also dweight in its dtype; of x, rstd, dy, and where
    given weight and ds."""
    return _transforms.backward(operands, spec, dx_dtypes=dx_dtypes)


def _gradient_forward(operands: Arrays, spec: Spec, dx_dtypes: GradientDtypes) -> tuple[Arrays, Arrays]:
    return gradient(operands, spec, dx_dtypes), operands


@functools.partial(jax.jit, static_argnames=("spec", "dx_dtypes"))  # kept, as _transforms.forward is
def _second(saved: Arrays, cotangents: Arrays, spec: Spec, dx_dtypes: GradientDtypes) -> Arrays:
    """The derivative of the backward formula as a function of x: rstd is computed again, because it depends on x."""
    rstd = saved["rstd"]
    over = _sharding.summed_over(saved)

    def formula(operands: Arrays) -> Arrays:
        x = operands["x"].astype(jnp.float32)
        rstd = inverse_root(row_mean(x * x, None, **spec.split)[..., 0] + jnp.float32(spec.eps))
        weight, dy, ds = operands.get("weight"), operands["dy"], operands.get("ds")
        options: dict[str, Any] = spec.rounding | spec.split | {"ordered": False}  # whose derivative has none
        dx = reference.input_gradient(operands["x"], weight, rstd, dy, ds, **options)
        results = reference.passed_on(dx, dx_dtypes)
        if weight is not None:
            dweight = reference.weight_gradient(operands["x"], rstd, dy, **spec.unit)
            results["dweight"] = _sharding.dweight_of_all(dweight, over, weight.dtype)
        return results

    _, pullback = jax.vjp(formula, {name: value for name, value in saved.items() if name != "rstd"})
    (operands,) = pullback(cotangents)
    return operands | {"rstd": jnp.zeros_like(rstd)}


def _gradient_backward(spec: Spec, dx_dtypes: GradientDtypes, saved: Arrays, cotangents: Arrays) -> tuple[Arrays]:
    return (_second(saved, cotangents, spec, dx_dtypes),)


gradient.defvjp(_gradient_forward, _gradient_backward)
