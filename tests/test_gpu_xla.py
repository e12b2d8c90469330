"""XLA's own program for the reference on a GPU: what an older GPU, or a row that no kernel takes, gets.

A jitted program is what shows it: called operation by operation, nothing can be fused and so nothing is dropped. In a
jitted one XLA dropped float16's round trip through a cast in every shape tried, and 26 % of the outputs were rounded
once.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

import pallas_norm
from bench.accuracy import DTYPES, EPS, hf_steps, ordered, single_rounding

pytestmark = pytest.mark.gpu

SHAPES = ((512, 1024), (4096, 1024), (16384, 128), (300, 20), (7, 131073))


def draw(rows: int, n: int, dtype: str) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(n)
    x, dy = ((scale * rng.standard_normal((rows, n), dtype=np.float32)).astype(DTYPES[dtype]) for scale in (3, 1))
    return x, (1 + 0.3 * rng.standard_normal(n)).astype(DTYPES[dtype]), dy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), SHAPES)
def test_a_jitted_program_keeps_every_rounding(rows: int, n: int, dtype: str) -> None:
    x, weight, _ = draw(rows, n, dtype)
    norm = jax.jit(functools.partial(pallas_norm.rms_norm, eps=EPS, implementation="xla", return_rstd=True))
    y, rstd = (np.asarray(value) for value in norm(x, weight))
    differ = ordered(y) != ordered(hf_steps(x, weight, rstd))
    assert not differ.any(), f"{differ.mean():.2%} of the outputs differ from the replay"
    if dtype != "float32":
        assert (ordered(y) != ordered(single_rounding(x, weight, rstd))).mean() > 0.1  # what a dropped one would give


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_jitted_gradient_keeps_the_rounding_of_g(dtype: str) -> None:
    x, weight, dy = draw(2000, 256, dtype)
    norm = functools.partial(pallas_norm.rms_norm, eps=EPS, implementation="xla", return_rstd=True)
    dx, rstd = jax.jit(
        lambda x, weight, dy: (
            jax.vjp(lambda x: norm(x, weight)[0], x)[1](dy)[0],
            norm(x, weight)[1],
        )
    )(x, weight, dy)
    scale = np.asarray(rstd).astype(np.float64)[:, None]
    unit, g = x.astype(np.float64) * scale, dy.astype(np.float32) * weight.astype(np.float32)

    def exact(g: np.ndarray) -> np.ndarray:
        wide = g.astype(np.float64)
        return scale * (wide - unit * np.mean(wide * unit, axis=1, keepdims=True))

    error, of_unrounded = (
        float(np.mean(np.abs(np.asarray(dx).astype(np.float64) - exact(value))))
        for value in (g.astype(x.dtype).astype(np.float32), g)
    )
    assert error < 0.9 * of_unrounded  # nearer to the gradient with g rounded than to the one without
