"""Rotated heads and their gradients: which path a call takes, vmap, sharding."""

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

from . import _autodiff, _compat, _dispatch, _lowering, _sharding, _target, _transforms, reference, rope_reference
from ._held import all_held, apart
from ._spec import Spec
from .kernels import rope as kernel
from .kernels import rope_backward as backward_kernel
from .plans.fitting import Misfit
from .plans.hardware import H200, Gpu
from .plans.plan import BackwardPlan, Plan
from .plans.rope import rope_backward_plan_on, rope_plan_on

Arrays = dict[str, jax.Array]
F32 = jnp.float32
Heads = tuple[int, int] | None  # of q and of k in the tensor of a projection

PAIR = kernel.PAIR
WEIGHTS = ("q_weight", "k_weight")
ANGLES = ("cos", "sin")
OUTPUTS = ("q_out", "k_out")
GRADIENTS = ("dq_out", "dk_out")  # of those


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
    results: tuple[str, ...] = OUTPUTS
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

    def _wanted(self, operands: Mapping[str, Any]) -> Any:
        """q or qkv; NoKernel where none is wanted or there is none for n."""
        q = operands[self.tensor]
        if (path := _dispatch._planned(q.shape[-1], q.dtype, self.spec.implementation)).plan is None:
            raise _target.NoKernel(path.why)
        return q

    def plan_on(self, gpu: Gpu, operands: Mapping[str, Any]) -> Plan:
        """operands: arrays or their types. Raises Misfit, or NoKernel."""
        q = self._wanted(operands)
        return rope_plan_on(gpu, q.shape[-1], q.dtype)

    def by_kernel(self, operands: Arrays, *, gpu: Gpu = H200, interpret: bool = False) -> Arrays:
        """As by_reference."""
        plan = self.plan_on(gpu, operands)
        found = kernel.rope(self._flat(operands), plan=plan, **self._options(operands, interpret=interpret))
        *batch, _, n = operands[self.tensor].shape
        return {name: value.reshape(*batch, -1, n) for name, value in found.items()}

    def _options(self, operands: Arrays, *, interpret: bool) -> dict[str, Any]:
        weight = operands.get(WEIGHTS[0])
        dtypes = self.spec.dtypes(operands[self.tensor].dtype, weight=None if weight is None else weight.dtype)
        return {"dtypes": dtypes, "spec": self.spec, "heads": self.heads, "interpret": interpret}

    def _flat(self, operands: Arrays) -> Arrays:
        """As the kernels take them: of heads (tokens, heads, n), of angles (positions, n)."""

        def flat(name: str, value: jax.Array) -> jax.Array:
            if name in WEIGHTS:
                return value
            tail = value.shape[-1:] if name in ANGLES else value.shape[-2:]
            return value.reshape(math.prod(value.shape) // math.prod(tail), *tail)

        return {name: flat(name, value) for name, value in operands.items()}

    def run(self, operands: Arrays) -> Arrays:
        empty = any(0 in operands[name].shape for name in (*PAIR, "qkv") if name in operands)
        return _lowering.forced_or_chosen(self, operands, empty=empty)


@dataclasses.dataclass(frozen=True)
class GradientCall(Call):
    """dq, dk, with weights also q_dweight and k_dweight, in float32 where they are summed_over shards."""

    summed_over: tuple[str, ...] = ()

    def by_reference(self, operands: Arrays) -> Arrays:
        """The norms' own kernels, where there are any, and the rotation between."""
        given = split({name: value for name, value in operands.items() if name not in GRADIENTS}, self.heads)
        found: Arrays = {}
        for name in PAIR:
            dx, dweight = steps(given, name, operands[f"d{name}_out"], self.spec, of_shard=bool(self.summed_over))
            found |= {f"d{name}": dx} if dweight is None else {f"d{name}": dx, f"{name}_dweight": dweight}
        return found

    def plan_on(self, gpu: Gpu, operands: Mapping[str, Any]) -> BackwardPlan:
        q = self._wanted(operands)
        return rope_backward_plan_on(gpu, q.shape[-1], q.dtype, dy_dtype=operands[GRADIENTS[0]].dtype)

    def by_kernel(self, operands: Arrays, *, gpu: Gpu = H200, interpret: bool = False) -> Arrays:
        plan, given = self.plan_on(gpu, operands), self._flat(operands)
        options = self._options(operands, interpret=interpret)
        if WEIGHTS[0] in operands:
            options["dweight_dtype"] = F32 if self.summed_over else operands[WEIGHTS[0]].dtype
        found = backward_kernel.backward(given, plan=plan, **options)
        *batch, _, n = operands[self.tensor].shape
        found |= {f"d{name}": found[f"d{name}"].reshape(*batch, -1, n) for name in PAIR}
        return found


def steps(
    given: Arrays, name: str, dr: jax.Array, spec: Spec, *, of_shard: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """dx and dweight of q or of k: the gradient of the rotation, then that of the norm. Its rstd again, not kept: a row
    is read for the gradient anyhow. of_shard: dweight in float32, to be summed over shards."""
    angles = all_held({"dr": jnp.asarray(dr), "cos": given["cos"], "sin": given["sin"]})
    operands = {"x": given[name]}
    if (weight := given.get(f"{name}_weight")) is not None:
        operands["weight"] = weight
    operands["rstd"] = _autodiff.norm(operands, spec, True)["rstd"]  # noqa: FBT003
    operands["dy"] = rope_reference.rotated_back(**angles)
    if of_shard:
        rows = all_held({name: operands[name] for name in ("x", "rstd", "dy")})
        dweight = reference.weight_gradient(**rows, **spec.unit)
        return _transforms.backward(operands, spec, with_dweight=False)["dx"], dweight
    gradients = _autodiff.gradient(operands, spec)
    return gradients["dx"], gradients.get("dweight")


@functools.partial(jax.jit, static_argnames=("spec", "heads"))  # kept, as _transforms.forward is
def forward(operands: Arrays, spec: Spec, heads: Heads) -> Arrays:
    """q_out and k_out."""

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
            _lowering.not_forced(spec, _lowering.OWN_WEIGHTS)
            results = jax.vmap(apart(call.by_reference), in_axes=(axes,))(operands)
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

        results = forward({name: with_axis(name, value) for name, value in operands.items()}, spec, heads)
        return results, dict.fromkeys(results, True)

    return batched(operands)


@functools.partial(jax.jit, static_argnames=("spec", "heads"))
def backward(operands: Arrays, spec: Spec, heads: Heads) -> Arrays:
    """dq, dk, and where given weights, q_dweight and k_dweight in their dtype; also of dq_out and dk_out."""
    weighted = WEIGHTS[0] in operands
    results = ("dq", "dk", *(("q_dweight", "k_dweight") if weighted else ()))

    @custom_vmap
    def batched(operands: Arrays) -> Arrays:
        call = GradientCall(tuple(operands), spec, heads, results)
        if not _has_kernel(call, operands):
            return call.by_reference(operands)
        like = operands[call.tensor]
        over = _compat.missing_axes(operands[WEIGHTS[0]], like) if weighted else ()
        call = dataclasses.replace(call, summed_over=over)
        found = call.run({name: _compat.vary_like(value, like) for name, value in operands.items()})
        for name in results[2:] if over else ():
            found[name] = _sharding.dweight_of_all(found[name], over, operands[WEIGHTS[0]].dtype)
        return found

    @batched.def_vmap
    def rule(size: int, which: list[dict[str, bool]], operands: Arrays) -> tuple[Arrays, dict[str, bool]]:
        """Each member has dweights of its own, and a kernel adds up all rows."""
        del size
        axes = {name: 0 if is_batched else None for name, is_batched in which[0].items()}
        call = GradientCall(tuple(operands), spec, heads, results)
        return jax.vmap(call.by_reference, in_axes=(axes,))(operands), dict.fromkeys(results, True)

    return batched(operands)


def _has_kernel(call: GradientCall, operands: Arrays) -> bool:
    """Without one the steps are taken, with the norms' kernels, also where a kernel was asked for."""
    try:
        call.plan_on(H200, operands)
    except (Misfit, _target.NoKernel):
        return False
    return True
