"""Every call under JAX's configurations; weak dtypes; outputs that nobody uses; a weight for each member of a vmap."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import _transforms, add_rms_norm, rms_norm, rms_norm_quantized


def draw(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# --- configurations -------------------------------------------------------------------------------------------------

CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "rank promotion allowed": lambda: jax.numpy_rank_promotion("allow"),
    "dtype promotion standard": lambda: jax.numpy_dtype_promotion("standard"),
    "debug_nans": lambda: jax.debug_nans(True),  # noqa: FBT003
    "disable_jit": jax.disable_jit,
    "checking leaks": jax.checking_leaks,
    "transfer guard": lambda: jax.transfer_guard("disallow"),
    "x64": lambda: jax.enable_x64(True),  # noqa: FBT003
}


@pytest.mark.sampled(21)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_call_works_under_each_configuration(name: str, dtype: str) -> None:
    x, weight, dy = draw(3, 4, 96, dtype=dtype), draw(96, seed=1, dtype=dtype), draw(3, 4, 96, seed=2, dtype=dtype)
    weights = draw(3, 96, seed=3, dtype=dtype)

    def calls() -> list[Any]:
        def gradient(x: Any, weight: Any, dy: Any) -> Any:
            return jax.vjp(rms_norm, x, weight)[1](dy)

        return jax.tree.leaves([
            rms_norm(x, weight),
            rms_norm(x),
            add_rms_norm(x, dy, weight, return_rstd=True),
            gradient(x, weight, dy),
            jax.vjp(add_rms_norm, x, dy, weight)[1]((dy, x)),
            jax.vjp(gradient, x, weight, dy)[1]((dy, weight)),
            jax.vmap(rms_norm, in_axes=(0, None))(x, weight),
            jax.vmap(rms_norm)(x, weights),
            jax.jit(rms_norm)(x, weight),
        ])  # fmt: skip

    expected = calls()
    with CONFIGURATIONS[name]():
        found = calls()
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == other.dtype
        if name == "disable_jit":  # operation by operation: XLA contracts no product and sum
            wide = np.asarray(other, np.float64)
            step = float(jnp.finfo(own.dtype).eps)
            assert np.all(np.abs(np.asarray(own, np.float64) - wide) <= 96 * step * np.abs(wide).max())
        else:
            assert np.array_equal(own, other)


# --- the dtype of a weight made of Python numbers -------------------------------------------------------------------


@pytest.mark.usefixtures("implicit_promotion")  # JAX's own x * weight is what the norm is compared with
def test_a_weakly_typed_weight_gives_way_as_it_does_in_a_product() -> None:
    weak, x = jnp.full(128, 0.7), draw(4, 128)
    assert weak.weak_type
    assert rms_norm(x, weak).dtype == (x * weak).dtype == jnp.bfloat16
    assert np.array_equal(rms_norm(x, weak), rms_norm(x, weak.astype(jnp.bfloat16)))
    carried, _ = jax.lax.scan(lambda x, _: (rms_norm(x, weak), None), x, length=2)
    assert carried.dtype == jnp.bfloat16
    dweight = jax.grad(lambda w: jnp.sum(rms_norm(x, w).astype(jnp.float32)))(weak)
    assert dweight.dtype == jnp.float32


def test_a_weakly_typed_sum_gives_way_too() -> None:
    x, ones = draw(4, 128), jnp.full((4, 128), 1.0)
    for y, s in (add_rms_norm(x, ones), add_rms_norm(ones, x)):
        assert y.dtype == s.dtype == jnp.bfloat16
    assert add_rms_norm(ones, ones)[1].dtype == jnp.float32


# --- one output of add_rms_norm that nobody uses --------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_where_only_the_sum_is_used_its_gradient_passes_as_it_is(dtype: str) -> None:
    """The gradient of y is a symbolic zero, not an array of zeros, which a rstd of infinity would make NaN."""
    x = draw(5, 128, dtype=dtype).at[0].set(0).at[1, 3].set(jnp.inf).at[2].set(jnp.finfo(dtype).max)
    residual, weight = jnp.zeros_like(x), draw(128, seed=1, dtype=dtype)
    ds = draw(5, 128, seed=2, dtype=dtype)

    def used(x: Any, residual: Any, weight: Any) -> Any:
        _, s = add_rms_norm(x, residual, weight, eps=0.0)
        return s

    for run in (
        lambda: jax.vjp(used, x, residual, weight)[1](ds),
        jax.jit(lambda: jax.vjp(used, x, residual, weight)[1](ds)),
    ):
        dx, dresidual, dweight = run()
        assert np.array_equal(dx, ds)
        assert np.array_equal(dresidual, ds)
        assert not np.any(dweight)
    text = (
        jax.jit(lambda: jax.vjp(used, x, residual, weight)[1](ds)).trace().lower(lowering_platforms=("cuda",)).as_text()
    )
    assert text.count("custom_call @mosaic_gpu") <= 1  # nothing runs backward


def test_where_only_y_is_used_no_gradient_of_the_sum_is_added() -> None:
    x, weight, dy = draw(5, 128), draw(128, seed=1), draw(5, 128, seed=2)
    only_y = jax.vjp(lambda x: add_rms_norm(x, x, weight)[0], x)[1](dy)
    assert np.array_equal(only_y[0], 2 * jax.vjp(lambda s: rms_norm(s, weight), x + x)[1](dy)[0])


# --- vmap with a weight for each member -----------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", [{}, {"cast_before_scale": False}, {"weight_offset": 1.0}], ids=str)
def test_a_weight_for_each_member_is_one_program_without_a_loop(options: Any) -> None:
    x, weights = draw(256, 4, 128), draw(256, 128, seed=1)

    def both(x: Any, weight: Any) -> Any:
        y, pullback = jax.vjp(lambda x, weight: rms_norm(x, weight, **options), x, weight)
        return y, *pullback(y)

    together = jax.jit(jax.vmap(both))
    text = together.trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 2
    assert "stablehlo.while" not in text
    y, dx, dweight = together(x, weights)
    alone = jax.jit(both)
    for member in (0, 100, 255):
        one = alone(x[member], weights[member])
        assert np.array_equal(y[member], one[0])
        if options == {"cast_before_scale": False}:  # dy * weight is in no fusion with what follows, so no fma takes it
            assert np.allclose(
                np.asarray(dx[member], np.float32), np.asarray(one[1], np.float32), rtol=2**-7, atol=1e-5
            )
        else:
            assert np.array_equal(dx[member], one[1])
        assert np.allclose(
            np.asarray(dweight[member], np.float32), np.asarray(one[2], np.float32), rtol=2**-7, atol=1e-5
        )


@pytest.mark.sampled(12)
@pytest.mark.parametrize("n", [128, 800, 864, 1312])
@pytest.mark.parametrize("form", ["norm", "add", pytest.param("interpreted", marks=pytest.mark.slow)])
def test_dx_of_members_has_the_order_of_their_own_dy(form: str, n: int) -> None:
    """Of float32 rows with a dy of 16 bits it is not that of dy * weight, in float32, at 800, 864 and 1312."""
    x, weights = draw(2, 3, n, dtype="float32"), draw(2, n, seed=1, dtype="float32")
    dy, ds = draw(2, 3, n, seed=2), draw(2, 3, n, seed=3, dtype="float32")
    implementation: Any = "interpret" if form == "interpreted" else None

    def dx(x: Any, weight: Any, dy: Any, ds: Any) -> Any:
        if form == "add":
            norm = functools.partial(add_rms_norm, weight=weight, out_dtype="bfloat16")
            return jax.vjp(norm, x, x)[1]((dy, ds))
        norm = functools.partial(rms_norm, weight=weight, out_dtype="bfloat16", implementation=implementation)
        return jax.vjp(norm, x)[1](dy)

    members = [jax.tree.leaves(dx(*member)) for member in zip(x, weights, dy, ds, strict=True)]
    for found, own in zip(jax.tree.leaves(jax.vmap(dx)(x, weights, dy, ds)), zip(*members, strict=True), strict=True):
        assert np.array_equal(found, np.stack(own))


@pytest.mark.slow
def test_another_order_for_members_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transforms, "_order", lambda operands, dy: None)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_dx_of_members_has_the_order_of_their_own_dy("norm", 1312)
    jax.clear_caches()


@pytest.mark.parametrize("scale", [0.02, np.float32(0.02)], ids=repr)
def test_a_scale_that_is_a_number_is_a_transfer_that_was_asked_for(scale: Any) -> None:
    x = jax.block_until_ready(draw(3, 64))
    expected = rms_norm_quantized(x, scale=scale)
    with jax.transfer_guard("disallow"):
        found = rms_norm_quantized(x, scale=scale)
    for own, other in zip(found, expected, strict=True):
        assert jnp.array_equal(own, other)
