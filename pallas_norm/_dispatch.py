"""Which path a call takes: a documented rule of n, platform and JAX version, the same rounding on every path.

With implementation=None the choice is made when the program is lowered, for each platform it is lowered for: the
Mosaic GPU kernel for CUDA, the reference elsewhere. Where n has no kernel, where this JAX cannot build one, where a
local GPU is older than Hopper or has too little shared memory for the plan, or where a row is split over devices, CUDA
takes the reference too. Tracing asks no device.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax

from . import _compat, _lowering, _partitioning, reference
from ._spec import Spec
from .kernels import backward as backward_kernel
from .kernels import forward as forward_kernel
from .plans.lengths import LARGEST_N, SMALLEST_N
from .plans.plan import Plan
from .regimes import backward_plan_for, plan_for

Arrays = dict[str, jax.Array]

COLUMNS, PER_ROW = ("weight", "dweight"), ("rstd",)  # (n,) and (...,); everything else is whole rows, (..., n)

NEEDED_CAPABILITY = (9, 0)


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


def no_gpu() -> str | None:
    """Why the GPUs of this process cannot run the kernels; None if they can."""
    capabilities = _compat.cuda_capabilities()
    if not capabilities:
        return "this process has no CUDA device"
    if min(capabilities) < NEEDED_CAPABILITY:
        oldest = ".".join(map(str, min(capabilities)))
        return f"a GPU of this process has compute capability {oldest}; the kernels need 9.0 (Hopper) or newer"
    return None


def _by_xla(reason: str) -> Explanation:
    return Explanation("xla", "xla", f"{reason}, so XLA compiles the reference, with the same rounding", None)


def _older_gpu() -> str | None:
    """Why a GPU of this process cannot run the kernels, where it has one."""
    return no_gpu() if _compat.cuda_capabilities() else None


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


def explain(n: int, dtype: jax.typing.DTypeLike, implementation: str | None) -> Explanation:
    path = _planned(n, dtype, implementation)
    if (path.cuda, path.elsewhere) != ("mosaic_gpu", "xla"):
        return path
    if (reason := _older_gpu()) is not None:
        return _by_xla(reason)
    assert path.plan is not None
    if (
        reason := _lowering.too_large(Call("forward", ("x",), Spec()), jax.ShapeDtypeStruct((1, n), dtype))
    ) is not None:
        return _by_xla(reason)
    return path


@dataclasses.dataclass(frozen=True)
class Call:
    """One pass over rows, as a value: what `_lowering` chooses a path for, and `_partitioning` writes into programs."""

    operation: str  # "forward" or "backward"
    names: tuple[str, ...]  # of the operands
    spec: Spec
    with_rstd: bool = False
    with_dweight: bool = False
    dweight_dtype: str = "float32"

    @property
    def results(self) -> tuple[str, ...]:
        if self.operation == "forward":
            found = ["y", *(["s"] if "residual" in self.names else []), *(["rstd"] if self.with_rstd else [])]
        else:
            found = ["dx", *(["dweight"] if self.with_dweight else [])]
        return tuple(found)

    def encoded(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @staticmethod
    def decoded(text: str) -> Call:
        fields = json.loads(text)
        spec = Spec(**fields["spec"] | {"axis_name": tuple(fields["spec"]["axis_name"])})
        return Call(**fields | {"names": tuple(fields["names"]), "spec": spec})

    def by_reference(self, operands: Arrays) -> Arrays:
        """Of operands with any leading axes."""
        x, spec = operands["x"], self.spec
        if self.operation == "forward":
            residual, weight = operands.get("residual"), operands.get("weight")
            s = {} if residual is None else {"s": reference.add(x, residual)}
            options = spec.rounding | spec.split
            y, rstd = reference.forward(s.get("s", x), weight, eps=spec.eps, **options)
            return {"y": y, **s, **({"rstd": rstd} if self.with_rstd else {})}
        rstd, dy, options = operands["rstd"], operands["dy"], spec.rounding | spec.split
        gradients = {"dx": reference.input_gradient(x, operands.get("weight"), rstd, dy, operands.get("ds"), **options)}
        if self.with_dweight:
            exact = reference.weight_gradient(x, rstd, dy, cast_before_scale=spec.cast_before_scale)
            gradients["dweight"] = reference.round_to(exact, self.dweight_dtype)
        return gradients

    def by_kernel(self, operands: Arrays, *, interpret: bool = False) -> Arrays:
        """As by_reference; the kernels take rows (rows, n)."""
        *batch, n = operands["x"].shape
        rows = math.prod(batch)

        def shape(name: str, *leading: int) -> tuple[int, ...]:
            return (n,) if name in COLUMNS else leading if name in PER_ROW else (*leading, n)

        flat = {name: value.reshape(shape(name, rows)) for name, value in operands.items()}
        found = self._by_kernel(flat, interpret=interpret)
        return {name: value.reshape(shape(name, *batch)) for name, value in found.items()}

    def _by_kernel(self, operands: Arrays, *, interpret: bool) -> Arrays:
        x, spec = operands["x"], self.spec
        if self.operation == "forward":
            plan = plan_for(x.shape[1], x.dtype, residual="residual" in operands)
            return forward_kernel.forward(operands, plan=plan, spec=spec, with_rstd=self.with_rstd, interpret=interpret)
        plan = backward_plan_for(x.shape[1], x.dtype, dy_dtype=operands["dy"].dtype, residual="ds" in operands)
        return backward_kernel.backward(
            operands,
            plan=plan,
            spec=spec,
            with_dweight=self.with_dweight,
            dweight_dtype=self.dweight_dtype,
            interpret=interpret,
        )

    def refused(self) -> str | None:
        """Why no kernel can run on the GPUs here, asked when a program is lowered for CUDA."""
        return _older_gpu() if _compat.devices_are_known() else None

    def run(self, operands: Arrays) -> Arrays:
        x, forced = operands["x"], self.spec.implementation
        path = _planned(x.shape[-1], x.dtype, forced)
        if self.spec.axis_name and forced in ("mosaic_gpu", "interpret"):
            axes = ", ".join(self.spec.axis_name)
            raise NotImplementedError(
                f'implementation="{forced}" cannot run: the rows are split over the mesh axes {axes}, and a kernel '
                "needs whole rows; pass implementation=None, or gather the last axis of x first"
            )
        if self.spec.axis_name or path.plan is None or math.prod(x.shape[:-1]) == 0:
            return self.by_reference(operands)
        if forced == "interpret":
            return self.by_kernel(operands, interpret=True)
        return _lowering.chosen(self, operands)


def forward(operands: Arrays, spec: Spec, *, with_rstd: bool) -> Arrays:
    """y, with a residual also s, on request rstd; of x (..., n), and where given residual and weight."""
    return Call("forward", tuple(operands), spec, with_rstd=with_rstd).run(operands)


def backward(operands: Arrays, spec: Spec, *, with_dweight: bool, dweight_dtype: Any = "float32") -> Arrays:
    """dx, on request dweight, rounded to dweight_dtype; of x (..., n), rstd, dy, and where given weight and ds."""
    name = jax.numpy.dtype(dweight_dtype).name
    call = Call("backward", tuple(operands), spec, with_dweight=with_dweight, dweight_dtype=name)
    return call.run(operands)


_partitioning.register(Call.decoded)
