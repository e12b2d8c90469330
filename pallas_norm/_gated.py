"""Gated norms: which path a call takes, vmap, sharding: as _dispatch and _transforms."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUntypedFunctionDecorator=false
# (It takes _dispatch, from which __init__.py imports, for a private name of that file; jax.jit has few types.)

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
from jax.custom_batching import custom_vmap

from . import _dispatch, _lowering, _partitioning, _sharding, _target, gated_reference, reference
from ._held import all_held, apart
from ._spec import Spec
from .gated_reference import Form
from .kernels import gated as kernel
from .kernels import gated_backward as backward_kernel
from .plans.fitting import Misfit, backward_plan_on, forward_plan_on
from .plans.hardware import H200, Gpu
from .plans.plan import BackwardPlan, Plan

Arrays = dict[str, jax.Array]

FORWARD, BACKWARD = "gated", "gated_backward"


@dataclasses.dataclass(frozen=True)
class Call:
    """As _dispatch.Call, for `_lowering` and `_partitioning`. rstds is (..., groups)."""

    is_partitioned: ClassVar[bool] = True
    tensor: ClassVar[str] = "x"

    operation: str
    names: tuple[str, ...]
    spec: Spec
    form: Form
    with_rstd: bool = False
    with_dweight: bool = False
    dweight_dtype: str = "float32"

    @property
    def results(self) -> tuple[str, ...]:
        if self.operation == FORWARD:
            return ("y", "rstds") if self.with_rstd else ("y",)
        return ("dx", "dgate", "dweight") if self.with_dweight else ("dx", "dgate")

    def encoded(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def decoded(text: str) -> Call:
        fields = json.loads(text)
        spec = Spec(**fields["spec"] | {"axis_name": tuple(fields["spec"]["axis_name"])})
        return Call(**fields | {"names": tuple(fields["names"]), "spec": spec, "form": Form(**fields["form"])})

    def in_any_order(self, operands: Arrays) -> Arrays:
        """As by_reference, but for the order in which rows are added up, which is left to XLA."""
        return self.by_reference(operands, ordered=False)

    def by_reference(self, operands: Arrays, *, ordered: bool = True) -> Arrays:
        """Of operands with any leading axes."""
        if self.operation == FORWARD:
            return _forward_by_reference(operands, self.spec, self.form, ordered=ordered, with_rstd=self.with_rstd)
        found, terms = gradients(operands, self.spec, self.form, ordered=ordered)
        if self.with_dweight:
            found["dweight"] = reference.round_to(gated_reference.weight_gradient(terms), self.dweight_dtype)
        return found

    def plan_on(self, gpu: Gpu, operands: Mapping[str, Any]) -> Plan:
        """operands: arrays or their types. Raises Misfit, or NoKernel where none is wanted or there is none for n."""
        x, gate, group = operands["x"], operands["gate"], self.form.group
        path = _dispatch._planned(group, x.dtype, self.spec.implementation)
        if path.plan is None:
            raise _target.NoKernel(path.why)
        groups = x.shape[-1] // group if "weight" in self.names else 1
        if self.operation == FORWARD:
            read = (x.dtype, gate.dtype)
            return kernel.fitted(forward_plan_on(gpu, group, x.dtype, residual=True, read=read), groups)
        if gate.dtype != x.dtype:
            raise Misfit(f"the backward kernel takes x and gate of one dtype, and they are {x.dtype} and {gate.dtype}")
        options: dict[str, Any] = {"residual": True, "with_dweight": self.with_dweight}
        plan = backward_plan_on(gpu, group, x.dtype, dy_dtype=operands["dy"].dtype, **options)
        return kernel.fitted(plan, groups)

    def by_kernel(self, operands: Arrays, *, gpu: Gpu = H200, interpret: bool = False) -> Arrays:
        """As by_reference; the kernels take groups as rows (rows, n)."""
        shape, group = operands["x"].shape, self.form.group
        rows = math.prod(shape) // group
        shapes = {"weight": (shape[-1],), "rstds": (rows,)}
        flat = {name: value.reshape(shapes.get(name, (rows, group))) for name, value in operands.items()}
        if "rstds" in flat:
            flat["rstd"] = flat.pop("rstds")
        plan = self.plan_on(gpu, operands)
        options: dict[str, Any] = {"spec": self.spec, "form": self.form, "interpret": interpret}
        if self.operation == FORWARD:
            found = kernel.forward(flat, plan=plan, with_rstd=self.with_rstd, **options)
        else:
            assert isinstance(plan, BackwardPlan)
            options |= {"with_dweight": self.with_dweight, "dweight_dtype": self.dweight_dtype}
            found = backward_kernel.backward(flat, plan=plan, **options)
        if "rstd" in found:
            found["rstds"] = found.pop("rstd")
        of = {"dweight": shape[-1:], "rstds": (*shape[:-1], shape[-1] // group)}
        return {name: value.reshape(of.get(name, shape)) for name, value in found.items()}

    def run(self, operands: Arrays) -> Arrays:
        return _lowering.forced_or_chosen(self, operands, empty=0 in operands["x"].shape)


for _operation in (FORWARD, BACKWARD):
    _partitioning.register(_operation, Call.decoded)


def _options(spec: Spec, *, ordered: bool) -> dict[str, Any]:
    rounding = {"cast_before_scale": spec.cast_before_scale, "weight_offset": spec.weight_offset}
    return rounding | {"ordered": ordered}


def _forward_by_reference(
    operands: Arrays, spec: Spec, form: Form, *, ordered: bool = True, with_rstd: bool = False
) -> Arrays:
    given = operands["x"], operands["gate"], operands.get("weight")
    options = _options(spec, ordered=ordered)
    y, rstds = gated_reference.forward(*given, form, eps=spec.eps, out_dtype=spec.out_dtype, **options)
    return {"y": y, "rstds": rstds} if with_rstd else {"y": y}


def gradients(operands: Arrays, spec: Spec, form: Form, *, ordered: bool = True) -> tuple[Arrays, jax.Array]:
    """({dx, dgate}, what dweight adds up)."""
    given = operands["x"], operands["gate"], operands.get("weight"), operands["rstds"], operands["dy"]
    dx, dgate, terms = gated_reference.gradients(*given, form, **_options(spec, ordered=ordered))
    return {"dx": dx, "dgate": dgate}, terms


# --- vmap and sharding ------------------------------------------------------------------------------------------------


def _batched(
    operands: Arrays,
    spec: Spec,
    call: Callable[[Arrays], Arrays],
    of_members: Callable[[Arrays], Arrays],
    of_member: Callable[[Arrays], Arrays],
) -> Arrays:
    """`call` with its vmap rule: of_members of all members at once, the weight being shared; of_member, plain JAX, of
    each where it has a weight of its own."""

    @custom_vmap
    def batched(operands: Arrays) -> Arrays:
        return call(operands)

    @batched.def_vmap
    def rule(size: int, which: list[dict[str, bool]], operands: Arrays) -> tuple[Arrays, dict[str, bool]]:
        (is_batched,) = which
        whole = _sharding.aligned(_sharding.of_members(operands, is_batched, size))
        if is_batched.get("weight"):
            _lowering.not_forced(spec, _lowering.OWN_WEIGHTS)
            results = jax.vmap(apart(of_member))(whole)
        else:
            results = of_members(whole)
        return results, dict.fromkeys(results, True)

    return batched(operands)


@functools.partial(jax.jit, static_argnames=("spec", "form", "with_rstd"))  # kept, as _transforms.forward is
def forward(operands: Arrays, spec: Spec, form: Form, *, with_rstd: bool) -> Arrays:
    """y, on request rstds; of x, gate, and where given weight."""

    def local(operands: Arrays, spec: Spec, summed_over: tuple[str, ...]) -> Arrays:
        del summed_over  # rows need no others
        return Call(FORWARD, tuple(operands), spec, form, with_rstd=with_rstd).run(operands)

    def call(operands: Arrays) -> Arrays:
        results = ("y", "rstds") if with_rstd else ("y",)
        return _sharding.by_shards(local, _sharding.whole_rows(operands), spec, results)

    def of_members(operands: Arrays) -> Arrays:
        return forward(operands, spec, form, with_rstd=with_rstd)

    of_member = functools.partial(_forward_by_reference, spec=spec, form=form, with_rstd=with_rstd)
    return _batched(operands, spec, call, of_members, of_member)


@functools.partial(jax.jit, static_argnames=("spec", "form", "with_dweight"))
def backward(operands: Arrays, spec: Spec, form: Form, *, with_dweight: bool) -> Arrays:
    """dx, dgate, and on request dweight in its dtype; of x, gate, rstds, dy, and where given weight."""
    dtype = operands["weight"].dtype.name if with_dweight else "float32"

    def local(operands: Arrays, spec: Spec, summed_over: tuple[str, ...]) -> Arrays:
        part = "float32" if summed_over else dtype
        options: dict[str, Any] = {"with_dweight": with_dweight, "dweight_dtype": part}
        found = Call(BACKWARD, tuple(operands), spec, form, **options).run(operands)
        if with_dweight and summed_over:
            found["dweight"] = _sharding.dweight_of_all(found["dweight"], summed_over, dtype)
        return found

    def call(operands: Arrays) -> Arrays:
        results = ("dx", "dgate", "dweight") if with_dweight else ("dx", "dgate")
        return _sharding.by_shards(local, _sharding.whole_rows(operands), spec, results)

    def dweight(sums: jax.Array, operands: Arrays) -> jax.Array:
        return _sharding.dweight_of_all(sums, _sharding.summed_over(operands), dtype)

    def of_members(operands: Arrays) -> Arrays:
        found = backward(operands, spec, form, with_dweight=False)
        if with_dweight:  # each member has one of its own, and the kernel adds up all rows
            sums = jax.vmap(gated_reference.weight_gradient)(gradients(all_held(operands), spec, form)[1])
            found = found | {"dweight": dweight(sums, operands)}
        return found

    def of_member(operands: Arrays) -> Arrays:
        found, terms = gradients(operands, spec, form)
        return found | {"dweight": dweight(gated_reference.weight_gradient(terms), operands)} if with_dweight else found

    return _batched(operands, spec, call, of_members, of_member)
