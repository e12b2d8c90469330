"""Every combination of dtypes of x, residual, weight, unit, y and s: the bits of a replay, gradients of their dtypes.

XLA compiles all of them, a program for each pair of x and residual; the kernels take those that people train and serve
with, and what Hypothesis draws in the other files.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm import add_rms_norm, rms_norm
from pallas_norm._spec import Spec
from tests import oracle
from tests.mixed_dtypes import EPS, TRAINED, Mix, call, check, draw, every
from tests.oracle import BF16, DTYPES, F32, Array
from tests.strategies import backward_widths, examples


def test_the_dtypes_of_every_call_are_those_that_the_rule_gives() -> None:
    """With what is left to it, too: a weight that nothing narrows keeps its dtype, so that y does."""
    kinds = (None, *DTYPES)
    named = {None: None, **{name: dtype.name for name, dtype in DTYPES.items()}}
    seen = 0
    for x, residual, weight, unit, out, s in itertools.product(DTYPES, *[kinds] * 5):
        for cast, round_weight in itertools.product((True, False), repeat=2):
            options = {"unit_dtype": named[unit], "out_dtype": named[out], "s_dtype": named[s] if residual else None}
            options |= {"cast_before_scale": cast, "round_weight": round_weight}
            rule = Spec(**options).dtypes(named[x], named[residual], named[weight])
            assert tuple(vars(rule).values()) == oracle.roundings(
                named[x], named[weight], residual=named[residual], **options
            )
            seen += 1
    assert seen == 3 * 4**5 * 4


@pytest.mark.sampled(12)
@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("residual", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("x", DTYPES)
def test_every_combination_of_dtypes_has_the_bits_of_the_replay(x: str, residual: str | None, step: int) -> None:
    """Operation by operation, every seventeenth of 1,890 before each push: one takes 0.4 s with the order of the row's
    sum. All of them, before each push too: the rule above, and torch's statements."""
    with jax.disable_jit():
        for mix in itertools.islice(every(x, residual), 0, None, step):
            given = draw(mix)
            check(mix, given, call(mix, given, "xla"), "xla")


@pytest.mark.sampled(40)
@pytest.mark.parametrize("mix", TRAINED, ids=str)
@pytest.mark.parametrize("n", [128, 1000])
def test_what_people_train_with(implementation: str, n: int, mix: Mix) -> None:
    given = draw(mix, 21, n)
    check(mix, given, jax.jit(functools.partial(call, mix, implementation=implementation))(given), implementation)


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    """Any that is allowed, also what is left to the rule."""
    kinds = st.sampled_from((None, *DTYPES))
    residual, weight = draw(kinds), draw(kinds)
    return Mix(
        draw(st.sampled_from(tuple(DTYPES))),
        residual,
        weight,
        unit_dtype=draw(kinds),
        round_weight=weight is not None and draw(st.booleans()),
        out_dtype=draw(kinds),
        s_dtype=draw(kinds) if residual else None,
        weight_offset=draw(st.sampled_from((0.0, 1.0))) if weight else 0.0,
    )


SHARE = {"xla": 0.2, "interpret": 0.05, "mosaic_gpu": 0.1}


def test_any_mix_in_rows_of_any_length(implementation: str) -> None:
    widths = backward_widths(implementation)

    @examples(SHARE[implementation])
    @given(mixes(), st.sampled_from(widths if implementation == "interpret" else widths[:20]), st.integers(1, 23))
    def holds(mix: Mix, n: int, rows: int) -> None:
        given = draw(mix, rows, n)
        check(mix, given, jax.jit(functools.partial(call, mix, implementation=implementation))(given), implementation)

    holds()


def test_a_stream_of_float32_beside_a_bfloat16_x_in_kernels_whose_warps_share_a_row() -> None:
    mix = TRAINED[5]
    given = draw(mix, 3, 1536)
    check(mix, given, call(mix, given, "interpret"), "interpret")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("unit", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_the_bits_of_a_rounded_weight_are_those_of_one_that_was_cast(weight: str, unit: str) -> None:
    mix = Mix("f32", None, weight, unit_dtype=unit, out_dtype="f32")
    given = draw(mix)
    x, own = given["x"], given["weight"]
    cast = own if unit == "f32" else own.astype(DTYPES[unit])
    options = mix.dtypes | {"eps": EPS}
    oracle.assert_same(rms_norm(x, own, round_weight=True, **options), rms_norm(x, cast, **options))


def test_dweight_of_a_float32_weight_is_within_float32s_bounds_where_that_of_a_cast_one_is_not() -> None:
    """Of 65,536 rows. The bound is that of a float32 sum in any order; a bfloat16 dweight is 2^-9 off."""
    mix = Mix("bf16", None, "f32", round_weight=True)
    given = draw(mix, 65_536, 32)
    x, weight, dy = (given[name] for name in ("x", "weight", "dy"))

    def dweight(norm: Any) -> Array:
        return np.asarray(jax.jit(lambda: jax.vjp(norm, jnp.asarray(weight))[1](jnp.asarray(dy))[0])())

    rstd = np.asarray(rms_norm(x, return_rstd=True)[1])
    exact, bound = oracle.weight_gradient64(x, rstd, dy, F32)
    # No more than the square root of the rows, many times: a sum over all rows in one float32 would be further off.
    bound = bound / 65_537 * 64
    rounded = dweight(lambda weight: rms_norm(x, weight, round_weight=True))
    assert rounded.dtype == F32
    oracle.assert_within(rounded, exact, bound)
    with pytest.raises(AssertionError, match="outside the bound"):
        oracle.assert_within(dweight(lambda weight: rms_norm(x, weight.astype(BF16))), exact, bound)


def test_where_y_is_not_used_the_gradient_of_s_is_passed_on_as_it_is_but_for_its_dtype() -> None:
    given = draw(TRAINED[4])

    def of_s(x: Any, residual: Any) -> Any:
        return add_rms_norm(x, residual, given["weight"], out_dtype="bfloat16", unit_dtype="bfloat16")[1]

    dx, dresidual = jax.vjp(of_s, jnp.asarray(given["x"]), jnp.asarray(given["residual"]))[1](jnp.asarray(given["ds"]))
    oracle.assert_same(dx, given["ds"].astype(BF16))
    oracle.assert_same(dresidual, given["ds"])
