"""Heads to rotate: their numbers, and how many elements they have."""

from __future__ import annotations

import numpy as np

from tests.oracle import DTYPES, Array
from tests.strategies import numbers, weights

WIDTHS = (32, 64, 96, 128, 192, 256, 512)  # whose heads a kernel rotates, in float32 too
NO_KERNEL = (2, 6, 30, 50, 80, 1024)


def operands(
    n: int, heads: tuple[int, int], tokens: tuple[int, ...], dtype: str, values: str = "normal"
) -> list[Array]:
    """q, k, cos, sin and two weights; cos and sin have rows for the last axis of tokens."""
    rng = np.random.default_rng((n, *heads, *tokens))
    q, k = (numbers(rng, (*tokens, count, n), dtype, values) for count in heads)
    cos, sin = (rng.uniform(-1, 1, (*tokens[-1:], n)).astype(DTYPES[dtype]) for _ in range(2))
    return [q, k, cos, sin, *(weights(rng, n, dtype) for _ in range(2))]
