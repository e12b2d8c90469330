"""Derivatives of rotated heads, in reverse mode: the gradients are one kernel where there is one; their derivatives are
those of the steps."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false, reportUntypedFunctionDecorator=false
# (As _gated_autodiff.)

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from . import _rope
from ._autodiff import custom_vjp
from ._rope import ANGLES, PAIR, Heads
from ._spec import Spec

Arrays = dict[str, jax.Array]


@custom_vjp(1, 2)
def rope(operands: Arrays, spec: Spec, heads: Heads) -> Arrays:
    """q_out and k_out; of q and k, or of qkv, of cos, sin and where given q_weight and k_weight."""
    return _rope.forward(operands, spec, heads)


def _rope_forward(primals: Any, spec: Spec, heads: Heads) -> tuple[Arrays, Arrays]:
    if any(primals[name].perturbed for name in ANGLES):
        raise NotImplementedError(
            "the derivative with respect to cos or sin was asked for; needed angles that are constants: pass "
            "jax.lax.stop_gradient of both, or rotate what rms_norm returns in steps of your own"
        )
    operands: Arrays = {name: primal.value for name, primal in primals.items()}
    return rope(operands, spec, heads), operands


def _rope_backward(spec: Spec, heads: Heads, saved: Arrays, cotangents: Any) -> tuple[dict[str, Any]]:
    given = _rope.split(saved, heads)
    dr = {name: cotangents[f"{name}_out"] for name in PAIR}
    used = [name for name in PAIR if not isinstance(dr[name], SymbolicZero)]
    found: dict[str, Any] = dict.fromkeys(saved)
    if len(used) == len(PAIR):
        gradients = gradient(saved | {f"d{name}_out": dr[name] for name in PAIR}, spec, heads)
        of = {"q": "dq", "k": "dk", "q_weight": "q_dweight", "k_weight": "k_dweight"}
        found |= {name: gradients[key] for name, key in of.items() if key in gradients}
    else:
        found |= {name: jnp.zeros_like(given[name]) for name in PAIR}
        for name in used:
            found[name], dweight = _rope.steps(given, name, dr[name], spec)
            found |= {} if dweight is None else {f"{name}_weight": dweight}
    if heads is not None:
        dq, dk = (found.pop(name) for name in PAIR)
        rest = saved["qkv"][..., sum(heads) :, :]
        found["qkv"] = jnp.concatenate([dq, dk, jnp.zeros_like(rest)], axis=-2)
    return (found,)


rope.defvjp(_rope_forward, _rope_backward, symbolic_zeros=True)


@custom_vjp(1, 2)
def gradient(operands: Arrays, spec: Spec, heads: Heads) -> Arrays:
    """dq, dk, and where given weights q_dweight and k_dweight; of what rope has, and of dq_out and dk_out."""
    return _rope.backward(operands, spec, heads)


def _gradient_forward(operands: Arrays, spec: Spec, heads: Heads) -> tuple[Arrays, Arrays]:
    return gradient(operands, spec, heads), operands


def _gradient_backward(spec: Spec, heads: Heads, saved: Arrays, cotangents: Arrays) -> tuple[Arrays]:
    """The steps are computed again, by kernels of the norm, and have derivatives."""
    call = _rope.GradientCall(tuple(saved), spec, heads, tuple(cotangents))
    _, pullback = jax.vjp(call.by_reference, saved)
    return pullback(cotangents)


gradient.defvjp(_gradient_forward, _gradient_backward)
