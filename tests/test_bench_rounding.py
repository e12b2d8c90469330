"""The check of what a baseline computes: it tells one rounding from two, and sees what no kernel wrote."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import rounding
from bench.baselines import BASELINES
from bench.operands import EPS, Operands
from bench.suite import Case
from pallas_norm import reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("implicit_promotion_throughout")]

DTYPES = ("bfloat16", "float16")


def classified(operands: Operands, result: Any) -> str:
    return rounding.judge(operands, rounding.outputs_of(operands, result))["rounding"]


def forward(operands: Operands, **options: Any) -> jax.Array:
    x, weight = operands.arrays["x"], operands.arrays["weight"]
    return reference.forward(x, weight, eps=EPS, **options)[0]


@pytest.mark.parametrize("shape", [(1, 896), (300, 128), (7, 4096)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rounding_is_told_from_two(dtype: str, shape: tuple[int, int]) -> None:
    operands = Operands(Case("forward", *shape, dtype))
    assert classified(operands, forward(operands)) == "HF"
    assert classified(operands, forward(operands, cast_before_scale=False)) == "single"
    shifted = forward(operands) * jnp.asarray(1.05, dtype)
    assert classified(operands, shifted) == "other"


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_the_gradient_too(dtype: str) -> None:
    operands = Operands(Case("backward", 64, 256, dtype))
    arrays = operands.arrays
    for once, name in ((False, "HF"), (True, "single")):
        rounds = {"cast_before_scale": not once}
        rstd = reference.forward(arrays["x"], eps=EPS)[1]
        gradients = reference.backward(arrays["x"], arrays["weight"], rstd, arrays["dy"], **rounds)
        assert classified(operands, gradients) == name


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_that_is_not_rounded_before_it_is_normalised_is_neither(dtype: str) -> None:
    operands = Operands(Case("add", 64, 256, dtype))
    x, residual, weight = (operands.arrays[name] for name in ("x", "residual", "weight"))
    s = reference.add(x, residual)
    assert classified(operands, (reference.forward(s, weight, eps=EPS)[0], s)) == "HF"
    wide = x.astype(jnp.float32) + residual.astype(jnp.float32)
    unit = reference.forward(wide, eps=EPS)[0]
    y = reference.round_to(reference.round_to(unit, x.dtype).astype(jnp.float32) * weight, x.dtype)
    assert classified(operands, (y, s)) == "other"


@pytest.mark.parametrize("operation", ["forward", "add", "backward"])
def test_hugging_face_and_f_rms_norm_are_what_they_are(operation: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    operands = Operands(Case(operation, 32, 512))
    assert classified(operands, BASELINES["HF eager"](operands)()) == "HF"
    assert classified(operands, BASELINES["F.rms_norm"](operands)()) == "single"


@pytest.mark.parametrize("operation", ["forward", "add", "backward"])
def test_an_output_that_was_not_written_is_counted(operation: str) -> None:
    operands = Operands(Case(operation, 8, 64))
    outputs = rounding.outputs_of(operands, BASELINES["XLA"](operands)())
    assert rounding.wrong_outputs(operands, outputs) == 0
    for name, value in outputs.items():
        lost = np.array(value, np.float32)
        lost.reshape(-1)[-3:] = np.nan
        assert rounding.wrong_outputs(operands, outputs | {name: jnp.asarray(lost, value.dtype)}) == 3
        stale = outputs | {name: jnp.roll(value, 1, axis=-1)}
        assert rounding.wrong_outputs(operands, stale) > value.size // 2


def test_every_sampled_row_is_one_of_the_case_and_the_ends_are_among_them() -> None:
    for rows, n in ((1, 128), (2, 131072), (10**6, 64), (16384, 4096)):
        chosen = rounding._sampled_rows(rows, n)
        assert chosen[0] == 0
        assert chosen[-1] == rows - 1
        assert len(set(chosen.tolist())) == len(chosen) <= max(2, rounding.JUDGED // n)


def test_poison_frees_what_it_takes() -> None:
    operands = Operands(Case("backward", 8, 64))
    before = len(jax.live_arrays())
    rounding.poison(operands, torch=False)
    assert len(jax.live_arrays()) == before


def test_few_outputs_may_differ_and_a_quarter_may_not() -> None:
    assert rounding.verdict(0.001, 0.26) == "HF"
    assert rounding.verdict(0.26, 0.001) == "single"
    assert rounding.verdict(0.26, 0.26) == "other"
