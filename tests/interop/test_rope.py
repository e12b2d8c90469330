"""rms_norm_rope of torch: the bits are those of rms_norm and transformers' apply_rotary_pos_emb, and those of JAX."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pallas_norm
from pallas_norm_torch import rms_norm_rope
from tests.interop.cases import DTYPES
from tests.interop.rope_cases import HEADS, check, operands


@pytest.mark.parametrize("n", [2, 64, 80, 96, 128, 256, 1024])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_statements_give_the_bits_of_the_steps(dtype: torch.dtype, n: int) -> None:
    q, k, cos, sin, *weights = operands(n, dtype)
    check(q, k, cos, sin, *weights)
    check(q, k, cos[None], sin[None])
    check(q[0, :1], k[0, :1], cos[:1], sin[:1], *weights)
    check(q[:0], k[:0], cos, sin, *weights)


def test_a_float32_weight_leaves_float32() -> None:
    q, k, cos, sin, *weights = operands(64, torch.bfloat16)
    wide = [one.float() for one in (cos, sin, *weights)]
    check(q, k, *wide)
    assert rms_norm_rope(q, k, *wide)[0].dtype == torch.float32


def test_the_bits_are_those_of_jax() -> None:
    """Of sums that are exact in any order, so that y is the same."""
    generator = np.random.default_rng(0)
    q, k = (generator.integers(-4, 5, (7, heads, 64)).astype(np.float32) for heads in HEADS)
    cos, sin, q_weight, k_weight = (generator.standard_normal(shape) for shape in ((7, 64), (7, 64), 64, 64))
    given = [np.asarray(one, np.float32) for one in (q, k, cos, sin, q_weight, k_weight)]
    for dtype in DTYPES:
        of_torch = rms_norm_rope(*(torch.from_numpy(one).to(dtype) for one in given))
        name = str(dtype).removeprefix("torch.")
        of_jax = pallas_norm.rms_norm_rope(*(jnp.asarray(one).astype(name) for one in given))
        for one, other in zip(of_torch, of_jax, strict=True):
            np.testing.assert_array_equal(one.float().numpy(), np.asarray(other, np.float32))
