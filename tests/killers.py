"""Which properties a wrong kernel or specification breaks, and operands that it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests import oracle
from tests.oracle import BF16, F32, Array

N, ROWS = 41, 4  # odd, and no multiple of any vector or padding


def draw(seed: int, dtype: Any, *shape: int, size: float = 3.0) -> Array:
    return (size * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


def operands(rows: int = ROWS, n: int = N, dtype: Any = BF16) -> dict[str, Array]:
    x = draw(9, dtype, rows, n)
    return {
        "x": x,
        "weight": draw(10, dtype, n, size=1.0),
        "rstd": oracle.rstd64(x, 1e-6).astype(F32),
        "dy": draw(11, dtype, rows, n),
    }


def killers(kernel: Any, properties: dict[str, Callable[[Any], None]]) -> list[str]:
    found = []
    for name, holds in properties.items():
        try:
            holds(kernel)
        except AssertionError:
            found.append(name)
    return found
