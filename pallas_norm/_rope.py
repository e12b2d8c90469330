"""Rotated heads: which path a call takes, vmap, sharding, and the derivative, which takes the steps one by one."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUntypedFunctionDecorator=false
# (As _quantized.)

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from . import _autodiff, _compat, _dispatch, _lowering, _target, reference, rope_reference
from ._spec import Spec
from .kernels import rope as kernel
from .plans.hardware import H200, Gpu
from .plans.plan import Plan
from .plans.rope import rope_plan_on

Arrays = dict[str, jax.Array]
Heads = tuple[int, int] | None  # of q and of k in the tensor of a projection

PAIR = kernel.PAIR
WEIGHTS = ("q_weight", "k_weight")
ANGLES = ("cos", "sin")


def split(operands: Arrays, heads: Heads) -> Arrays:
    """With q and k, also where they are parts of qkv."""
    if heads is None:
        return operands
    others = {name: value for name, value in operands.items() if name != "qkv"}
    qkv, of_q, both = operands["qkv"], heads[0], sum(heads)
    return {"q": qkv[..., :of_q, :], "k": qkv[..., of_q:both, :], **others}


@dataclasses.dataclass(frozen=True)
class Call:
    """As _dispatch.Call, for `_lowering`."""

    names: tuple[str, ...]
    spec: Spec
    heads: Heads
    results: tuple[str, ...] = ("q_out", "k_out")
    is_partitioned: ClassVar[bool] = False

    def by_reference(self, operands: Arrays) -> Arrays:
        """Of operands with any leading axes."""
        given = split(operands, self.heads)
        return {f"{name}_out": self._rotated(given, name) for name in PAIR}

    def _rotated(self, given: Arrays, name: str) -> jax.Array:
        y, _ = reference.forward(given[name], given.get(f"{name}_weight"), eps=self.spec.eps, **self.spec.rounding)
        return rope_reference.rotated(y, given["cos"], given["sin"])

    def in_any_order(self, operands: Arrays) -> Arrays:
        return self.by_reference(operands)

    @property
    def tensor(self) -> str:
        """The operand that holds q's heads."""
        return "qkv" if self.heads else "q"

    def plan_on(self, gpu: Gpu, operands: Mapping[str, Any]) -> Plan:
        """operands: arrays or their types. Raises Misfit, or NoKernel where none is wanted or there is none for n."""
        q = operands[self.tensor]
        if (path := _dispatch._planned(q.shape[-1], q.dtype, self.spec.implementation)).plan is None:
            raise _target.NoKernel(path.why)
        return rope_plan_on(gpu, q.shape[-1], q.dtype)

    def by_kernel(self, operands: Arrays, *, gpu: Gpu = H200, interpret: bool = False) -> Arrays:
        """As by_reference; the kernel takes tokens (tokens, heads, n) and angles (positions, n)."""
        plan, weight = self.plan_on(gpu, operands), operands.get(WEIGHTS[0])
        *batch, _, n = operands[self.tensor].shape

        def flat(name: str, value: jax.Array) -> jax.Array:
            if name in WEIGHTS:
                return value
            tail = value.shape[-1:] if name in ANGLES else value.shape[-2:]
            return value.reshape(math.prod(value.shape) // math.prod(tail), *tail)

        dtypes = self.spec.dtypes(operands[self.tensor].dtype, weight=None if weight is None else weight.dtype)
        options: dict[str, Any] = {"dtypes": dtypes, "spec": self.spec, "heads": self.heads, "interpret": interpret}
        found = kernel.rope({name: flat(name, value) for name, value in operands.items()}, plan=plan, **options)
        return {name: value.reshape(*batch, -1, n) for name, value in found.items()}

    def run(self, operands: Arrays) -> Arrays:
        empty = any(0 in operands[name].shape for name in (*PAIR, "qkv") if name in operands)
        return _lowering.forced_or_chosen(self, operands, empty=empty)


@functools.partial(jax.jit, static_argnames=("spec", "heads"))  # kept, as _transforms.forward is
def _batched(operands: Arrays, spec: Spec, heads: Heads) -> Arrays:
    @custom_vmap
    def batched(operands: Arrays) -> Arrays:
        call = Call(tuple(operands), spec, heads)
        like = operands[call.tensor]
        return call.run({name: _compat.vary_like(value, like) for name, value in operands.items()})

    @batched.def_vmap
    def rule(size: int, which: list[dict[str, bool]], operands: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (is_batched,) = which
        call = Call(tuple(operands), spec, heads)
        if any(is_batched.get(name) for name in WEIGHTS):  # each member has a weight of its own
            axes = {name: 0 if is_batched[name] else None for name in operands}
            results = jax.vmap(call.by_reference, in_axes=(axes,))(operands)
            return results, dict.fromkeys(results, True)
        tokens = operands[call.tensor].shape[:-2]
        tokens = tokens if is_batched[call.tensor] else (size, *tokens)

        own_angles = any(is_batched[name] for name in ANGLES)  # both or none: a kernel counts the rows of cos

        def with_axis(name: str, value: jax.Array) -> jax.Array:
            if name in WEIGHTS or (name in ANGLES and not own_angles):
                return value
            whole = value if is_batched[name] else jnp.broadcast_to(value[None], (size, *value.shape))
            if name in ANGLES:  # one for each token
                whole = jnp.expand_dims(whole, range(1, 1 + len(tokens) + 1 - whole.ndim))
                whole = jnp.broadcast_to(whole, (*tokens, whole.shape[-1]))
            return whole

        results = _batched({name: with_axis(name, value) for name, value in operands.items()}, spec, heads)
        return results, dict.fromkeys(results, True)

    return batched(operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def rope(operands: Arrays, spec: Spec, heads: Heads) -> Arrays:
    """q_out and k_out; of q and k, or of qkv, of cos, sin and where given q_weight and k_weight."""
    return _batched(operands, spec, heads)


def _forward(primals: Any, spec: Spec, heads: Heads) -> tuple[Arrays, Arrays]:
    if any(primals[name].perturbed for name in ANGLES):
        raise NotImplementedError(
            "the derivative with respect to cos or sin was asked for; needed angles that are constants: pass "
            "jax.lax.stop_gradient of both, or rotate what rms_norm returns in steps of your own"
        )
    operands: Arrays = {name: primal.value for name, primal in primals.items()}
    return rope(operands, spec, heads), operands


def _backward(spec: Spec, heads: Heads, saved: Arrays, cotangents: Any) -> tuple[dict[str, Any]]:
    given = split(saved, heads)
    found: dict[str, Any] = dict.fromkeys(saved)
    for name in PAIR:
        dr = cotangents[f"{name}_out"]
        if isinstance(dr, SymbolicZero):
            found[name] = jnp.zeros_like(given[name])
            continue
        operands = {"x": given[name]}
        if (weight := given.get(f"{name}_weight")) is not None:
            operands["weight"] = weight
        # Its rstd again, not kept: a row is read for the gradient anyhow.
        operands["rstd"] = _autodiff.norm(operands, spec, True)["rstd"]  # noqa: FBT003
        operands["dy"] = rope_reference.rotated_back(jnp.asarray(dr), given["cos"], given["sin"])
        gradients = _autodiff.gradient(operands, spec)
        found[name] = gradients["dx"]
        if weight is not None:
            found[f"{name}_weight"] = gradients["dweight"]
    if heads is not None:
        dq, dk = (found.pop(name) for name in PAIR)
        rest = saved["qkv"][..., sum(heads) :, :]
        found["qkv"] = jnp.concatenate([dq, dk, jnp.zeros_like(rest)], axis=-2)
    return (found,)


rope.defvjp(_forward, _backward, symbolic_zeros=True)
