"""pallas_norm.nnx, linen and equinox beside Flax's and Equinox's own modules."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from tests.modules_compared import assert_close, draw

# Flax's and Equinox's own norms, beside which ours stand, multiply what has other dtypes and ranks.
pytestmark = pytest.mark.usefixtures("implicit_promotion")

DTYPES = ["bfloat16", "float16", "float32"]


@pytest.mark.sampled(48)
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_nnx_has_the_parameters_and_dtypes_of_flax(x_dtype: str, param_dtype: str, dtype: Any, use_scale: bool) -> None:  # noqa: FBT001
    nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")
    from pallas_norm.nnx import RMSNorm

    init = nnx.initializers.normal(1.0)
    options = {"dtype": dtype, "param_dtype": jnp.dtype(param_dtype), "use_scale": use_scale, "scale_init": init}
    ours, theirs = (kind(96, epsilon=1e-5, rngs=nnx.Rngs(0), **options) for kind in (RMSNorm, nnx.RMSNorm))
    assert jax.tree.map(jnp.shape, nnx.state(ours)) == jax.tree.map(jnp.shape, nnx.state(theirs))
    x = draw(3, 5, 96, dtype=x_dtype)
    assert_close(ours(x), theirs(x))

    def loss(module: Any, x: Any) -> Any:
        return jnp.sum(module(x).astype(jnp.float32) ** 2)

    for own, other in zip(*(jax.tree.leaves(nnx.grad(loss)(module, x)) for module in (ours, theirs)), strict=True):
        assert own.dtype == other.dtype
        # Of the scale, a sum over rows of dy * unit: four roundings of each product on either side, in the coarsest
        # dtype.
        step = max(float(jnp.finfo(name).eps) for name in (x_dtype, param_dtype, dtype or x_dtype))
        rows = np.asarray(x, np.float64).reshape(-1, 96)
        unit = rows / np.sqrt((rows**2).mean(-1, keepdims=True) + 1e-5)
        products = 2 * np.asarray(nnx.state(ours)["scale"].get_value(), np.float64) * unit * unit
        bound = 8 * step * np.abs(products).sum(0)
        assert np.all(np.abs(np.asarray(own, np.float64) - np.asarray(other, np.float64)) <= bound)


def test_nnx_rounds_before_the_scale_where_asked() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")
    from pallas_norm.nnx import RMSNorm

    norm = RMSNorm(96, cast_before_scale=True, param_dtype=jnp.bfloat16, implementation="xla", rngs=nnx.Rngs(0))
    x = draw(3, 96)
    assert np.array_equal(norm(x), pallas_norm.rms_norm(x, norm.scale[...], eps=1e-6))


def test_nnx_rounds_a_float32_scale_in_the_kernel_and_not_its_gradient() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")
    from pallas_norm.nnx import RMSNorm

    norm = RMSNorm(96, cast_before_scale=True, dtype=jnp.bfloat16, implementation="xla", rngs=nnx.Rngs(0))
    norm.scale[...] = draw(96).astype(jnp.float32) / 3
    x = draw(300, 96).astype(jnp.bfloat16)
    assert np.array_equal(norm(x), pallas_norm.rms_norm(x, norm.scale[...].astype(jnp.bfloat16), eps=1e-6))
    of_scale = nnx.grad(lambda norm: norm(x).astype(jnp.float32).sum())(norm)["scale"][...]
    assert of_scale.dtype == jnp.float32
    assert np.mean(of_scale.astype(jnp.bfloat16) != of_scale) > 0.9


@pytest.mark.sampled(24)
@pytest.mark.parametrize("use_scale", [True, False])
@pytest.mark.parametrize("dtype", [None, *DTYPES])
@pytest.mark.parametrize("param_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_linen_has_the_parameters_and_dtypes_of_flax(
    x_dtype: str,
    param_dtype: str,
    dtype: Any,
    use_scale: bool,  # noqa: FBT001
) -> None:
    nn = pytest.importorskip("flax.linen", reason="needs flax (pip install flax)")
    from pallas_norm.linen import RMSNorm

    init = nn.initializers.normal(1.0)
    options = {"dtype": dtype, "param_dtype": jnp.dtype(param_dtype), "use_scale": use_scale, "scale_init": init}
    ours, theirs = (kind(epsilon=1e-5, **options) for kind in (RMSNorm, nn.RMSNorm))
    x = draw(3, 5, 96, dtype=x_dtype)
    variables = theirs.init(jax.random.key(0), x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, ours.init(jax.random.key(0), x), variables))
    assert_close(ours.apply(variables, x), theirs.apply(variables, x))


@pytest.mark.parametrize(
    "options", [{"reduction_axes": (0, 1)}, {"feature_axes": 0}, {"axis_index_groups": [[0]]}], ids=str
)
def test_what_flax_can_and_the_kernels_cannot_is_refused(options: Any) -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")
    from pallas_norm.nnx import RMSNorm

    with pytest.raises(NotImplementedError, match=r"needed .*; use flax's own RMSNorm for this one"):
        RMSNorm(96, rngs=nnx.Rngs(0), **options)
    with pytest.raises(NotImplementedError, match=r"^mask is given; needed None"):
        RMSNorm(96, rngs=nnx.Rngs(0))(draw(2, 96), mask=jnp.ones((2, 96), bool))


@pytest.mark.sampled(24)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("use_weight", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_equinox_has_the_fields_and_dtypes_of_equinox(
    x_dtype: str,
    dtype: str,
    use_weight: bool,  # noqa: FBT001
    use_bias: bool,  # noqa: FBT001
) -> None:
    eqx = pytest.importorskip("equinox", reason="needs equinox (pip install equinox)")
    from pallas_norm.equinox import RMSNorm

    def with_numbers(norm: Any) -> Any:
        arrays, static = eqx.partition(norm, eqx.is_array)
        filled = jax.tree.map(lambda leaf: draw(*leaf.shape, seed=leaf.size, dtype=leaf.dtype), arrays)
        return eqx.combine(filled, static)

    for shape in (96, (4, 24)):
        ours, theirs = (
            with_numbers(kind(shape, eps=1e-4, use_weight=use_weight, use_bias=use_bias, dtype=jnp.dtype(dtype)))
            for kind in (RMSNorm, eqx.nn.RMSNorm)
        )
        x = draw(5, *theirs.shape, dtype=x_dtype)
        assert_close(jax.vmap(ours)(x), jax.vmap(theirs)(x))
    state = object()
    assert ours(x[0], state)[1] is state
    with pytest.raises(ValueError, match=r"^x has shape .* but this norm has shape \(4, 24\); pass one member"):
        ours(x)


def test_importing_pallas_norm_imports_neither_flax_nor_equinox() -> None:
    code = "import sys, pallas_norm; print([name for name in ('flax', 'equinox') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("dtype", ["float64", "int32", "float16"])
def test_linen_takes_the_dtypes_that_flax_s_takes(dtype: str) -> None:
    """NumPy's float64 is what examples draw, and float32 without x64; integers Flax computes in float32."""
    linen = pytest.importorskip("flax.linen", reason="needs flax (pip install flax)")
    from pallas_norm.linen import RMSNorm

    x = (4 * np.random.default_rng(0).standard_normal((3, 96))).astype(dtype)
    ours, flax_s = (kind().init_with_output(jax.random.key(0), x)[0] for kind in (RMSNorm, linen.RMSNorm))
    assert ours.dtype == flax_s.dtype == jnp.float32
    np.testing.assert_allclose(ours, flax_s, rtol=1e-5, atol=1e-6)
