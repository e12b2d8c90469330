"""Which kernels have their text recorded: of one row length of each plan, in every form that a call can take, and in
those whose numbers come with the launch.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_norm import (
    _transforms,
    add_rms_norm,
    add_rms_norm_quantized,
    rms_norm,
    rms_norm_gated,
    rms_norm_quantized,
    rms_norm_rope,
    rms_norm_rope_qkv,
)
from pallas_norm._spec import Spec
from pallas_norm.gated_reference import Form as Gate
from pallas_norm.plans.lengths import LARGEST_N
from pallas_norm.plans.plan import Plan
from tests import kernel_lengths as lengths
from tests.kernel_text import modules

PROGRAMS = Path(__file__).parents[1] / "interop" / "pallas_norm_torch" / "programs.py"

GROUP = 128
ROWS = 1033  # full blocks of every plan, and rows that fill none


class Case(NamedTuple):
    form: str
    dtype: str
    n: int

    def __str__(self) -> str:
        return f"{self.form} {self.dtype} {self.n}"


# --- in which forms ---------------------------------------------------------------------------------------------------


def _array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _both_ways(case: Case, *, rows: int = ROWS, weight_dtype: Any = None, **options: Any) -> Iterator[bytes]:
    x, weight = _array(rows, case.n, dtype=case.dtype), _array(case.n, dtype=weight_dtype or case.dtype)
    norm = functools.partial(rms_norm, return_rstd=True, **options)
    dy, _ = jax.eval_shape(norm, x, weight)

    def gradients(x: Any, weight: Any, dy: Any) -> Any:
        (y, rstd), pullback = jax.vjp(norm, x, weight)
        return y, rstd, pullback((dy, jnp.zeros_like(rstd)))

    yield from modules(gradients, x, weight, dy)


def _with_residual(case: Case, *, residual_dtype: Any = None) -> Iterator[bytes]:
    x, weight = _array(ROWS, case.n, dtype=case.dtype), _array(case.n, dtype=case.dtype)
    residual = _array(ROWS, case.n, dtype=residual_dtype or case.dtype)  # its dtype is that of s, and of y

    def gradients(x: Any, residual: Any, weight: Any, dy: Any) -> Any:
        results, pullback = jax.vjp(functools.partial(add_rms_norm, return_rstd=True), x, residual, weight)
        return results, pullback((dy, residual, jnp.zeros_like(results[-1])))

    yield from modules(gradients, x, residual, weight, residual)


def _without_dweight(case: Case) -> Iterator[bytes]:
    x, weight = _array(ROWS, case.n, dtype=case.dtype), _array(case.n, dtype=case.dtype)
    operands = {"x": x, "rstd": _array(ROWS, dtype="float32"), "dy": x, "weight": weight}
    gradient = functools.partial(_transforms.backward, spec=Spec(), with_dweight=False)
    yield from modules(gradient, operands)
    yield from modules(gradient, operands | {"ds": x})


def _without_weight(case: Case) -> Iterator[bytes]:
    x = _array(ROWS, case.n, dtype=case.dtype)
    yield from modules(lambda x, dy: jax.vjp(rms_norm, x)[1](dy), x, x)
    yield from modules(lambda x: rms_norm(x), x)


@functools.cache
def launch_programs() -> Any:
    """The module that describes the direct launch's kernels; its package would import torch."""
    spec = importlib.util.spec_from_file_location("_programs_of_the_direct_launch", PROGRAMS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _launched(case: Case) -> Iterator[bytes]:
    """The kernels of the direct launch, whose row counts and strides come with the launch."""
    program, dtype, f32 = launch_programs().Program, case.dtype, "float32"
    x, weight, residual = ("x", dtype), ("weight", dtype), ("residual", dtype)
    rstd, dy, ds = ("rstd", f32), ("dy", dtype), ("ds", dtype)
    for strided in (False, True):
        yield from _launch(program("forward", case.n, (x, weight), ("y", "rstd"), Spec(), strided))
        yield from _launch(program("forward", case.n, (x, residual, weight), ("y", "s"), Spec(), strided))
    yield from _launch(program("backward", case.n, (x, rstd, dy, weight), ("dx", "dweight"), Spec(eps=0.0)))
    yield from _launch(program("backward", case.n, (x, rstd, dy, weight, ds), ("dx",), Spec(eps=0.0)))
    parts = (("parts", f32),)
    yield from _launch(program("column_sum", case.n, parts, ("dweight",), Spec(), dweight_dtype=dtype))


def _quantized(case: Case) -> Iterator[bytes]:
    """A scale of each row, of each group where groups have a kernel, and one that is given; traced and launched."""
    x, weight = _array(ROWS, case.n, dtype=case.dtype), _array(case.n, dtype=case.dtype)
    yield from modules(rms_norm_quantized, x, weight)
    yield from modules(functools.partial(rms_norm_quantized, dtype="int8", scale=0.5, return_y=True), x, weight)
    yield from modules(functools.partial(add_rms_norm_quantized, dtype="int8"), x, x, weight)
    if case.n % GROUP == 0:
        yield from modules(functools.partial(rms_norm_quantized, group_size=GROUP), x, weight)
    arrays = ("x", case.dtype), ("weight", case.dtype)
    options: dict[str, Any] = {"q_dtype": "float8_e4m3fn", "group": case.n}
    for strided in (False, True):
        program = launch_programs().Program("quantized", case.n, arrays, ("q", "scales"), Spec(), strided, **options)
        yield from _launch(program)


def _gated(case: Case) -> Iterator[bytes]:
    """The gate on either side, and two groups with weights of their own where these have kernels; and launched."""
    program, f32 = launch_programs().Program, "float32"
    x, weight = _array(ROWS, case.n, dtype=case.dtype), _array(case.n, dtype=case.dtype)
    for activation, before in (("silu", True), ("silu", False), ("sigmoid", True)):
        norm = functools.partial(rms_norm_gated, activation=activation, norm_before_gate=before)

        def gradients(x: Any, gate: Any, weight: Any, dy: Any, norm: Any = norm) -> Any:
            y, pullback = jax.vjp(norm, x, gate, weight)
            return y, pullback(dy)

        yield from modules(gradients, x, x, weight, x)
        options: dict[str, Any] = {"form": Gate(activation, before, case.n)}
        arrays = ("x", case.dtype), ("gate", case.dtype)
        of_weight = ("weight", case.dtype)
        for strided in (False, True):
            forward = (*arrays, of_weight), ("y", "rstd"), Spec(), strided
            yield from _launch(program("gated", case.n, *forward, **options))
        backward = (*arrays, ("rstd", f32), ("dy", case.dtype), of_weight), ("dx", "dgate", "dweight"), Spec(eps=0.0)
        yield from _launch(program("gated_backward", case.n, *backward, **options))
    if 2 * case.n <= LARGEST_N:
        x, weight = _array(ROWS, 2 * case.n, dtype=case.dtype), _array(2 * case.n, dtype=case.dtype)
        yield from modules(functools.partial(rms_norm_gated, group_size=case.n), x, x, weight)


def _rotated(case: Case) -> Iterator[bytes]:
    """Of q and k beside each other and inside a projection, with weights and without; traced and launched."""
    q, k, qkv = (_array(ROWS, heads, case.n, dtype=case.dtype) for heads in (3, 2, 7))
    angles, weights = [_array(ROWS, case.n, dtype=case.dtype)] * 2, [_array(case.n, dtype=case.dtype)] * 2
    yield from modules(rms_norm_rope, q, k, *angles, *weights)
    yield from modules(rms_norm_rope, q, k, *angles)
    yield from modules(functools.partial(rms_norm_rope_qkv, q_heads=3, k_heads=2), qkv, *angles, *weights)
    names = "q", "k", "cos", "sin", "q_weight", "k_weight"
    arrays = tuple((name, case.dtype) for name in names)
    yield from _launch(launch_programs().Program("rope", case.n, arrays, ("q_out", "k_out"), Spec()))


def _rotated_back(case: Case) -> Iterator[bytes]:
    """As _rotated, of the gradients, without the sums of dweight."""
    q, k, qkv = (_array(ROWS, heads, case.n, dtype=case.dtype) for heads in (3, 2, 7))
    angles, weights = [_array(ROWS, case.n, dtype=case.dtype)] * 2, [_array(case.n, dtype=case.dtype)] * 2

    def gradients(function: Any, cos: Any, sin: Any, dr: Any, *leaves: Any) -> Any:
        pair = len(leaves) - len(weights)
        rotated = lambda *leaves: function(*leaves[:pair], cos, sin, *leaves[pair:])  # noqa: E731
        return jax.vjp(rotated, *leaves)[1](dr)

    fused = functools.partial(rms_norm_rope_qkv, q_heads=3, k_heads=2)
    yield from modules(functools.partial(gradients, rms_norm_rope), *angles, (q, k), q, k, *weights)
    yield from modules(functools.partial(gradients, fused), *angles, (q, k), qkv, *weights)
    names = "q", "k", "cos", "sin", "dq_out", "dk_out", "q_weight", "k_weight"
    arrays, outputs = tuple((name, case.dtype) for name in names), ("dq", "dk", "q_dweight", "k_dweight")
    yield from _launch(launch_programs().Program("rope_backward", case.n, arrays, outputs, Spec()))
    without = arrays[:-2], outputs[:2]
    yield from _launch(launch_programs().Program("rope_backward", case.n, *without, Spec()))


def _launch(program: Any) -> Iterator[bytes]:
    yield from modules(program.function(), *program.structs)


class Form(NamedTuple):
    modules: Callable[[Case], Iterator[bytes]]
    planned: lengths.Planned
    dtypes: tuple[str, ...] = ("bfloat16",)
    told_apart: Callable[[Plan], tuple[Any, ...]] = lengths.numbers


BOTH = "bfloat16", "float32"  # a float16 has the plans of a bfloat16
FORMS = {
    "gradients": Form(_both_ways, lengths.plain, BOTH),
    "residual": Form(_with_residual, lengths.added, BOTH),
    "no-dweight": Form(_without_dweight, lengths.with_and_without, BOTH),
    "float32-weight": Form(functools.partial(_both_ways, weight_dtype="float32"), lengths.wide_dy),  # and so dy is one
    "float32-stream": Form(functools.partial(_with_residual, residual_dtype="float32"), lengths.wide_stream),
    "launch": Form(_launched, lengths.with_and_without, BOTH),
    "8-bits": Form(_quantized, lengths.forward_only, BOTH),
    "rotated": Form(_rotated, lengths.of_heads, BOTH),
    "rotated-gradients": Form(_rotated_back, lengths.of_gradients, BOTH),
    # Their plans are those of "residual" or "gradients", and what differs is statements: of each kind of plan.
    "gated": Form(_gated, lengths.added, BOTH, lengths.kind),
    "half": Form(_both_ways, lengths.plain, ("float16",), lengths.kind),
    "no-weight": Form(_without_weight, lengths.plain, BOTH, lengths.kind),
    "rounded-once": Form(
        functools.partial(_both_ways, cast_before_scale=False, weight_offset=1.0),
        lengths.plain,
        told_apart=lengths.kind,
    ),
    "full-blocks": Form(functools.partial(_both_ways, rows=1024), lengths.plain, told_apart=lengths.kind),
    "one-row": Form(functools.partial(_both_ways, rows=1), lengths.of_one_row, told_apart=lengths.kind),
}


def cases() -> Iterator[Case]:
    for name, form in FORMS.items():
        for dtype in form.dtypes:
            for n in lengths.of(form.planned, dtype, form.told_apart):
                yield Case(name, dtype, n)


def modules_of(case: Case) -> Iterator[bytes]:
    return FORMS[case.form].modules(case)
