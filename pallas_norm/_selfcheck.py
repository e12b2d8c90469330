"""The self-check: what a call gave, against the bits that were recorded, or against a replay of its roundings.

On a path whose order of additions is specified rstd, y, s and dx have the recorded bits. Elsewhere y and s have to have
the bits of the replay from the call's own rstd, and rstd and dx be within a derived bound of float64, as dweight is on
every path. NumPy and ml_dtypes only: XLA may drop the rounding that is being checked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from . import _golden
from ._golden import DTYPES, EPS, Array, Case
from .plans import few_rows
from .plans.fitting import Misfit, backward_plan_on, forward_plan_on
from .plans.hardware import H200, Gpu
from .plans.plan import Plan

Arrays: TypeAlias = Mapping[str, Array]
Bits: TypeAlias = Mapping[str, str]  # the digests of the results that have specified bits

U = 2.0**-24  # unit roundoff of float32
F32 = DTYPES["float32"]
FORMATS = {"bfloat16": (-126, 7), "float16": (-14, 10), "float32": (-126, 23)}  # smallest exponent, bits of mantissa
# Where the order is not specified, rstd of one program may be this many units in the last place from that of another.
# All of them change 0.3 % of 16-bit outputs; a missing rounding changes 25 %.
SLACK = 32
OTHER_BITS = (
    "within the bounds of any order of additions, but with other bits than this version has: another order, or another "
    "rounding of a product, a root or a quotient (docs/order.md)"
)
REPORT = "open an issue with the whole of this output"
FAST_MATH = "--xla_cpu_enable_fast_math"


def next_step(*, by_kernel: bool) -> str:
    """What somebody does whose bits are wrong."""
    given = [word for word in os.environ.get("XLA_FLAGS", "").split() if word.split("=")[0] == FAST_MATH]
    if given and not by_kernel and not given[-1].endswith(("=false", "=0")):
        return (
            f"take {given[-1]} out of XLA_FLAGS: with it XLA's code for CPUs does not add and divide as it is written"
        )
    if by_kernel:
        return f'pass implementation="xla" meanwhile, and {REPORT}'
    return f"install a jax that docs/compatibility.md calls tested, and {REPORT}"


# --- what is checked --------------------------------------------------------------------------------------------------


def kind(plan: Plan) -> str:
    """Which kernel it is, in words."""
    warpgroups = f"{plan.warpgroups} warpgroup{'s' if plan.warpgroups > 1 else ''}"
    shared = "" if plan.cluster == 1 else f" in each of {plan.cluster} CTAs"
    return "warp" if plan.regime.value == "warp" else f"cta, {warpgroups}{shared}"


def forward_plan_of(case: Case, gpu: Gpu = H200, *, residual: bool = False) -> Plan:
    """The one that so many rows take: for many, or for few. Raises Misfit."""
    plan = forward_plan_on(gpu, case.n, case.dtype, residual=residual)
    return few_rows.schedule(plan, DTYPES[case.dtype].itemsize, gpu, (case.rows,))


def kind_of(case: Case, gpu: Gpu = H200) -> str:
    """Of the forward kernel that so many rows take. Raises Misfit."""
    return kind(forward_plan_of(case, gpu))


def shape_of(case: Case) -> str:
    """In a line of the report: with the rows where they are not those of `_golden.case`."""
    return f"n = {case.n}" if case == _golden.case(case.n, case.dtype) else f"{case.rows} x {case.n}"


def _kinds(case: Case, gpu: Gpu) -> Iterator[tuple[str, str, str]]:
    """Of its kernels, forward and backward, with and without a residual: (which schedule of which pass, kind, source);
    those that the GPU has."""
    for residual in (False, True):
        with contextlib.suppress(Misfit):
            plan = forward_plan_of(case, gpu, residual=residual)
            few = plan != forward_plan_on(gpu, case.n, case.dtype, residual=residual)
            yield "forward, few rows" if few else "forward", kind(plan), plan.source.value
        with contextlib.suppress(Misfit):
            plan = backward_plan_on(gpu, case.n, case.dtype, residual=residual)
            yield "backward", kind(plan), plan.source.value


def kernel_cases(gpu: Gpu = H200) -> list[Case]:
    """For each dtype one case of each kind of kernel, forward, with either schedule, and backward."""
    cases: list[Case] = []
    for dtype in DTYPES:
        seen: set[tuple[str, str, str]] = set()
        for case in (case for n in _golden.LENGTHS for case in _golden.cases(n, dtype)):
            kinds = set(_kinds(case, gpu))
            if not kinds <= seen:
                cases.append(case)
                seen |= kinds
    return cases


def all_cases(gpu: Gpu) -> list[Case]:
    """Also of the path of rows that no kernel takes."""
    return [*_golden.WITHOUT_KERNEL, *kernel_cases(gpu)]


XLA_CASES = (
    *_golden.WITHOUT_KERNEL,
    *(_golden.case(n, dtype) for n in (128, 1000, 4096) for dtype in DTYPES),
    _golden.LARGE,
)


# --- the roundings, replayed ------------------------------------------------------------------------------------------


def output(x: Array, weight: Array, rstd: Array) -> Array:
    """y, from the call's own rstd."""
    unit = (x.astype(F32) * rstd[..., None]).astype(x.dtype)  # Hugging Face rounds here, before the weight
    return (unit.astype(F32) * weight.astype(F32)).astype(x.dtype)


