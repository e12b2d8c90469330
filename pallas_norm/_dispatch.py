"""Which path a call takes: a documented rule of n, platform and JAX version, the same rounding on every path.

With implementation=None the choice is made when the program is lowered, for each platform it is lowered for: the
Mosaic GPU kernel for CUDA, the reference elsewhere. Where n has no kernel, or none on that GPU, where this JAX cannot
build one, where a GPU is too old or two are of different kinds, or where a row is split over devices, CUDA takes the
reference too. Tracing asks no device.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from . import _compat, _lowering, _partitioning, _sharding, _target, reference
from ._dtypes import AS_S, Dtypes, GradientDtypes
from ._held import apart
from ._spec import Spec
from .kernels import backward as backward_kernel
from .kernels import forward as forward_kernel
from .plans import few_rows
from .plans.fitting import Misfit, backward_plan_on, forward_plan_on
from .plans.hardware import H200, Gpu, generation, named
from .plans.lengths import LARGEST_N, SMALLEST_N
from .plans.plan import BackwardPlan, Plan, may_be_in_place
from .regimes import plan_for

Arrays = dict[str, jax.Array]

COLUMNS, PER_ROW = ("weight", "dweight"), ("rstd",)  # (n,) and (...,); everything else is whole rows, (..., n)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which path a call takes on each platform, and why. str() is a sentence or two."""

    cuda: str
    """The path on an NVIDIA GPU: "mosaic_gpu", "xla" or "interpret"."""
    elsewhere: str
    """The path on every other platform."""
    why: str
    """The reason, in words."""
    plan: Plan | None
    """The numbers of the forward kernel, or None where no kernel runs."""

    def __str__(self) -> str:
        paths = self.cuda if self.cuda == self.elsewhere else f"{self.cuda} on CUDA, {self.elsewhere} elsewhere"
        return f"{paths}: {self.why}"


def no_kernel_for(n: int) -> str | None:
    """Why no kernel can run for rows of n elements, whatever the machine; None if one can."""
    if not SMALLEST_N <= n <= LARGEST_N:
        return f"no kernel for rows of {n} elements: the kernels take {SMALLEST_N} <= n <= {LARGEST_N}"
    return _compat.kernels_unavailable()


def _by_xla(reason: str) -> Explanation:
    return Explanation("xla", "xla", f"{reason}, so XLA compiles the reference, with the same rounding", None)


def _planned(n: int, dtype: jax.typing.DTypeLike, implementation: str | None) -> Explanation:
    """The path as far as it is known without a device."""
    if implementation == "xla":
        return Explanation("xla", "xla", 'implementation="xla" was asked for', None)
    reason = no_kernel_for(n)
    if implementation is not None:
        if reason is not None:
            raise NotImplementedError(
                f'implementation="{implementation}" cannot run: {reason}; pass implementation=None'
            )
        return Explanation(
            implementation, implementation, f'implementation="{implementation}" was asked for', plan_for(n, dtype)
        )
    if reason is not None:
        return _by_xla(reason)
    plan = plan_for(n, dtype)
    why = (
        f"{plan.regime.value} kernel for n = {n}, chosen when the program is lowered; "
        "XLA compiles the reference, with the same rounding, for other platforms"
    )
    return Explanation("mosaic_gpu", "xla", why, plan)


def explain(x: Any, implementation: str | None) -> Explanation:
    n, dtype = x.shape[-1], jax.numpy.dtype(x.dtype)
    path = _planned(n, dtype, implementation)
    if (path.cuda, path.elsewhere) != ("mosaic_gpu", "xla"):
        return path
    try:
        target = _target.here()
        plan = forward_plan_on(target.gpu, n, dtype)
    except (_target.NoKernel, Misfit) as reason:
        return _by_xla(str(reason))
    why = path.why + _difference(target.gpu, n, dtype)
    if (few := few_rows.of(plan, dtype.itemsize, target.gpu)) is not None:
        why += f"; up to {few[0]} rows are shared by more warps, with the same bits"
    plan = few_rows.schedule(plan, dtype.itemsize, target.gpu, x.shape[:-1])
    return dataclasses.replace(path, why=why, plan=plan)


