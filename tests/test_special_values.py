"""Special values: what each gives, as data; and the rules of shapes and dtypes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest

import pallas_norm
from tests import oracle, specified
from tests.oracle import BF16, DTYPES, F32, Array
from tests.strategies import flushes, norm, numbers, weights

INF, NAN = np.inf, np.nan


class Special(NamedTuple):
    name: str
    first: tuple[float, ...]  # the row's first elements
    rest: float
    expected: tuple[float, ...]  # before the weight: of the first elements, and of one of the rest
    eps: float = 1e-6


TABLE = (
    Special("a NaN makes the whole row NaN", (NAN, 1.0), 2.0, (NAN, NAN, NAN)),
    Special("an infinity becomes NaN and the rest signed zeros", (INF, -1.0, -0.0), 1.0, (NAN, -0.0, -0.0, 0.0)),
    Special("a negative infinity does the same", (-INF, -1.0, 0.0), 1.0, (NAN, -0.0, 0.0, 0.0)),
    Special("an infinity beside a NaN is NaN", (INF, NAN), 1.0, (NAN, NAN, NAN)),
    Special("a row of zeros keeps its signs", (-0.0, 0.0), -0.0, (-0.0, 0.0, -0.0)),
    Special("a row of zeros without eps is NaN", (-0.0, 0.0), 0.0, (NAN, NAN, NAN), eps=0.0),
    Special("zeros in a row of twos keep their signs", (-0.0, 0.0), 2.0, (-0.0, 0.0, 2.0), eps=0.0),
)
OVERFLOW = Special(
    "a sum of squares that overflows gives signed zeros", (-3e38, 3e38, -0.0), 1.0, (-0.0, 0.0, -0.0, 0.0)
)


def row(special: Special, n: int, dtype: np.dtype) -> Array:
    x = np.full((1, n), special.rest, F32)
    x[0, : len(special.first)] = special.first
    return x.astype(dtype)


@pytest.mark.sampled(48)
@pytest.mark.parametrize("n", [64, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [*TABLE, OVERFLOW], ids=lambda special: special.name)
def test_special_values_give_what_the_table_says(implementation: str, special: Special, dtype: str, n: int) -> None:
    if special is OVERFLOW and dtype == "f16":
        pytest.skip("no float16 is large enough: its largest square is 4.3e9")
    x = row(special, n, DTYPES[dtype])
    y, rstd = norm(implementation, x, None, eps=special.eps)
    for found, value in zip((y, rstd), specified.forward(x, None, special.eps), strict=True):
        oracle.assert_same(found, value)
    expected = np.array([special.expected], F32)
    actual = y[:, : expected.shape[1]].astype(F32)
    large = np.abs(expected) > 1  # of these only the size: it depends on n
    oracle.assert_same(np.where(large, 0, actual), np.where(large, 0, expected))
    assert (np.abs(actual[large] - 1) < 0.05).all()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_are_kept_where_the_arithmetic_keeps_them(
    implementation: str, dtype: str, eps: float
) -> None:
    """XLA's CPU code, which also runs the interpreter, treats subnormal float32 as zeros, and a subnormal bfloat16 is
    one. A GPU keeps them, and every path keeps those of float16."""
    x = numbers(np.random.default_rng(0), (3, 64), dtype, "subnormal")
    y, rstd = norm(implementation, x, None, eps=eps)
    for found, value in zip((y, rstd), specified.forward(x, None, eps, flushes=flushes(implementation)), strict=True):
        oracle.assert_same(found, value)
    if dtype == "f16" or not flushes(implementation):
        oracle.assert_same(y, specified.forward(x, None, eps)[0])


@pytest.mark.sampled(7)
@pytest.mark.parametrize("shape", [(64,), (1, 64), (6, 64), (2, 3, 64), (3, 2, 1, 64), (0, 64), (2, 0, 64)])
def test_leading_axes_are_rows(implementation: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal(shape).astype(BF16), weights(rng, 64, "f32")
    before = x.copy()
    y, rstd = norm(implementation, x, weight)
    assert (y.shape, rstd.shape) == (shape, shape[:-1])
    for found, value in zip((y, rstd), specified.forward(x, weight, 1e-6), strict=True):
        oracle.assert_same(found, value)
    oracle.assert_same(x, before)
    flat, _ = norm(implementation, x.reshape(-1, 64), weight)
    oracle.assert_same(flat.reshape(shape), y)


@pytest.mark.sampled(24)
@pytest.mark.parametrize("weight_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_y_has_the_promoted_dtype_and_the_residual_form_gives_the_bits_of_its_two_steps(
    implementation: str, dtype: str, weight_dtype: str | None
) -> None:
    rng = np.random.default_rng(0)
    x, residual = (rng.standard_normal((5, 64)).astype(DTYPES[dtype]) for _ in range(2))
    weight = None if weight_dtype is None else weights(rng, 64, weight_dtype)
    fused = functools.partial(pallas_norm.add_rms_norm, implementation=implementation, return_rstd=True)
    y, s, rstd = map(np.asarray, jax.jit(fused)(x, residual, weight))
    oracle.assert_same(s, oracle.add(x, residual))
    expected = specified.forward(s, weight, 1e-6)
    for found, of_steps, value in zip((y, rstd), norm(implementation, s, weight), expected, strict=True):
        oracle.assert_same(found, value)
        oracle.assert_same(of_steps, value)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_most_outputs_equal_those_of_hugging_faces_module_and_the_others_are_two_units_off(
    implementation: str, dtype: str
) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs transformers")
    rng = np.random.default_rng(0)
    x, weight = (3 * rng.standard_normal((40, 1024))).astype(F32), rng.standard_normal(1024).astype(F32)
    kind = {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    module = llama.LlamaRMSNorm(1024, eps=1e-6)
    module.weight.data = torch.from_numpy(weight).to(kind)
    expected = module(torch.from_numpy(x).to(kind)).detach().float().numpy().astype(DTYPES[dtype])
    y, rstd = norm(implementation, x.astype(DTYPES[dtype]), weight.astype(DTYPES[dtype]), eps=1e-6)
    distance = oracle.ulps(y, expected)
    assert np.abs(distance).max() <= 2
    assert (distance != 0).mean() <= 1e-3
    once = oracle.replay(x.astype(DTYPES[dtype]), weight.astype(DTYPES[dtype]), rstd, cast_before_scale=False)
    assert (oracle.ulps(once, expected) != 0).mean() > 0.1  # so this test tells one rounding from two