def rounded_once(x: Array, weight: Array, rstd: Array) -> Array:
    """What a norm gives that leaves out the rounding before the weight."""
    return (x.astype(F32) * rstd[..., None] * weight.astype(F32)).astype(x.dtype)


def add(x: Array, residual: Array) -> Array:
    return (x.astype(F32) + residual.astype(F32)).astype(x.dtype)


def _differ(found: Array, expected: Array) -> Array:
    raw = np.uint16 if expected.dtype.itemsize == 2 else np.uint32
    return found.view(raw) != expected.view(raw)


def _form(name: str, found: Array, expected: Array) -> str | None:
    if (found.dtype, found.shape) == (expected.dtype, expected.shape):
        return None
    return f"{name} is {found.dtype}{list(found.shape)}, not {expected.dtype}{list(expected.shape)}"


def _bits(name: str, found: Array, expected: Array) -> str | None:
    if (form := _form(name, found, expected)) is not None:
        return form
    differ = _differ(found, expected)
    if not differ.any():
        return None
    at = np.unravel_index(int(np.argmax(differ)), differ.shape)
    return (
        f"{name}: {differ.sum()} of {differ.size} elements have other bits than the replay, the first at "
        f"{list(map(int, at))}: {found[at]}, not {expected[at]}"
    )


def check_output(name: str, y: Array, x: Array, weight: Array, rstd: Array, *, slack: int = 0) -> list[str]:
    """What is wrong with y. slack: how many units in the last place a row's rstd may be from the one given, where y
    comes from another program of XLA than rstd does."""
    expected = output(x, weight, rstd)
    for distance in (step * sign for step in range(1, slack + 1) for sign in (1, -1)):
        if y.shape != expected.shape or y.dtype != expected.dtype:
            break
        rows = _differ(y, expected).any(axis=-1)
        if not rows.any():
            break
        moved = (rstd[rows].view(np.int32) + np.int32(distance)).view(np.float32)
        again = output(x[rows], weight, moved)
        right = ~_differ(y[rows], again).any(axis=-1)
        expected[np.flatnonzero(rows)[right]] = again[right]
    if (wrong := _bits(name, y, expected)) is None:
        return []
    if y.shape == x.shape and y.dtype == x.dtype != F32 and _differ(y, rounded_once(x, weight, rstd)).mean() < 0.01:
        wrong += "; it is what one rounding gives: the one before the weight is missing"
    return [wrong]


# --- sums, in float64: additions in any order -------------------------------------------------------------------------


def _spacing(values: Array, dtype: np.dtype[Any]) -> Array:
    """The distance in `dtype` between the neighbours of each float64 value."""
    smallest, mantissa = FORMATS[dtype.name]
    return np.ldexp(1.0, np.maximum(np.frexp(values)[1] - 1, smallest) - mantissa)


def _within(name: str, found: Array, exact: Array, bound: Array, dtype: np.dtype[Any]) -> str | None:
    if (form := _form(name, found, exact.astype(dtype))) is not None:
        return form
    outside = ~(np.abs(found.astype(np.float64) - exact) <= bound)  # a NaN is outside too
    if not outside.any():
        return None
    at = np.unravel_index(int(np.argmax(outside)), outside.shape)
    return (
        f"{name}: {outside.sum()} of {outside.size} elements are further from float64 than their roundings allow, "
        f"the first at {list(map(int, at))}: {found[at]}, not {exact[at]:.6g} (+- {bound[at]:.2g})"
    )


