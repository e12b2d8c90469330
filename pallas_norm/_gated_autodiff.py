"""Derivatives of gated norms, in reverse mode, as those of _autodiff."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUntypedFunctionDecorator=false
# (jax.custom_vjp and jax.vjp have few types.)

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from . import _gated, _sharding, gated_reference
from ._activation import activated, sigmoid
from ._autodiff import RSTD, custom_vjp
from ._spec import Spec
from .gated_reference import Form

Arrays = dict[str, jax.Array]
F32 = jnp.float32


@custom_vjp(1, 2)
def norm(operands: Arrays, spec: Spec, form: Form) -> jax.Array:
    """y. Forward mode raises JAX's own TypeError for a custom_vjp."""
    return _gated.forward(_sharding.aligned(operands), spec, form, with_rstd=False)["y"]


@custom_vjp(1, 2)
def _with_rstds(operands: Arrays, spec: Spec, form: Form) -> Arrays:
    """y and rstds, through which no gradient flows."""
    return _gated.forward(_sharding.aligned(operands), spec, form, with_rstd=True)


def _norm_forward(operands: Arrays, spec: Spec, form: Form) -> tuple[Any, Arrays]:
    found = _with_rstds(operands, spec, form)  # so that it can be differentiated again
    return found["y"], operands | {"rstds": checkpoint_name(found["rstds"], RSTD)}


def _norm_backward(spec: Spec, form: Form, saved: Arrays, dy: Any) -> tuple[Arrays]:
    found = gradient(saved | {"dy": dy}, spec, form)
    of = {"x": "dx", "gate": "dgate", "weight": "dweight"}
    return ({name: found[of[name]] for name in saved if name in of},)


def _with_rstds_forward(operands: Arrays, spec: Spec, form: Form) -> tuple[Any, Arrays]:
    found = _with_rstds(operands, spec, form)
    return found, operands | {"rstds": checkpoint_name(found["rstds"], RSTD)}


def _with_rstds_backward(spec: Spec, form: Form, saved: Arrays, cotangents: Arrays) -> tuple[Arrays]:
    return _norm_backward(spec, form, saved, cotangents["y"])


norm.defvjp(_norm_forward, _norm_backward)
_with_rstds.defvjp(_with_rstds_forward, _with_rstds_backward)


@custom_vjp(1, 2)
def gradient(operands: Arrays, spec: Spec, form: Form) -> Arrays:
    """dx, dgate, with a weight also dweight in its dtype; of x, gate, rstds, dy, and where given weight."""
    # y, and so dy, has whole rows; x and the gate may lie split.
    kept = {name: operands[name] for name in ("x", "gate", "weight") if name in operands}
    whole = operands | _sharding.whole_rows(_sharding.aligned(kept))
    found = _gated.backward(_sharding.aligned(whole), spec, form, with_dweight="weight" in operands)
    like = {"dx": "x", "dgate": "gate", "dweight": "weight"}
    return {name: _sharding.lying_as(value, operands[like[name]]) for name, value in found.items()}


def _gradient_forward(operands: Arrays, spec: Spec, form: Form) -> tuple[Arrays, Arrays]:
    return gradient(operands, spec, form), operands


@functools.partial(jax.jit, static_argnames=("spec", "form"))  # kept, as _transforms.forward is
def _second(saved: Arrays, cotangents: Arrays, spec: Spec, form: Form) -> Arrays:
    """The derivative of the backward formula as a function of x and gate: rstd, which depends on both, is computed
    again."""
    over = _sharding.summed_over(saved)

    def formula(operands: Arrays) -> Arrays:
        wide, gate = (gated_reference.grouped(operands[name].astype(F32), form.group) for name in ("x", "gate"))
        h = wide if form.norm_before_gate else wide * activated(gate, sigmoid(gate), form.activation)
        rstds = lax.rsqrt(jnp.mean(h * h, axis=-1) + F32(spec.eps))
        found, terms = _gated.gradients(operands | {"rstds": rstds}, spec, form, ordered=False)
        if "weight" in operands:
            sums = gated_reference.weight_gradient(terms)
            found["dweight"] = _sharding.dweight_of_all(sums, over, operands["weight"].dtype)
        return found

    _, pullback = jax.vjp(formula, {name: value for name, value in saved.items() if name != "rstds"})
    (operands,) = pullback(cotangents)
    return operands | {"rstds": jnp.zeros_like(saved["rstds"])}


def _gradient_backward(spec: Spec, form: Form, saved: Arrays, cotangents: Arrays) -> tuple[Arrays]:
    return (_second(saved, cotangents, spec, form),)


gradient.defvjp(_gradient_forward, _gradient_backward)
