"""rms_norm_rope and rms_norm_rope_qkv: y is rms_norm's, and the rotation the oracle's of that y, on every path."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from pallas_norm import rms_norm, rms_norm_rope, rms_norm_rope_qkv
from tests import oracle, rope_oracle
from tests.oracle import BF16, F32, Array
from tests.rope_cases import NO_KERNEL, WIDTHS, operands
from tests.strategies import EPS, VALUES, examples, flushes


@functools.cache
def _jitted(implementation: str, eps: float) -> Any:
    return jax.jit(functools.partial(rms_norm_rope, eps=eps, implementation=implementation))


@functools.cache
def _norm(implementation: str, eps: float) -> Any:
    return jax.jit(functools.partial(rms_norm, eps=eps, implementation=implementation))


def holds(implementation: str, given: list[Any], *, eps: float = 1e-6) -> None:
    q, k, cos, sin, *of_weights = given
    found = _jitted(implementation, eps)(*given)
    for one, x, weight in zip(found, (q, k), of_weights or (None, None), strict=True):
        y = np.asarray(_norm(implementation, eps)(x, weight))
        oracle.assert_same(one, rope_oracle.rotated(y, cos, sin, flushes=flushes(implementation)))


@st.composite
def drawn(draw: st.DrawFn, implementation: str) -> tuple[list[Array], float]:
    n = draw(st.sampled_from(WIDTHS if implementation != "xla" else (*WIDTHS, *NO_KERNEL)))
    tokens = draw(st.sampled_from([(1,), (4,), (2, 2)]))
    heads = draw(st.sampled_from([(1, 1), (3, 2), (5, 1)]))
    given = operands(n, heads, tokens, draw(st.sampled_from(("bf16", "f16", "f32"))), draw(st.sampled_from(VALUES)))
    return given[: draw(st.sampled_from((4, 6)))], draw(st.sampled_from(EPS))


@pytest.mark.sampled(2)
@examples(0.3)
@hypothesis.given(data=st.data())
def test_the_rotation_is_the_oracles_of_y(implementation: str, data: st.DataObject) -> None:
    given, eps = data.draw(drawn(implementation))
    holds(implementation, given, eps=eps)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_a_projection_has_the_bits_of_q_and_k_apart(implementation: str, dtype: str) -> None:
    q, k, *rest = operands(64, (3, 2), (2, 2), dtype)
    qkv = np.concatenate([q, k, k], axis=-2)
    apart = rms_norm_rope(q, k, *rest, implementation=implementation)
    for others in (qkv, qkv[..., :5, :]):
        together = rms_norm_rope_qkv(others, *rest, q_heads=3, k_heads=2, implementation=implementation)
        for one, other in zip(together, apart, strict=True):
            oracle.assert_same(one, other)


@pytest.mark.sampled(2)
def test_every_product_of_16_bits_is_rounded_once(implementation: str) -> None:
    """Also where float32 rounds it too: below its smallest normal numbers, and at ties of bfloat16."""
    rng = np.random.default_rng(0)
    q = rng.choice([-1.0, 1.0], (16, 1, 256)).astype(BF16)
    bits = rng.integers(0, 1 << 16, (2, 16, 256)).astype(np.uint16)
    cos, sin = (np.where(np.isnan(one), 0, one).astype(BF16) for one in bits.view(BF16).astype(F32))
    weight = np.ldexp(rng.uniform(1, 2, (2, 256)), rng.integers(-100, 100, (2, 256))).astype(BF16)
    holds(implementation, [q, q, cos, sin, *weight], eps=0.0)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("shape", [(3, 64), (1, 3, 64), (1, 1, 3, 64), (2, 3, 64)])
def test_angles_of_positions_serve_every_batch(implementation: str, shape: tuple[int, ...]) -> None:
    q, k, cos, sin, *rest = operands(64, (2, 1), (2, 3), "bf16")
    whole = [np.broadcast_to(one, (2, 3, 64)) for one in (cos, sin)]
    given = [np.array(np.broadcast_to(one, shape)) for one in (cos, sin)]
    expected = rms_norm_rope(q, k, *whole, *rest, implementation=implementation)
    for one, other in zip(rms_norm_rope(q, k, *given, *rest, implementation=implementation), expected, strict=True):
        oracle.assert_same(one, other)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("options", [{"weight_offset": 1.0}, {"cast_before_scale": False}])
def test_the_options_are_those_of_rms_norm(implementation: str, options: dict[str, Any]) -> None:
    q, k, cos, sin, *of_weights = operands(64, (2, 1), (3,), "bf16")
    found = rms_norm_rope(q, k, cos, sin, *of_weights, **options, implementation=implementation)
    for one, x, weight in zip(found, (q, k), of_weights, strict=True):
        y = np.asarray(rms_norm(x, weight, **options, implementation=implementation))
        oracle.assert_same(one, rope_oracle.rotated(y, cos, sin))


@pytest.mark.sampled(2)
def test_a_float32_weight_leaves_float32(implementation: str) -> None:
    q, k, *rest = operands(64, (2, 1), (3,), "bf16")
    holds(implementation, [q, k, *(one.astype(F32) for one in rest)])


def test_no_tokens_need_no_kernel() -> None:
    q, k, cos, sin, *rest = operands(64, (3, 2), (7,), "bf16")
    found = rms_norm_rope(q[:0], k[:0], cos[:0], sin[:0], *rest)
    assert [one.shape for one in found] == [(0, 3, 64), (0, 2, 64)]


def test_angles_of_a_weak_dtype_take_that_of_what_is_rotated() -> None:
    """Beside a float32 weight y is float32: cos = jnp.full(n, 0.5) was cast to q's bfloat16, and refused for it."""
    q, k, _, _, *weights = operands(64, (4, 2), (3,), "bf16")
    half = jnp.full((3, 64), 0.5)
    assert half.weak_type
    wide = [weight.astype(F32) for weight in weights]
    for given in (weights, wide):
        strong = np.full((3, 64), 0.5, given[0].dtype)
        for one, other in zip(
            rms_norm_rope(q, k, half, half, *given), rms_norm_rope(q, k, strong, strong, *given), strict=True
        ):
            oracle.assert_same(one, other)