def _difference(gpu: Gpu, n: int, dtype: jax.typing.DTypeLike) -> str:
    """What of the plans is not Hopper's, as the end of a sentence."""
    where = f"compute capability {named(gpu.capability)} ({generation(gpu.capability).name})"
    try:
        backward = backward_plan_on(gpu, n, dtype)
    except Misfit as reason:
        return f"; the backward pass is XLA's, because {reason}"
    table = plan_for(n, dtype), backward_plan_on(H200, n, dtype)
    fitted = forward_plan_on(gpu, n, dtype), backward
    if all(own.source is other.source for own, other in zip(fitted, table, strict=True)):
        return ""
    sources = " and ".join(
        f"{name} from {plan.source.value}" for name, plan in zip(("forward", "backward"), fitted, strict=True)
    )
    return f"; on {where} rows are read {sources}, with the bits of other GPUs"


@dataclasses.dataclass(frozen=True)
class Call:
    """One pass over rows, as a value: what `_lowering` chooses a path for, and `_partitioning` writes into programs."""

    is_partitioned: ClassVar[bool] = True
    tensor: ClassVar[str] = "x"

    operation: str  # "forward" or "backward"
    names: tuple[str, ...]  # of the operands
    spec: Spec
    with_rstd: bool = False
    with_dweight: bool = False
    dweight_dtype: str = "float32"
    dx_dtypes: GradientDtypes = AS_S

    @property
    def results(self) -> tuple[str, ...]:
        if self.operation == "forward":
            found = ["y", *(["s"] if "residual" in self.names else []), *(["rstd"] if self.with_rstd else [])]
        else:
            own = ["dresidual"] if self.dx_dtypes.dresidual is not None else []
            found = ["dx", *own, *(["dweight"] if self.with_dweight else [])]
        return tuple(found)

    def encoded(self) -> str:
        """For the partitioner, whose own lowering knows no references: nothing is in place there."""
        apart = dataclasses.replace(self, spec=dataclasses.replace(self.spec, in_place=False))
        return json.dumps(dataclasses.asdict(apart), sort_keys=True)

    @staticmethod
    def decoded(text: str) -> Call:
        fields = json.loads(text)
        spec = Spec(**fields["spec"] | {"axis_name": tuple(fields["spec"]["axis_name"])})
        tuples = {"names": tuple(fields["names"]), "dx_dtypes": GradientDtypes(*fields.get("dx_dtypes", ()))}
        return Call(**fields | tuples | {"spec": spec})

    def in_any_order(self, operands: Arrays) -> Arrays:
        """As by_reference, but for the order in which rows are added up, which is left to XLA."""
        return self.by_reference(operands, ordered=False)

    def by_reference(self, operands: Arrays, *, ordered: bool = True) -> Arrays:
        """Of operands with any leading axes."""
        x, spec = operands["x"], self.spec
        if self.operation == "forward":
            residual, weight = operands.get("residual"), operands.get("weight")
            s = {} if residual is None else {"s": reference.add(x, residual, spec.s_dtype)}
            options: dict[str, Any] = spec.rounding | spec.split | {"ordered": ordered}
            y, rstd = reference.forward(s.get("s", x), weight, eps=spec.eps, **options)
            return {"y": y, **s, **({"rstd": rstd} if self.with_rstd else {})}
        rstd, dy = operands["rstd"], operands["dy"]
        options = spec.rounding | spec.split | {"ordered": ordered}
        total = reference.input_gradient(x, operands.get("weight"), rstd, dy, operands.get("ds"), **options)
        gradients = reference.passed_on(total, self.dx_dtypes)
        if self.with_dweight:
            exact = reference.weight_gradient(x, rstd, dy, **spec.unit)
            gradients["dweight"] = reference.round_to(exact, self.dweight_dtype)
        return gradients

    def plan_on(self, gpu: Gpu, operands: Mapping[str, Any]) -> Plan:
        """operands: arrays or their types. Raises Misfit, or NoKernel where none is wanted or there is none for n."""
        x, names = operands["x"], self.names
        path = _planned(x.shape[-1], x.dtype, self.spec.implementation)
        if path.plan is None:
            raise _target.NoKernel(path.why)
        if self.operation == "forward":
            read = tuple(operands[name].dtype for name in ("x", "residual") if name in names)
            dtypes = self.spec.dtypes(*read)
            return forward_plan_on(gpu, x.shape[-1], dtypes.s, residual="residual" in names, read=read)
        options: dict[str, Any] = {"residual": "ds" in names, "with_dweight": self.with_dweight}
        return backward_plan_on(gpu, x.shape[-1], x.dtype, dy_dtype=operands["dy"].dtype, **options)

    def by_kernel(self, operands: Arrays, *, gpu: Gpu = H200, interpret: bool = False) -> Arrays:
        """As by_reference; the kernels take rows (rows, n)."""
        *batch, n = operands["x"].shape
        rows = math.prod(batch)

        def shape(name: str, *leading: int) -> tuple[int, ...]:
            return (n,) if name in COLUMNS else leading if name in PER_ROW else (*leading, n)

        flat = {name: value.reshape(shape(name, rows)) for name, value in operands.items()}
        plan, options = self.plan_on(gpu, operands), dict[str, Any](spec=self.spec, interpret=interpret)
        if self.operation == "forward":
            if not interpret:
                plan = few_rows.schedule(plan, self._dtypes(flat).s.itemsize, gpu, batch)
            options["places"] = {} if interpret else self._places(plan, flat)
            found = forward_kernel.forward(flat, plan=plan, with_rstd=self.with_rstd, **options)
        else:
            assert isinstance(plan, BackwardPlan)
            options |= {"with_dweight": self.with_dweight, "dweight_dtype": self.dweight_dtype}
            found = backward_kernel.backward(flat, plan=plan, dx_dtypes=self.dx_dtypes, **options)
        return {name: value.reshape(shape(name, *batch)) for name, value in found.items()}

    def _dtypes(self, operands: Arrays) -> Dtypes:
        return self.spec.dtypes(**{name: value.dtype for name, value in operands.items()})

    def _places(self, plan: Plan, rows: Arrays) -> dict[str, str]:
        """For a result the operand whose memory takes it."""
        if not (
            self.spec.in_place and may_be_in_place(plan, len(rows["x"])) and _compat.takes_references(rows.values())
        ):
            return {}
        dtypes = self._dtypes(rows)
        wanted = (("y", dtypes.y, "x"), ("s", dtypes.s, "residual"))
        return {result: of for result, dtype, of in wanted if of in rows and rows[of].dtype == dtype}

    def run(self, operands: Arrays) -> Arrays:
        x, forced = operands["x"], self.spec.implementation
        _planned(x.shape[-1], x.dtype, forced)  # raises where a forced path has no kernel
        if self.spec.axis_name and forced in ("mosaic_gpu", "interpret"):
            axes = ", ".join(self.spec.axis_name)
            raise NotImplementedError(
                f'implementation="{forced}" cannot run: the rows are split over the mesh axes {axes}, and a kernel '
                "needs whole rows; pass implementation=None, or gather the last axis of x first"
            )
        if self.spec.axis_name or 0 in x.shape:
            return apart(self.by_reference)(operands)
        if forced == "interpret":
            return self.by_kernel(operands, interpret=True)
        return _lowering.chosen(self, operands)


