"""What the tests of Flax's and Equinox's norms share: rows, and how far ours may be from theirs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def draw(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def assert_close(ours: Any, theirs: Any) -> None:
    """One rounding of the result's dtype that falls the other way, after a few of float32 of the largest product, with
    which a bias may cancel: the products are in another order."""
    assert ours.dtype == theirs.dtype
    step = float(jnp.finfo(ours.dtype).eps)
    wide = np.asarray(theirs, np.float64)
    bound = step * np.abs(wide) + 8 * 2.0**-24 * np.abs(wide).max()
    assert np.all(np.abs(np.asarray(ours, np.float64) - wide) <= bound)
