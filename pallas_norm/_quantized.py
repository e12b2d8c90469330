"""Quantised results: which path a call takes, vmap, sharding, and why there is no gradient."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUntypedFunctionDecorator=false
# (It takes _dispatch, from which __init__.py imports, for a private name of that file; jax.jit and custom_jvp have few
# types.)

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from . import _dispatch, _lowering, _partitioning, _sharding, _transforms, quantized_reference, reference
from ._held import all_held
from ._sharding import COLUMNS, SCALARS
from ._spec import Spec
from .kernels import quantized as kernel
from .plans.fitting import Misfit
from .plans.hardware import H200, Gpu
from .plans.plan import Plan

Arrays = dict[str, jax.Array]

OPERATION = "quantized"


@dataclasses.dataclass(frozen=True)
class Form:
    """What is returned, beside the options of the norm."""

    dtype: str  # of q
    group: int  # elements that share a scale that is computed; 0: the scale is given
    with_y: bool = False


def results_of(form: Form, *, residual: bool) -> tuple[str, ...]:
    scales, s, y = ("scales",) if form.group else (), ("s",) if residual else (), ("y",) if form.with_y else ()
    return ("q", *scales, *s, *y)


@dataclasses.dataclass(frozen=True)
class Call:
    """As _dispatch.Call, for `_lowering` and `_partitioning`."""

    is_partitioned: ClassVar[bool] = True
    tensor: ClassVar[str] = "x"

    names: tuple[str, ...]
    spec: Spec
    form: Form

    @property
    def results(self) -> tuple[str, ...]:
        return results_of(self.form, residual="residual" in self.names)

    def encoded(self) -> str:
        return json.dumps({"operation": OPERATION, **dataclasses.asdict(self)}, sort_keys=True)

    @staticmethod
    def decoded(text: str) -> Call:
        fields = json.loads(text)
        spec = Spec(**fields["spec"] | {"axis_name": tuple(fields["spec"]["axis_name"])})
        return Call(tuple(fields["names"]), spec, Form(**fields["form"]))

    def in_any_order(self, operands: Arrays) -> Arrays:
        """As by_reference, but for the order in which rows are added up, which is left to XLA."""
        return self.by_reference(operands, ordered=False)

    def by_reference(self, operands: Arrays, *, ordered: bool = True) -> Arrays:
        """Of operands with any leading axes."""
        x, weight, form = operands["x"], operands.get("weight"), self.form
        s = {"s": reference.add(x, operands["residual"], self.spec.s_dtype)} if "residual" in operands else {}
        y, _ = reference.forward(s.get("s", x), weight, eps=self.spec.eps, ordered=ordered, **self.spec.rounding)
        found = quantize(y, form, operands.get("scale")) | s
        return found | {"y": y} if form.with_y else found

    def plan_on(self, gpu: Gpu, operands: Mapping[str, Any]) -> Plan:
        """operands: arrays or their types. Raises Misfit, or NoKernel where none is wanted or there is none for n."""
        norm = _dispatch.Call("forward", tuple(name for name in self.names if name not in SCALARS), self.spec)
        plan = norm.plan_on(gpu, operands)
        if (reason := kernel.misfit(plan, gpu, self.form.dtype, self.form.group)) is not None:
            raise Misfit(reason)
        return plan

    def by_kernel(self, operands: Arrays, *, gpu: Gpu = H200, interpret: bool = False) -> Arrays:
        """As by_reference; the kernels take rows (rows, n)."""
        *batch, n = operands["x"].shape
        shapes = {"weight": (n,), "scale": (1,)}
        flat = {name: value.reshape(shapes.get(name, (math.prod(batch), n))) for name, value in operands.items()}
        form, plan = self.form, self.plan_on(gpu, operands)
        options: dict[str, Any] = {"dtype": form.dtype, "group": form.group, "with_y": form.with_y}
        found = kernel.quantized(flat, plan=plan, spec=self.spec, **options, interpret=interpret)
        found["q"] = jax.lax.bitcast_convert_type(found["q"], form.dtype)
        return {name: value.reshape(*batch, value.size // math.prod(batch)) for name, value in found.items()}

    def run(self, operands: Arrays) -> Arrays:
        return _lowering.forced_or_chosen(self, operands, empty=0 in operands["x"].shape)


_partitioning.register(OPERATION, Call.decoded)


def quantize(y: jax.Array, form: Form, scale: jax.Array | None) -> Arrays:
    """q, and where it is computed the scale of each group."""
    if scale is None:
        q, scales = quantized_reference.by_group(y, form.dtype, form.group)
        return {"q": q, "scales": scales}
    scale = jnp.broadcast_to(scale.reshape((1,) * y.ndim), (*y.shape[:-1], 1))
    return {"q": quantized_reference.by_scale(y, scale, form.dtype)}


@functools.partial(jax.jit, static_argnames=("spec", "form"))  # kept, as _transforms.forward is
def _batched(operands: Arrays, spec: Spec, form: Form) -> Arrays:
    @custom_vmap
    def batched(operands: Arrays) -> Arrays:
        def local(operands: Arrays, spec: Spec, summed_over: tuple[str, ...]) -> Arrays:
            del summed_over  # there is no gradient
            return Call(tuple(operands), spec, form).run(operands)

        results = results_of(form, residual="residual" in operands)
        return _sharding.by_shards(local, _sharding.whole_rows(operands), spec, results)

    @batched.def_vmap
    def rule(size: int, which: list[dict[str, bool]], operands: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (is_batched,) = which
        shared = (*COLUMNS, *SCALARS)
        whole = _sharding.of_members(operands, is_batched, size, shared)
        if not any(is_batched.get(name) for name in shared):
            results = _batched(_sharding.aligned(whole), spec, form)
        else:
            results = _own_columns(_sharding.aligned(whole), is_batched, spec, form)
        return results, dict.fromkeys(results, True)

    return batched(operands)


def _own_columns(operands: Arrays, is_batched: dict[str, bool], spec: Spec, form: Form) -> Arrays:
    """Each member has a weight or a scale of its own: y by the norm's own rule, quantised by XLA."""
    rows = {name: 0 if is_batched[name] or name not in COLUMNS else None for name in operands if name != "scale"}

    def norm(operands: Arrays) -> Arrays:
        return _transforms.forward(operands, spec, with_rstd=False)

    found = jax.vmap(norm, in_axes=(rows,))({name: operands[name] for name in rows})
    y, scale = found["y"], operands.get("scale")
    if scale is not None:
        scale = all_held({"scale": scale})["scale"]
    of_scale = 0 if is_batched.get("scale") else None

    def of_member(y: jax.Array, scale: jax.Array | None) -> Arrays:
        return quantize(y, form, scale)

    quantized = jax.vmap(of_member, in_axes=(0, of_scale))(y, scale)
    results = {"y": y, **({"s": found["s"]} if "s" in found else {}), **quantized}
    return {name: results[name] for name in results_of(form, residual="residual" in operands)}


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def quantized(operands: Arrays, spec: Spec, form: Form) -> Arrays:
    """q, and on request the scales, s and y."""
    return _batched(_sharding.aligned(operands), spec, form)


@quantized.defjvp
def _no_derivative(spec: Spec, form: Form, primals: Any, tangents: Any) -> Any:
    del spec, primals, tangents
    raise NotImplementedError(
        f"the derivative of a norm with a {form.dtype} result was asked for; rounding to 8 bits has the derivative 0 "
        "almost everywhere, so there is none to give: pass jax.lax.stop_gradient of the operands, or differentiate "
        "rms_norm or add_rms_norm"
    )
