"""The specification of 8-bit results: every rounding against ml_dtypes, and the statements that others write."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import _quotient, quantized_reference, reference
from tests import quantized_oracle as oracle
from tests.oracle import BF16, F16, F32, Array
from tests.quantized_oracle import E4M3

SMALLEST = 2.0**-126
EVERY_16_BITS = np.arange(1 << 16, dtype=np.uint16)


def draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


def boundaries(dtype: str) -> Array:
    """Every number of the dtype, the middle between each two, and the float32 beside these on both sides."""
    if dtype == "int8":
        numbers = np.arange(-128, 128).astype(F32)
    else:
        numbers = np.arange(256, dtype=np.uint8).view(E4M3).astype(F32)
        numbers = np.unique(numbers[np.isfinite(numbers)])
    middles = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, F32.type([464, -464, 480, 1e30, -1e30])])
    above, below = (np.nextafter(middles, F32.type(side)) for side in (np.inf, -np.inf))
    found = np.concatenate([middles, above, below, -middles])
    return found[np.abs(found) >= SMALLEST] if dtype == "int8" else np.where(np.abs(found) < SMALLEST, 0 * found, found)


def beside_ties(dtype: str) -> tuple[Array, Array]:
    """(y, scale) whose quotients lie within a unit of the middle between two numbers of the dtype, or there."""
    numbers = np.arange(-128, 128) if dtype == "int8" else np.arange(1, 127, dtype=np.uint8).view(E4M3)
    middles = ((numbers[1:].astype(np.float64) + numbers[:-1].astype(np.float64)) / 2)[None]
    scale = np.exp(np.random.default_rng(8).uniform(-5, 5, (200, 1))).astype(F32)
    return (middles * scale).astype(F32), scale


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
@pytest.mark.parametrize("kind", [BF16, F16], ids=["bfloat16", "float16"])
def test_every_16_bit_number_is_rounded_as_ml_dtypes_does(kind: Any, dtype: str) -> None:
    values = EVERY_16_BITS.view(kind)
    cast = jax.jit(lambda values: quantized_reference.cast(values.astype(jnp.float32), dtype))
    oracle.assert_same_q(np.asarray(cast(values)), oracle.cast(values.astype(F32), dtype))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_ties_go_to_even_and_what_lies_beside_them_to_its_side(dtype: str) -> None:
    """A rounding by way of float16 or bfloat16 would take a float32 beside a tie for the tie."""
    values = boundaries(dtype)
    cast = jax.jit(lambda values: quantized_reference.cast(values, dtype))
    oracle.assert_same_q(np.asarray(cast(values)), oracle.cast(values, dtype))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_every_number_of_the_dtype_is_itself(dtype: str) -> None:
    numbers = np.arange(256, dtype=np.uint8).view(oracle.DTYPES[dtype])
    oracle.assert_same_q(np.asarray(quantized_reference.cast(jnp.asarray(numbers.astype(F32)), dtype)), numbers)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("shape", [(4, 1024), (4096, 1024), (4096, 128), (3, 7, 384)])
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_the_divisions_are_divisions_in_every_program(dtype: str, shape: tuple[int, ...]) -> None:
    """XLA on a CPU multiplies with inverses, which ones depends on the shape."""
    y = draw(0, *shape)
    for group in {shape[-1], 128}:
        q, scale = jax.jit(lambda y, group=group: quantized_reference.by_group(y, dtype, group))(y)
        oracle.assert_quantized(y, np.asarray(q), np.asarray(scale), dtype, group)
    scale = F32.type(0.013)
    for given in (
        lambda y: (y, jnp.full((*y.shape[:-1], 1), scale)),
        lambda y: (y, jnp.asarray(scale) * (0 * y[..., :1] + 1)),
    ):
        q = jax.jit(lambda y, given=given: quantized_reference.by_scale(*given(y), dtype))(y)
        oracle.assert_quantized(y, np.asarray(q), scale, dtype, 0)


def test_a_quotient_that_is_off_by_two_units_is_put_right() -> None:
    """What a GPU's instruction and a product with the inverse may be off by; a millionth of the quotients is a power
    of two, below which the units are half as large."""
    rng = np.random.default_rng(6)
    a, b = (np.ldexp(rng.standard_normal(200_000), rng.integers(-40, 40, 200_000)).astype(F32) for _ in range(2))
    powers = np.ldexp(b[:1000], rng.integers(-8, 9, 1000)).astype(F32)
    near = np.concatenate([powers, *(np.nextafter(powers, F32.type(side)) for side in (np.inf, -np.inf))])
    a, b = np.concatenate([a, near]), np.concatenate([b, np.tile(b[:1000], 3)])
    exact = a / b
    correct = jax.jit(_quotient.corrected)
    for off in range(-2, 3):
        candidate = (exact.view(np.int32) + off).view(F32)
        np.testing.assert_array_equal(np.asarray(correct(a, b, candidate)), exact)


def test_quotients_of_every_magnitude() -> None:
    rng = np.random.default_rng(7)
    a, b = (np.ldexp(rng.uniform(1, 2, 100_000), rng.integers(-126, 127, 100_000)).astype(F32) for _ in range(2))
    with np.errstate(all="ignore"):
        exact = a / b
    judged = (np.abs(exact) > 2.0**-20) & (np.abs(exact) < 2.0**20)  # beyond, 8 bits are 0 or the largest
    found = np.asarray(jax.jit(_quotient.quotient)(a, b))
    np.testing.assert_array_equal(found[judged], exact[judged])
    assert np.all(np.abs(found[np.abs(exact) >= 2.0**20]) >= 2.0**20)
    assert np.all(np.abs(found[np.abs(exact) <= 2.0**-20]) <= 2.0**-20)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1, -3], F32)
    a, b = (value.reshape(-1) for value in np.meshgrid(special, special))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(np.asarray(jax.jit(_quotient.quotient)(a, b)), a / b)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_a_quotient_beside_a_tie_goes_to_its_side(dtype: str) -> None:
    """Where a product with the inverse would go to the other."""
    y, scale = beside_ties(dtype)
    expected = oracle.by_scale(y, scale, dtype)
    q = jax.jit(lambda y, scale: quantized_reference.by_scale(y, scale, dtype))(y, scale)
    oracle.assert_same_q(np.asarray(q), expected)
    assert np.any(oracle.cast(y * (1 / scale), dtype) != expected)


def test_the_division_of_what_is_broadcast_is_one_too() -> None:
    """Rows that are all alike, and one number for a row or for all, which XLA computes once."""
    a = np.abs(draw(5, 40, 1))
    for given, shape in ((a, (40, 384)), (a.reshape(-1), (3, 40)), (a[0], (40, 384)), (a[0], (64,)), (a, (40, 1))):
        for b in (127.0, 448.0, 0.013):
            divide = jax.jit(
                lambda a, shape=shape, b=b: quantized_reference.quotient(
                    jnp.broadcast_to(a, shape), jnp.full(shape, b, jnp.float32)
                )
            )
            np.testing.assert_array_equal(np.asarray(divide(given)), np.broadcast_to(given / F32.type(b), shape))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_after_the_norm_in_one_program_the_roundings_are_those_of_two(dtype: str) -> None:
    """y keeps its own rounding to bfloat16 although nothing but the quantiser reads it."""
    x, weight = draw(1, 4096, 1024).astype(BF16), draw(2, 1024).astype(BF16)

    def run(x: Any, weight: Any) -> Any:
        return quantized_reference.by_group(reference.forward(x, weight)[0], dtype, 1024)

    y = np.asarray(jax.jit(lambda x, weight: reference.forward(x, weight)[0])(x, weight))
    q, scale = jax.jit(run)(x, weight)
    oracle.assert_quantized(y, np.asarray(q), np.asarray(scale), dtype, 1024)


# --- what others compute, in plain torch ------------------------------------------------------------------------------


def compressed_tensors(y: Any, dtype: str) -> tuple[Any, Any]:
    """calculate_qparams and quantize of compressed-tensors 0.20.1, symmetric, a scale for each row, of float32 values.
    Of int8 it divides by 127.5, which is the only difference."""
    import torch

    largest = torch.max(
        torch.abs(torch.clamp(y.amin(-1, keepdim=True), max=0)), torch.clamp(y.amax(-1, keepdim=True), min=0)
    )
    scale = largest / ((448.0 + 448.0) / 2 if dtype == "float8_e4m3fn" else 127.0)
    scale = torch.where(scale == 0, torch.tensor(torch.finfo(torch.float32).eps), scale)
    if dtype == "int8":
        return torch.round(torch.clamp(y / scale, -128, 127)).to(torch.int8), scale
    return torch.clamp(y / scale, -448, 448).to(torch.float8_e4m3fn), scale


def vllm(y: Any, dtype: str) -> tuple[Any, Any]:
    """dynamic_per_token_scaled_fp8_quant of vLLM, with its smallest scale; of int8 vLLM multiplies with the inverse."""
    import torch

    scale = (y.abs().amax(-1, keepdim=True) / torch.tensor(448.0)).clamp(min=1 / (448 * 512))
    return torch.clamp(y / scale, -448, 448).to(torch.float8_e4m3fn), scale


@pytest.mark.parametrize(
    ("theirs", "dtype"),
    [(compressed_tensors, "float8_e4m3fn"), (compressed_tensors, "int8"), (vllm, "float8_e4m3fn")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_bits_are_those_of_others_in_torch(theirs: Any, dtype: str) -> None:
    torch = pytest.importorskip("torch", reason="the statements of others are in PyTorch, which is not installed")
    y = draw(3, 64, 4096) * 2.0 ** np.random.default_rng(4).integers(-5, 6, (64, 1)).astype(F32)
    y = y.astype(BF16).astype(F32)
    y[7] = 0 if theirs is compressed_tensors else 1
    q, scale = theirs(torch.from_numpy(y), dtype)
    found, found_scale = jax.jit(lambda y: quantized_reference.by_group(y, dtype, 4096))(y)
    np.testing.assert_array_equal(np.asarray(found_scale), scale.numpy())
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), q.view(torch.uint8).numpy())
