"""Which kernels the direct launch needs: as JAX functions whose row count and strides come with the launch."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_norm._dtypes import AS_S, Dtypes, GradientDtypes
from pallas_norm._spec import Spec
from pallas_norm.gated_reference import Form
from pallas_norm.kernels import backward as backward_kernel
from pallas_norm.kernels import dweight_sum
from pallas_norm.kernels import forward as forward_kernel
from pallas_norm.kernels import gated as gated_kernel
from pallas_norm.kernels import gated_backward as gated_backward_kernel
from pallas_norm.kernels import quantized as quantized_kernel
from pallas_norm.kernels import rope as rope_kernel
from pallas_norm.kernels import rope_backward as rope_backward_kernel
from pallas_norm.kernels.launch_arguments import COUNT, LaunchArguments
from pallas_norm.plans import few_rows
from pallas_norm.plans.fitting import backward_plan_on, forward_plan_on
from pallas_norm.plans.hardware import H200, Gpu
from pallas_norm.plans.plan import BackwardPlan, Plan, from_memory
from pallas_norm.plans.rope import rope_backward_plan_on, rope_plan_on

# The shape with which a kernel is traced; it bounds nothing. A multiple of every block; below 2^31 CTAs with clusters.
NOMINAL_ROWS = 1 << 24

Kind = Literal["forward", "quantized", "rope", "gated", "backward", "rope_backward", "gated_backward", "column_sum"]
ROUNDED = {"x": "x", "residual": "residual", "weight": "weight", "q": "x", "q_weight": "weight"}  # by Dtypes' names


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Everything that a kernel's code depends on. `direct` makes one for each, so that identity is
    equality, and cheap.

    dtypes: of the arrays that go in, by name and in this order. Numbers of the launch follow them: the counts, and with
        `strided` the group and strides of the rows (see pallas_norm.kernels.launch_arguments.StridedRows).
    outputs: names, in this order.
    """

    kind: Kind
    n: int
    dtypes: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]
    spec: Spec
    strided: bool = False
    few: bool = False  # of forward: the schedule for few rows
    dweight_dtype: str = "float32"  # of column_sum
    dx_dtypes: GradientDtypes = AS_S  # of backward
    gpu: Gpu = H200
    q_dtype: str = "int8"  # of quantized
    group: int = 0  # of quantized: elements that share a scale that is computed; 0: it is given
    form: Form | None = None  # of gated
    groups: int = 1  # of gated: weights, which rows have in turn

    @functools.cached_property
    def plan(self) -> Plan | None:
        """Raises Misfit where the GPU has no kernel for these rows."""
        dtypes = dict(self.dtypes)
        if self.kind in ("forward", "quantized"):
            read = tuple(dtypes[name] for name in ("x", "residual") if name in dtypes)
            plan = forward_plan_on(self.gpu, self.n, self.rounding.s, residual="residual" in dtypes, read=read)
            if self.few:
                few = few_rows.of(plan, self.rounding.s.itemsize, self.gpu)
                assert few is not None
                return few[1]
            return from_memory(plan) if self.strided else plan
        if self.kind == "rope":
            return rope_plan_on(self.gpu, self.n, dtypes["q"])
        if self.kind == "rope_backward":
            return rope_backward_plan_on(self.gpu, self.n, dtypes["q"], dy_dtype=dtypes["dq_out"])
        weights = self.groups if "weight" in dtypes else 1
        if self.kind == "gated":
            read = dtypes["x"], dtypes["gate"]
            plan = forward_plan_on(self.gpu, self.n, dtypes["x"], residual=True, read=read)
            return gated_kernel.fitted(from_memory(plan) if self.strided else plan, weights)
        if self.kind in ("backward", "gated_backward"):
            three = "ds" in dtypes or "gate" in dtypes
            options: dict[str, Any] = {"residual": three, "with_dweight": "dweight" in self.outputs}
            plan = backward_plan_on(self.gpu, self.n, dtypes["x"], dy_dtype=dtypes["dy"], **options)
            return gated_kernel.fitted(plan, weights)
        return None

    @property
    def rounding(self) -> Dtypes:
        """What a kernel's steps round to."""
        return self.spec.dtypes(**{ROUNDED[name]: dtype for name, dtype in self.dtypes if name in ROUNDED})

    def result_dtype(self, name: str) -> str:
        """Of an output."""
        if name in ("y", "s"):
            return getattr(self.rounding, name).name
        if self.kind == "rope":
            return self.rounding.y.name
        given = dict(self.dtypes)
        if name in ("dq", "dk"):
            return given["q"]
        of_gradients = {"dx": self.dx_dtypes.dx or given.get("x"), "dresidual": self.dx_dtypes.dresidual}
        of_gradients["dgate"] = given.get("gate")
        return of_gradients.get(name) or "float32"

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        """What each number is multiplied with to be passed as an address."""
        if self.kind == "column_sum":
            return {"rows": COUNT}
        if self.kind == "rope":
            return dict.fromkeys(rope_kernel.NUMBERS, COUNT)
        if self.kind == "rope_backward":
            return dict.fromkeys(rope_backward_kernel.NUMBERS, COUNT)
        rows_of = [name for name in (*dict(self.dtypes), *self.outputs) if name in ("x", "residual", "gate", "y", "s")]
        return LaunchArguments.units(rows_of if self.strided else ())

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*dict(self.dtypes), *self.numbers)

    @property
    def structs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        shapes = {"weight": (self.groups * self.n,), "rstd": (NOMINAL_ROWS,), "scale": (1,)}
        if self.kind in ("rope", "rope_backward"):
            shapes |= dict.fromkeys(("q", "k", "dq_out", "dk_out"), (NOMINAL_ROWS, 1, self.n))
            shapes |= dict.fromkeys(("q_weight", "k_weight"), (self.n,))
        arrays = [jax.ShapeDtypeStruct(shapes.get(name, (NOMINAL_ROWS, self.n)), dtype) for name, dtype in self.dtypes]
        return (*arrays, *(jax.ShapeDtypeStruct((1,), jnp.int32) for _ in self.numbers))

    def function(self) -> Callable[..., Any]:
        def kernel(*values: jax.Array) -> Any:
            operands = dict(zip(self.inputs, values, strict=True))
            if self.kind == "column_sum":
                return dweight_sum.column_sum(operands["parts"], operands["rows"], self.dweight_dtype, interpret=False)
            plan = self.plan
            if self.kind in ("gated", "gated_backward"):
                return self._gated(operands)
            if self.kind in ("rope", "rope_backward"):
                return self._rope(operands)
            if self.kind == "forward":
                assert plan is not None
                results = forward_kernel.forward(
                    operands, plan=plan, spec=self.spec, with_rstd="rstd" in self.outputs, interpret=False
                )
            elif self.kind == "quantized":
                assert plan is not None
                results = quantized_kernel.quantized(
                    operands,
                    plan=plan,
                    spec=self.spec,
                    dtype=self.q_dtype,
                    group=self.group,
                    with_y="y" in self.outputs,
                    interpret=False,
                )
            else:
                assert isinstance(plan, BackwardPlan)
                options: Any = {"with_dweight": "dweight" in self.outputs, "dx_dtypes": self.dx_dtypes}
                results = backward_kernel.partial_dweights(
                    operands, plan=plan, spec=self.spec, **options, interpret=False
                )
            return tuple(results[name] for name in self.outputs)

        return kernel

    def _rope(self, operands: dict[str, jax.Array]) -> Any:
        plan, options = self.plan, {"dtypes": self.rounding, "spec": self.spec, "heads": None, "interpret": False}
        assert plan is not None
        of_kind: Any = rope_kernel.rope if self.kind == "rope" else rope_backward_kernel.partial_dweights
        results = of_kind(operands, plan=plan, **options)
        return tuple(results[name] for name in self.outputs)

    def _gated(self, operands: dict[str, jax.Array]) -> Any:
        plan, form = self.plan, self.form
        assert plan is not None
        assert form is not None
        options: dict[str, Any] = {"spec": self.spec, "form": form, "interpret": False}
        if self.kind == "gated":
            results = gated_kernel.forward(operands, plan=plan, with_rstd="rstd" in self.outputs, **options)
        else:
            assert isinstance(plan, BackwardPlan)
            with_dweight = "dweight" in self.outputs
            results = gated_backward_kernel.partial_dweights(operands, plan=plan, with_dweight=with_dweight, **options)
        return tuple(results[name] for name in self.outputs)
