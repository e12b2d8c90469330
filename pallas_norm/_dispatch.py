"""Which path a call takes: a documented rule of n, platform and JAX version, the same rounding on every path.

With implementation=None the choice is made when the program is lowered, for each platform it is lowered for: the
Mosaic GPU kernel for CUDA, the reference elsewhere. Where n has no kernel, where this JAX cannot build one, or where
a local GPU is older than Hopper, CUDA takes the reference too.
"""

# pyright: reportUnknownVariableType=false
# (lax.platform_dependent has few types.)

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _compat, reference
from ._spec import Spec
from .kernels import backward as backward_kernel
from .kernels import forward as forward_kernel
from .plans.lengths import LARGEST_N, SMALLEST_N
from .plans.plan import Plan
from .regimes import backward_plan_for, plan_for

Arrays = dict[str, jax.Array]
Function = Callable[[Arrays], Arrays]

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


def explain(n: int, dtype: jax.typing.DTypeLike, implementation: str | None) -> Explanation:
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
    if reason is None and _compat.cuda_capabilities():
        reason = no_gpu()
    if reason is not None:
        return Explanation("xla", "xla", f"{reason}, so XLA compiles the reference, with the same rounding", None)
    plan = plan_for(n, dtype)
    why = (
        f"{plan.regime.value} kernel for n = {n}, chosen when the program is lowered; "
        "XLA compiles the reference, with the same rounding, for other platforms"
    )
    return Explanation("mosaic_gpu", "xla", why, plan)


def _require_gpu() -> None:
    """A forced kernel that cannot run raises here, not in the middle of a compilation."""
    if (reason := no_gpu()) is not None:
        raise NotImplementedError(
            f'implementation="mosaic_gpu" cannot run: {reason}; pass implementation=None to let XLA compile the '
            "reference where there is no such GPU"
        )


def _choose(by_kernel: Callable[..., Arrays], by_reference: Function, operands: Arrays, spec: Spec) -> Arrays:
    rows, n = operands["x"].shape
    path = explain(n, operands["x"].dtype, spec.implementation)
    if path.cuda == path.elsewhere == "mosaic_gpu":
        _require_gpu()
    if rows == 0 or path.plan is None:
        return by_reference(operands)
    kernel = functools.partial(by_kernel, interpret=path.cuda == "interpret")
    if path.cuda == path.elsewhere:
        return kernel(operands)
    return lax.platform_dependent(operands, cuda=kernel, default=by_reference)


def forward(operands: Arrays, spec: Spec, *, with_rstd: bool) -> Arrays:
    """y, with a residual also s, on request rstd; of x (rows, n), and where given residual and weight."""

    def by_reference(operands: Arrays) -> Arrays:
        x, residual, weight = operands["x"], operands.get("residual"), operands.get("weight")
        s = {} if residual is None else {"s": reference.add(x, residual)}
        y, rstd = reference.forward(s.get("s", x), weight, eps=spec.eps, **spec.rounding)
        return {"y": y, **s, **({"rstd": rstd} if with_rstd else {})}

    def by_kernel(operands: Arrays, *, interpret: bool) -> Arrays:
        x = operands["x"]
        plan = plan_for(x.shape[1], x.dtype, residual="residual" in operands)
        return forward_kernel.forward(operands, plan=plan, spec=spec, with_rstd=with_rstd, interpret=interpret)

    return _choose(by_kernel, by_reference, operands, spec)


def backward(operands: Arrays, spec: Spec, *, with_dweight: bool, dweight_dtype: Any = jnp.float32) -> Arrays:
    """dx, on request dweight, rounded to dweight_dtype; of x (rows, n), rstd, dy, and where given weight and ds."""

    def by_reference(operands: Arrays) -> Arrays:
        x, rstd, dy = operands["x"], operands["rstd"], operands["dy"]
        dx = reference.input_gradient(x, operands.get("weight"), rstd, dy, operands.get("ds"), **spec.rounding)
        gradients = {"dx": dx}
        if with_dweight:
            exact = reference.weight_gradient(x, rstd, dy, cast_before_scale=spec.cast_before_scale)
            gradients["dweight"] = reference.round_to(exact, dweight_dtype)
        return gradients

    def by_kernel(operands: Arrays, *, interpret: bool) -> Arrays:
        x, dy = operands["x"], operands["dy"]
        plan = backward_plan_for(x.shape[1], x.dtype, dy_dtype=dy.dtype, residual="ds" in operands)
        return backward_kernel.backward(
            operands,
            plan=plan,
            spec=spec,
            with_dweight=with_dweight,
            dweight_dtype=dweight_dtype,
            interpret=interpret,
        )

    return _choose(by_kernel, by_reference, operands, spec)
