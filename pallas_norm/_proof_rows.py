"""The rows and weights on which `_computing` proves a norm of another class: exact in their sums of squares, and of
values at which a rounding, a clamp, a bias or eps in another place changes a bit of y."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
LARGEST = 5  # of the integers in a row: LARGEST^2 * 131072 elements are exact in float32
OUTLIER = 2048  # with ones beside it, of which 131072 are exact too: nearly sqrt(n) after the norm
DIGITS = {"bfloat16": 255, "float16": 2047, "float32": 2363}  # odd, of all of a dtype's bits; 3 * 2363^2 is exact
ROWS = 16


def scales(eps: float, dtype: Any) -> list[int]:
    """Powers of two for rows of small integers, of which two give mean squares near eps: max(mean, eps) is told from a
    sum there, and eps outside the root. Small enough that no square is lost, and the integers are numbers of dtype. An
    eps of zero is near the smallest rows: what else keeps a root from being zero tells there."""
    least = -21 if dtype == jnp.float16 else -57
    near = max(least, min(8, math.floor(math.log2(eps) / 2))) if 0 < eps < math.inf else least if eps == 0 else 0
    return [0, 3, -3, -9, -11, near, near - 3]


def _telling(dtype: Any) -> Any:
    """Odd integers of all bits of dtype, whose squares lose a quarter of a step and more where they are rounded to
    float16 or bfloat16, all to the same side: drawn at random, what they lose averages out, and at some n no bit of y
    told."""
    largest = DIGITS[jnp.dtype(dtype).name]
    odd = np.arange(largest // 2 | 1, largest + 1, 2)
    steps = 2 ** (np.log2(odd**2).astype(int) + 1 - (11 if dtype == jnp.float16 else 8))
    lost = odd**2 % steps / steps
    return odd[(lost > 0.25) & (lost < 0.5)]


def rows(n: int, dtype: Any, eps: float) -> Any:
    """ROWS rows whose square sum is exact in float32, of several magnitudes. The first ones are of small integers. In
    those behind them are numbers of all bits of dtype, as few as that takes: they are not exact in a narrower dtype,
    their squares are in none of 16 bits, and those of the second row are beyond float16, as of bfloat16 and float32 is
    the row. Some are -0.0, to which a bias of 0.0 would make a difference. Then an outlier of each sign, after the norm
    as large as a row of n can have one; and a row of zeros, or where eps is zero, and they are no numbers, another
    one of the smallest integers."""
    draw = np.random.default_rng(n)
    powers, largest = scales(eps, dtype), DIGITS[jnp.dtype(dtype).name]
    small = draw.integers(1, LARGEST + 1, (len(powers), n)) * 2.0 ** np.array(powers)[:, None]
    others = [0, 2, -4, -8, -12] if dtype == jnp.float16 else [0, 10, -4, -12, -40]
    digits = draw.choice(_telling(dtype), (len(others), n)) * 2.0 ** np.array(others)[:, None]
    filled = min(n - 1, 2**24 // largest**2)
    drawn = np.concatenate([small, draw.permuted(np.where(np.arange(n) < filled, digits, 0), axis=1)])
    drawn = np.where(drawn == 0, -0.0, drawn * draw.choice([-1, 1], drawn.shape))
    outliers = draw.choice([-1.0, 1.0], (3, n))
    # Not where `weight` has no moderate number: a clamp of y would not show.
    outliers[[0, 1, 2], n - 1] = OUTLIER, -OUTLIER, -OUTLIER
    outliers[2, : n - 1] = -0.0
    nothing = np.full((1, n), -0.0) if eps > 0 else drawn[5:6, ::-1]
    return jnp.asarray(np.concatenate([drawn, outliers, nothing]), dtype)


def weight(n: int, dtype: Any) -> Any:
    """Of both signs, which a norm may not lose, and with a zero; not -0.0, to which MaxText's norm adds 0.0. Some are
    beyond what float16 has, which a cast to it would change, and which a product with x brings back. The last one is
    moderate."""
    draw = np.random.default_rng(n + 1)
    found = draw.uniform(0.25, 2.0, n)
    found[: n // 8] *= 2.0**16
    found[n // 8 : n // 4] *= 2.0**-27
    found *= np.where(np.arange(n) % 2, draw.choice([-1, 1], n), -1)  # the first one below zero, at any n
    if n >= 16:
        found[n // 2] = 0.0
    return jnp.asarray(found, dtype)
