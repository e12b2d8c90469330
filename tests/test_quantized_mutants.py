"""Wrong results of 8 bits that must be seen: rewrites of the kernels and of the specification, and what kills each."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm._spec import Spec
from pallas_norm.regimes import plan_for
from tests import oracle, quantized_oracle, rewrites
from tests.oracle import BF16, F32, Array
from tests.test_quantized_reference import beside_ties, boundaries

ROWS = 9


def rows(n: int) -> Array:
    """Each of another magnitude, its largest element in another place; one of zeros, one with a NaN."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((ROWS, n))
    x[np.arange(ROWS), np.linspace(0, n - 1, ROWS).astype(int)] = -9
    x[4], x[5, 3] = 0, np.nan
    return x.astype(BF16)


def kernel(n: int) -> None:
    quantized = sys.modules["pallas_norm.kernels.quantized"].quantized  # of a mutant
    weight = np.random.default_rng(1).choice([-1.0, 1.0, 0.5], n).astype(BF16)
    weight[np.linspace(0, n - 1, ROWS).astype(int)] = 1  # so that the largest stay the largest
    operands = {"x": jnp.asarray(rows(n)), "weight": jnp.asarray(weight)}
    for dtype in quantized_oracle.DTYPES:
        for group in (n, *((128,) if n < 2048 else ())):
            options: dict[str, Any] = {"plan": plan_for(n, BF16), "spec": Spec(), "dtype": dtype, "group": group}
            found = quantized(operands, **options, with_y=True, interpret=True)
            y, q = np.asarray(found["y"]), np.asarray(found["q"]).view(quantized_oracle.DTYPES[dtype])
            scales = np.asarray(found["scales"]).reshape(ROWS, n // group)
            quantized_oracle.assert_quantized(y, q, scales, dtype, group, flushes=True)


def casts() -> None:
    cast = sys.modules["pallas_norm.quantized_reference"].cast
    for dtype in quantized_oracle.DTYPES:
        values = np.concatenate([boundaries(dtype), F32.type([1e30, -1e30, np.inf, np.nan])])
        quantized_oracle.assert_same_q(np.asarray(cast(values, dtype)), quantized_oracle.cast(values, dtype))


def groups() -> None:
    by_group = sys.modules["pallas_norm.quantized_reference"].by_group
    y = np.concatenate([rows(256), -np.abs(rows(256))])
    for dtype in quantized_oracle.DTYPES:
        q, scale = (np.asarray(value) for value in jax.jit(lambda y, dtype=dtype: by_group(y, dtype, 128))(y))
        quantized_oracle.assert_quantized(y, q, scale, dtype, 128)


def ties() -> None:
    by_scale = sys.modules["pallas_norm.quantized_reference"].by_scale
    for dtype in quantized_oracle.DTYPES:
        y, scale = beside_ties(dtype)
        q = jax.jit(lambda y, scale, dtype=dtype: by_scale(y, scale, dtype))(y, scale)
        quantized_oracle.assert_same_q(np.asarray(q), quantized_oracle.by_scale(y, scale, dtype))


def quotients() -> None:
    corrected, rng = sys.modules["pallas_norm._quotient"].corrected, np.random.default_rng(2)
    b = np.abs(rng.standard_normal(4000)).astype(F32) + 1
    a = np.concatenate([rng.standard_normal(2000).astype(F32), np.nextafter(b[2000:], F32.type(0))])
    for off in range(-2, 3):
        candidate = ((a / b).view(np.int32) + off).view(F32)
        oracle.assert_same(np.asarray(corrected(a, b, candidate)), a / b)


BY_XLA: tuple[Callable[[], None], ...] = (casts, groups, ties, quotients)
IN_KERNELS = {name: rewrite for name, rewrite in rewrites.QUANTIZED.items() if not name.startswith("xla")}


@pytest.mark.parametrize("name", IN_KERNELS)
def test_a_rewritten_kernel_is_killed(name: str) -> None:
    with rewrites.rewritten(IN_KERNELS[name]), pytest.raises(AssertionError):
        kernel(IN_KERNELS[name].n)


@pytest.mark.parametrize("name", sorted(rewrites.QUANTIZED.keys() - IN_KERNELS.keys()))
def test_a_rewritten_specification_is_killed(name: str) -> None:
    found = []
    with rewrites.rewritten(rewrites.QUANTIZED[name]):
        for holds in BY_XLA:
            try:
                holds()
            except AssertionError:
                found.append(holds.__name__)
    assert found, f"{name} survives"


@pytest.mark.parametrize("n", sorted({rewrite.n for rewrite in IN_KERNELS.values()}))
def test_the_real_kernels_are_killed_by_nothing(n: int) -> None:
    kernel(n)


def test_the_specification_is_killed_by_nothing() -> None:
    for holds in BY_XLA:
        holds()