def check_rstd(rstd: Array, x: Array) -> list[str]:
    """Squares do not cancel, so the sum's relative error is at most one U an addition, which the root halves; two units
    for division, eps and the root."""
    exact = 1 / np.sqrt(np.mean(np.square(x.astype(np.float64)), axis=-1) + np.float64(np.float32(EPS)))
    wrong = _within("rstd", rstd, exact, (2 + x.shape[-1] / 2) * _spacing(exact, F32), F32)
    return [] if wrong is None else [wrong]


def _input_gradient(given: Arrays, x: Array, rstd: Array, *, residual: bool) -> tuple[Array, Array]:
    """(dx, the largest distance from it): before the last rounding only g is rounded to the dtype of x."""
    g = (given["dy"].astype(F32) * given["weight"].astype(F32)).astype(x.dtype).astype(np.float64)
    scale = rstd.astype(np.float64)[..., None]
    unit = x.astype(np.float64) * scale
    mean = np.mean(g * unit, axis=-1, keepdims=True)
    of_sum = np.abs(unit) * (x.shape[-1] + 4) * U * np.mean(np.abs(g * unit), axis=-1, keepdims=True)
    of_rest = 6 * U * (np.abs(g) + np.abs(unit * mean))
    dx, error = scale * (g - unit * mean), scale * (of_sum + of_rest)
    bound = error + _spacing(np.abs(dx) + error, x.dtype) / 2
    if residual:  # ds is added to the rounded dx, in float32, and the sum is rounded once more
        dx = dx + given["ds"].astype(np.float64)
        bound = bound + U * np.abs(dx)
        bound = bound + _spacing(np.abs(dx) + bound, x.dtype) / 2
    return dx, bound


def _weight_gradient(given: Arrays, x: Array, rstd: Array) -> tuple[Array, Array]:
    """(dweight, the largest distance from it), the rows added up in any order."""
    unit = (x.astype(F32) * rstd[..., None]).astype(x.dtype).astype(np.float64)
    terms = given["dy"].astype(np.float64) * unit
    exact, error = terms.sum(axis=0), (len(terms) + 1) * U * np.abs(terms).sum(axis=0)
    return exact, error + _spacing(np.abs(exact) + error, x.dtype) / 2


# --- the verdict ------------------------------------------------------------------------------------------------------


def check_y(y: Array, x: Array, weight: Array, rstd: Array, bits: Bits) -> list[str]:
    """What is wrong with y of a program of its own; rstd is that of another."""
    if "y" not in bits:
        return check_output("y", y, x, weight, rstd, slack=SLACK)
    return _unless_recorded("y", y, bits, check_output("y", y, x, weight, rstd))


def _unless_recorded(name: str, found: Array, bits: Bits, wrong: list[str]) -> list[str]:
    """`wrong` where no bits are recorded; else nothing, or what is wrong with other bits, in whatever words there
    are."""
    if name not in bits:
        return wrong
    return [] if _golden.digest(found) == bits[name] and not wrong else wrong or [f"{name}: {OTHER_BITS}"]


def check(given: Arrays, found: Arrays, *, bits: Bits) -> list[str]:
    """What is wrong with the results `found` of the operands `given`: a sentence each, none where all is right.

    found: y, rstd, dx and dweight, in the residual form s too. bits: of those of them whose bits the path promises.
    """
    x, weight, rstd = given["x"], given["weight"], found["rstd"]
    dtype, residual = x.dtype, "s" in found
    wrong: list[str] = []

    def judge(name: str, sentence: str | None) -> None:
        wrong.extend(_unless_recorded(name, found[name], bits, [] if sentence is None else [sentence]))

    if residual:
        judge("s", _bits("s", found["s"], add(x, given["residual"])))
        x = found["s"]
    wrong += _unless_recorded("rstd", rstd, bits, check_rstd(rstd, x))
    wrong += _unless_recorded("y", found["y"], bits, check_output("y", found["y"], x, weight, rstd))
    judge("dx", _within("dx", found["dx"], *_input_gradient(given, x, rstd, residual=residual), dtype))
    judge("dweight", _within("dweight", found["dweight"], *_weight_gradient(given, x, rstd), dtype))
    return wrong
