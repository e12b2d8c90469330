"""rms_norm_quantized and add_rms_norm_quantized: y is rms_norm's, q and scale the oracle's of that y, on every path."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import pallas_norm
from pallas_norm import add_rms_norm_quantized, rms_norm_quantized
from tests import oracle, quantized_oracle
from tests.oracle import BF16, F32, Array
from tests.strategies import WIDTHS, Case, cases, examples, flushes, numbers

FORMS = ("tensor", "row", "group")
KINDS = tuple(quantized_oracle.DTYPES)
# Of the interpreter one for each layout: a call takes seconds.
FEW = (33, 128, 384, 1000, 1024, 2880)


def options_of(form: str, n: int, dtype: str, scale: float) -> tuple[dict[str, Any], int]:
    """(arguments, elements of a group that has a scale; 0 where it is given)."""
    if form == "tensor":
        return {"dtype": dtype, "scale": np.full((), scale, F32)}, 0
    if form == "group":
        return {"dtype": dtype, "group_size": 128}, 128
    return {"dtype": dtype}, n


@functools.cache
def _jitted(implementation: str, options: tuple[tuple[str, Any], ...], *, residual: bool) -> Any:
    function = add_rms_norm_quantized if residual else rms_norm_quantized
    return jax.jit(functools.partial(function, **dict(options), implementation=implementation, return_y=True))


def run(implementation: str, x: Array, residual: Array | None, weight: Array | None, **options: Any) -> list[Array]:
    """[q, scale, y], with a residual [q, scale, s, y]."""
    given = {"scale": options.pop("scale")} if "scale" in options else {}
    call = _jitted(implementation, tuple(sorted(options.items())), residual=residual is not None)
    rows = (x,) if residual is None else (x, residual)
    return [np.asarray(value) for value in call(*rows, weight, **given)]


def check(case: Case, implementation: str, form: str, dtype: str, *, with_residual: bool, scale: float = 0.02) -> None:
    x, weight = case.x(), case.weight()
    residual = numbers(case.rng(4), x.shape, case.dtype, case.values) if with_residual else None
    options, group = options_of(form, case.n, dtype, scale)
    q, found, *s, y = run(implementation, x, residual, weight, **options, **case.options)
    assert q.dtype == quantized_oracle.DTYPES[dtype]
    assert found.dtype == F32
    assert found.shape == ((case.rows, case.n // group) if group else ())
    flush = flushes(implementation)
    quantized_oracle.assert_quantized(y, q, found, dtype, group, flushes=flush)
    if residual is not None:
        oracle.assert_same(s[0], oracle.add(x, residual, flushes=flush))


@st.composite
def drawn(draw: st.DrawFn, implementation: str) -> tuple[Case, str, str, bool, float]:
    form = draw(st.sampled_from(FORMS))
    of_xla = (1, 7) if implementation == "xla" else ()
    widths = FEW if implementation == "interpret" else (*of_xla, *WIDTHS, 8192, 16385)
    widths = tuple(n for n in widths if form != "group" or n % 128 == 0)
    case = draw(cases(implementation, widths_of=widths, mixed=True))
    scale = draw(st.sampled_from((0.02, 1.0, 2.0**-30, 3e-39, 1e38, 2.0**70)))
    return case, form, draw(st.sampled_from(KINDS)), draw(st.booleans()), scale


@pytest.mark.sampled(2)
@examples(0.4)
@hypothesis.given(data=st.data())
def test_q_and_scale_are_the_oracles_of_y(implementation: str, data: st.DataObject) -> None:
    case, form, dtype, with_residual, scale = data.draw(drawn(implementation))
    if flushes(implementation) and scale < 2.0**-126:
        scale = 2.0**-126
    check(case, implementation, form, dtype, with_residual=with_residual, scale=scale)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_y_is_that_of_rms_norm_and_q_does_not_depend_on_whether_it_is_returned(
    implementation: str, form: str, dtype: str
) -> None:
    case = Case(256, 9, "bf16", "bf16", "normal", seed=5)
    x, weight = case.x(), case.weight()
    options, _ = options_of(form, 256, dtype, 0.02)
    q, scale, y = rms_norm_quantized(x, weight, return_y=True, implementation=implementation, **options)
    oracle.assert_same(y, pallas_norm.rms_norm(x, weight, implementation=implementation))
    alone, its_scale = rms_norm_quantized(x, weight, implementation=implementation, **options)
    quantized_oracle.assert_same_q(np.asarray(alone), np.asarray(q))
    oracle.assert_same(its_scale, scale)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("n", [384, 8192])
def test_a_row_that_warps_or_warpgroups_share_has_one_largest_element(implementation: str, n: int) -> None:
    """It is in another part of the row each time, and the largest by far."""
    rows, n = 12, 16384 if n == 8192 and implementation != "interpret" else n
    x = np.ones((rows, n), BF16)
    at = np.linspace(0, n - 1, rows).astype(int)
    x[np.arange(rows), at] = np.where(np.arange(rows) % 2, -100, 100).astype(BF16)
    q, scale, y = run(implementation, x, None, None, dtype="int8")
    quantized_oracle.assert_quantized(y, q, scale, "int8", n)
    assert np.all(np.abs(q[np.arange(rows), at].astype(int)) == 127)


SPECIAL = {  # first elements of a row of ones, scale, first elements of q in float8_e4m3fn
    "zeros": (np.zeros(64), 2.0**-23, np.zeros(64)),
    "negative zeros": (-np.zeros(64), 2.0**-23, -np.zeros(64)),
    "a NaN": ([np.nan], np.nan, np.full(64, np.nan)),
    "an infinity": ([np.inf], np.nan, np.full(64, np.nan)),  # y is NaN there and 0 elsewhere
}


@pytest.mark.sampled(16)
@pytest.mark.parametrize("form", ["tensor", "row"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_rows(implementation: str, name: str, form: str) -> None:
    first, expected_scale, expected = SPECIAL[name]
    x = np.ones((2, 64), BF16)
    x[1, : len(first)] = first
    options, group = options_of(form, 64, "float8_e4m3fn", 0.5)
    q, scale, y = run(implementation, x, None, None, **options)
    quantized_oracle.assert_quantized(y, q, scale, "float8_e4m3fn", group)
    if form == "row":
        oracle.assert_same(scale[1], np.full(1, expected_scale, F32))
        quantized_oracle.assert_same_q(q[1], np.asarray(expected, F32).astype(quantized_oracle.E4M3))
    elif name.startswith("an "):
        assert np.isnan(q[1, 0].astype(F32))
        assert not q[1, 1:].astype(F32).any()
    whole, _, _ = run(implementation, x, None, None, **options | {"dtype": "int8"})
    if np.isnan(expected_scale):
        assert whole[1, 0] == 0


@pytest.mark.sampled(2)
def test_what_is_beyond_the_largest_number_is_the_largest(implementation: str) -> None:
    x = np.array([[1.0, -1.0, 0.5, -0.25] * 16], BF16)
    for dtype, most, least in (("float8_e4m3fn", 448, -448), ("int8", 127, -128)):
        for scale in (1e-30, 1e-4):
            q = run(implementation, x, None, None, dtype=dtype, scale=np.full(1, scale, F32))[0]
            assert set(q.astype(F32).reshape(-1).tolist()) == {float(most), float(least)}


def test_a_scale_of_zero_or_of_infinity_divides_as_numbers_do(implementation: str) -> None:
    x = np.array([[1.0, -1.0, 0.0, -0.0] * 16], BF16)
    nan = np.nan
    for scale, expected in ((0.0, (448, -448, nan, nan)), (np.inf, (0.0, -0.0, 0.0, -0.0)), (nan, (nan,) * 4)):
        q = run(implementation, x, None, None, dtype="float8_e4m3fn", scale=np.full(1, scale, F32))[0]
        quantized_oracle.assert_same_q(q[0, :4], np.array(expected, F32).astype(quantized_oracle.E4M3))


def test_any_leading_axes_and_no_rows() -> None:
    x = Case(128, 12, "bf16", None, "normal", seed=0).x()
    q, scale = rms_norm_quantized(x, group_size=128)
    for shape in ((3, 4, 128), (12, 1, 128), (2, 2, 3, 128)):
        shaped, of_shape = rms_norm_quantized(x.reshape(shape), group_size=128)
        assert shaped.shape == shape
        assert of_shape.shape == (*shape[:-1], 1)
        assert np.array_equal(np.asarray(shaped).view(np.uint8).reshape(12, 128), np.asarray(q).view(np.uint8))
        assert np.array_equal(np.asarray(of_shape).reshape(12, 1), np.asarray(scale))
    one, of_one = rms_norm_quantized(x[0])
    assert (one.shape, of_one.shape) == ((128,), (1,))
    none, of_none, s = add_rms_norm_quantized(x[:0], x[:0])
    assert (none.shape, of_none.shape, s.shape) == ((0, 128), (0, 1), (0, 128))


def members() -> tuple[Array, Array]:
    case = Case(128, 3 * 4 * 5, "bf16", "bf16", "normal", seed=7)
    x, weight = case.x().reshape(3, 4, 5, 128), case.weight()
    assert weight is not None
    return x, np.stack([weight, -2 * weight, np.roll(weight, 1)])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", FORMS)
def test_vmap_is_a_loop(form: str) -> None:
    x, weights = members()
    options, _ = options_of(form, 128, "float8_e4m3fn", 0.02)
    scales = np.array([0.02, 0.5, 3.0], F32)

    def call(x: Any, weight: Any, scale: Any) -> Any:
        return add_rms_norm_quantized(
            x, x, weight, return_y=True, **options | ({"scale": scale} if "scale" in options else {})
        )

    for axes in ((0, None, None), (1, None, None), (0, 0, None), (0, None, 0), (None, 0, 0)):
        given = x.swapaxes(0, 1) if axes[0] == 1 else x if axes[0] == 0 else x[0]
        of_weight, of_scale = (weights if axes[1] == 0 else weights[0]), (scales if axes[2] == 0 else scales[0])
        batched = jax.vmap(call, in_axes=axes)(given, of_weight, of_scale)
        for i in range(3):
            single = call(
                x[i] if axes[0] is not None else x[0], weights[i * (axes[1] == 0)], scales[i * (axes[2] == 0)]
            )
            for many, one in zip(batched, single, strict=True):
                own = np.asarray(many) if many.ndim == one.ndim else np.asarray(many)[i]
                assert own.tobytes() == np.asarray(one).tobytes()
    nested = jax.vmap(jax.vmap(lambda x: rms_norm_quantized(x)[0]))(x)
    assert np.array_equal(np.asarray(nested).view(np.uint8), np.asarray(rms_norm_quantized(x)[0]).view(np.uint8))
