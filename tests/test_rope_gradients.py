"""Derivatives of rotated heads: the gradient's bits are those of the steps, and the angles have none."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import rms_norm, rms_norm_rope, rms_norm_rope_qkv, rope_reference
from tests import oracle, rope_oracle
from tests.oracle import F32
from tests.rope_cases import operands
from tests.strategies import numbers


def steps(q: Any, k: Any, cos: Any, sin: Any, *of_weights: Any) -> list[Any]:
    """The gradient of the rotation as the specification has it, which no derivative of round_to would be."""
    cos, sin = jnp.asarray(cos), jnp.asarray(sin)

    @jax.custom_vjp
    def rotated(y: Any) -> Any:
        return rope_reference.rotated(y, cos, sin)

    rotated.defvjp(
        lambda y: (rotated(y), None), lambda _, dr: (rope_reference.rotated_back(jnp.asarray(dr), cos, sin),)
    )
    return [rotated(rms_norm(x, weight)) for x, weight in zip((q, k), of_weights or (None, None), strict=True)]


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
def test_the_gradient_of_the_rotation_is_the_oracles(dtype: str) -> None:
    dr, _, cos, sin, *_ = operands(64, (3, 2), (7,), dtype)
    dr[0], dr[1] = 0, -0.0
    oracle.assert_same(jax.jit(rope_reference.rotated_back)(dr, cos, sin), rope_oracle.rotated_back(dr, cos, sin))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("with_weights", [True, False])
def test_gradients_are_those_of_the_steps(dtype: str, with_weights: bool) -> None:  # noqa: FBT001
    q, k, cos, sin, *rest = operands(64, (5, 3), (2, 7), dtype)
    leaves = [q, k, *(rest if with_weights else ())]
    dr = [numbers(np.random.default_rng(at), x.shape, dtype, "normal") for at, x in enumerate((q, k))]

    def gradients(function: Any, *leaves: Any) -> Any:
        return jax.jit(lambda *leaves: jax.vjp(function, *leaves)[1](dr))(*leaves)

    expected = gradients(lambda q, k, *of_weights: steps(q, k, cos, sin, *of_weights), *leaves)
    found = gradients(lambda q, k, *of_weights: list(rms_norm_rope(q, k, cos, sin, *of_weights)), *leaves)
    qkv = np.concatenate([q, k, k], axis=-2)
    fused = functools.partial(rms_norm_rope_qkv, q_heads=5, k_heads=3)
    together = gradients(lambda qkv, *rest: list(fused(qkv, cos, sin, *rest)), qkv, *leaves[2:])
    for one, other in zip(found, expected, strict=True):
        oracle.assert_same(one, other)
    oracle.assert_same(together[0], np.concatenate([*expected[:2], np.zeros_like(k)], axis=-2))
    for one, other in zip(together[1:], expected[2:], strict=True):
        oracle.assert_same(one, other)
    alone = jax.grad(lambda k: rms_norm_rope(q, k, cos, sin, *leaves[2:])[1].astype(F32).sum())(k)
    assert np.isfinite(np.asarray(alone, F32)).all()


def penalty(function: Any, q: Any, *operands: Any, **options: Any) -> Any:
    """What a gradient penalty adds to a loss."""
    total = lambda q: sum(jnp.sum(one**3) for one in function(q, *operands, **options))  # noqa: E731
    return jnp.sum(jax.grad(total)(q) ** 2)


@pytest.mark.slow
def test_it_can_be_differentiated_twice() -> None:
    """With the bits of the steps."""
    given = operands(16, (2, 1), (3,), "f32")
    found, in_steps = (jax.grad(functools.partial(penalty, function))(*given) for function in (rms_norm_rope, steps))
    oracle.assert_same(found, in_steps)


@pytest.mark.slow
def test_second_derivatives_are_those_that_jax_makes_of_the_plain_formula() -> None:
    """Of rows of 1 and -1, whose rstd is 1, turned by whole quarters: every number is exact, in any order."""

    def plain(q: Any, k: Any, cos: Any, sin: Any, *weights: Any) -> Any:
        y = (
            x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True)) * weight[None, None]
            for x, weight in zip((q, k), weights, strict=True)
        )
        return [one * cos[:, None] + rope_reference.rotate_half(one) * sin[:, None] for one in y]

    rng = np.random.default_rng(0)
    q, k, *weights = (rng.choice([-1, 1], shape).astype(F32) for shape in ((3, 2, 16), (3, 1, 16), (16,), (16,)))
    quarters = np.tile(rng.integers(0, 4, (3, 8)), 2)
    cos, sin = (np.array(of)[quarters].astype(F32) for of in ([1, 0, -1, 0], [0, 1, 0, -1]))
    found = jax.grad(functools.partial(penalty, functools.partial(rms_norm_rope, eps=0.0)))(q, k, cos, sin, *weights)
    expected = jax.grad(functools.partial(penalty, plain))(q, k, cos, sin, *weights)
    assert np.abs(expected).max() > 1
    np.testing.assert_array_equal(found, expected)


def test_a_derivative_of_the_angles_says_so() -> None:
    q, k, cos, sin, *rest = operands(64, (3, 2), (7,), "f32")
    message = (
        "the derivative with respect to cos or sin was asked for; needed angles that are constants: pass "
        "jax.lax.stop_gradient of both, or rotate what rms_norm returns in steps of your own"
    )
    for at in (2, 3):
        with pytest.raises(NotImplementedError) as raised:
            jax.grad(lambda *given: rms_norm_rope(*given)[0].sum(), argnums=at)(q, k, cos, sin, *rest)
        assert str(raised.value) == message