def forward(operands: Arrays, spec: Spec, summed_over: tuple[str, ...] = (), *, with_rstd: bool) -> Arrays:
    """y, with a residual also s, on request rstd; of x (..., n), and where given residual and weight."""
    del summed_over  # rows need no others
    return Call("forward", tuple(operands), spec, with_rstd=with_rstd).run(operands)


def backward(
    operands: Arrays,
    spec: Spec,
    summed_over: tuple[str, ...] = (),
    *,
    dweight_dtype: Any = None,
    dx_dtypes: GradientDtypes = AS_S,
) -> Arrays:
    """dx, where it has another dtype dresidual, and dweight, where it is given a dtype; of x (..., n), rstd, dy, and
    where given weight and ds. dweight is summed over the shards of these axes too."""
    if dweight_dtype is None:
        return Call("backward", tuple(operands), spec, dx_dtypes=dx_dtypes).run(operands)
    dtype = jax.numpy.dtype(dweight_dtype).name
    exact = "float32" if summed_over else dtype
    call = Call("backward", tuple(operands), spec, with_dweight=True, dweight_dtype=exact, dx_dtypes=dx_dtypes)
    results = call.run(operands)
    if summed_over:
        results |= {"dweight": _sharding.dweight_of_all(results["dweight"], summed_over, dtype)}
    return results


for _operation in ("forward", "backward"):
    _partitioning.register(_operation, Call.decoded)
