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
from tests import oracle, quantized_oracle
from tests.oracle import BF16, F32, Array
from tests.rewrites import Rewrite, rewritten
from tests.test_quantized_reference import beside_ties, boundaries

ROWS = 9

# In the kernels for rows of n, and in the specification.
QUANTIZED: dict[str, Rewrite] = {
    "scale of zeros": Rewrite("quantized", "F32(quantized_reference.SCALE_OF_ZEROS)", "F32(1)", n=384),
    "scale divided by the other dtype's largest": Rewrite("quantized", "LARGEST[self.dtype]", 'LARGEST["int8"]', n=384),
    "last chunk not in the largest": Rewrite("quantized", "lane_max(y, block", "lane_max(y[:1], block", n=384),
    "a warp not in the largest": Rewrite("cta", "self.plan.warpgroups * WARPS)", "self.plan.warpgroups * WARPS - 1)", n=12288),  # noqa: E501
    "rows of a block share the largest": Rewrite("warp", "jnp.max(bits, axis=1)", "jnp.full(bits.shape[:1], jnp.max(bits))", n=384),  # noqa: E501
    "groups' scales in the first place": Rewrite("groups", "lax.div(jnp.int32(start), jnp.int32(group))", "0", n=384),
    "a group's scale for all of a chunk": Rewrite("eight_bits", "value.reshape(-1, group) if one_row else value.reshape(shape[0], -1, group)", "value.reshape(1, -1)", n=1024),  # noqa: E501
    "xla: the largest of y, not of its magnitude": Rewrite("quantized_reference", "jnp.abs(y.astype(F32))", "y.astype(F32)"),  # noqa: E501
    "xla: scale of zeros": Rewrite("quantized_reference", "F32(SCALE_OF_ZEROS)", "F32(1)"),
    "xla: amax times an inverse": Rewrite("quantized_reference", "quotient(amax, jnp.full(amax.shape, LARGEST[dtype], F32))", "amax * F32(1 / LARGEST[dtype])"),  # noqa: E501
    "xla: y times an inverse": Rewrite("quantized_reference", "quotient(y.astype(F32).reshape(parts), divisor)", "y.astype(F32).reshape(parts) * (1 / divisor)"),  # noqa: E501
    "xla: not saturated": Rewrite("quantized_reference", "jnp.clip(wide, -LARGEST[dtype], LARGEST[dtype])", "wide"),
    "xla: int8 saturated at -127": Rewrite("quantized_reference", "-128, 127)", "-127, 127)"),
    "xla: int8 rounded half away from zero": Rewrite("quantized_reference", "lax.RoundingMethod.TO_NEAREST_EVEN), -128", "lax.RoundingMethod.AWAY_FROM_ZERO), -128"),  # noqa: E501
    "xla: int8 of 127.5": Rewrite("quantized_reference", '"int8": 127.0', '"int8": 127.5'),
    "xla: e4m3 rounded by way of bfloat16": Rewrite("quantized_reference", "lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=3)", "lax.reduce_precision(lax.reduce_precision(wide, 8, 7), 8, 3)"),  # noqa: E501
    "xla: subnormal e4m3 flushed": Rewrite("quantized_reference", "< 2.0**-6, subnormal, normal)", "< 2.0**-6, 0 * wide, normal)"),  # noqa: E501
    "xla: quotients put right by one unit": Rewrite("_quotient", "STEPS = 2", "STEPS = 1"),
}  # fmt: skip


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
        quantized_oracle.assert_same_q(
            np.asarray(cast(jnp.asarray(values), dtype)), quantized_oracle.cast(values, dtype)
        )


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
        oracle.assert_same(np.asarray(corrected(*map(jnp.asarray, (a, b, candidate)))), a / b)


BY_XLA: tuple[Callable[[], None], ...] = (casts, groups, ties, quotients)
IN_KERNELS = {name: rewrite for name, rewrite in QUANTIZED.items() if not name.startswith("xla")}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_KERNELS)
def test_a_rewritten_kernel_is_killed(name: str) -> None:
    with rewritten(IN_KERNELS[name]), pytest.raises(AssertionError):
        kernel(IN_KERNELS[name].n)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(QUANTIZED.keys() - IN_KERNELS.keys()))
def test_a_rewritten_specification_is_killed(name: str) -> None:
    found = []
    with rewritten(QUANTIZED[name]):
        for holds in BY_XLA:
            try:
                holds()
            except AssertionError:
                found.append(holds.__name__)
    assert found, f"{name} survives"


@pytest.mark.slow
@pytest.mark.parametrize("n", sorted({rewrite.n for rewrite in IN_KERNELS.values()}))
def test_the_real_kernels_are_killed_by_nothing(n: int) -> None:
    kernel(n)


@pytest.mark.slow
def test_the_specification_is_killed_by_nothing() -> None:
    for holds in BY_XLA:
        holds()
