"""pallas_norm.nnx, linen and equinox beside Flax's and Equinox's own modules; `patch`; an NNX model on a mesh."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_norm

DTYPES = ["bfloat16", "float16", "float32"]


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


@pytest.mark.sampled(4)
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


@pytest.mark.sampled(4)
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


# --- patch ----------------------------------------------------------------------------------------------------------


def nnx_model() -> Any:
    nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")

    class OtherRMSNorm(nnx.RMSNorm):
        def __call__(self, x: Any) -> Any:
            return 2 * super().__call__(x)

    class Block(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.norm = nnx.RMSNorm(32, rngs=rngs, param_dtype=jnp.bfloat16)
            self.linear = nnx.Linear(32, 32, rngs=rngs, param_dtype=jnp.bfloat16)

        def __call__(self, x: Any) -> Any:
            return x + self.linear(self.norm(x))

    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.blocks = nnx.List([Block(rngs) for _ in range(2)]) if hasattr(nnx, "List") else [Block(rngs)] * 2
            self.other = OtherRMSNorm(32, rngs=rngs)
            self.over_rows = nnx.RMSNorm(32, reduction_axes=0, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return self.other(x)

    return Model()


def test_patch_replaces_the_norms_of_an_nnx_model_and_unpatch_restores_them() -> None:
    model = nnx_model()
    from flax import nnx

    from pallas_norm.nnx import RMSNorm

    x, before = draw(4, 32, dtype="float32"), jax.tree.leaves(nnx.state(model))
    expected = nnx.jit(lambda model, x: model(x))(model, x)
    same, report = pallas_norm.patch(model)
    assert same is model
    assert report.replaced == {"flax RMSNorm": 2}
    assert [(one.name, one.class_name) for one in report.skipped] == [
        ("other", "OtherRMSNorm"),
        ("over_rows", "RMSNorm"),
    ]
    assert str(report).startswith("replaced 2 flax RMSNorm\nskipped OtherRMSNorm (other): its bits are those of")
    assert type(model.blocks[0].norm) is RMSNorm
    assert_same(jax.tree.leaves(nnx.state(model)), before)
    # Eight float32 roundings a norm, grown by each layer behind it: by the largest sum of a column of its weights.
    growth = [np.abs(np.asarray(block.linear.kernel.get_value(), np.float64)).sum(0).max() for block in model.blocks]
    bound = len(growth) * 8 * 2.0**-24 * math.prod(1 + factor for factor in growth) * np.abs(expected).max()
    assert np.all(np.abs(nnx.jit(lambda model, x: model(x))(model, x) - expected) <= bound)
    assert nnx.jit(lambda model, x: jnp.sum(model(x)))(nnx.clone(model), x).shape == ()
    assert pallas_norm.patch(model)[1].already == {"flax RMSNorm": 2}
    assert pallas_norm.unpatch(model)[1].restored == {"flax RMSNorm": 2}
    assert type(model.blocks[0].norm) is nnx.RMSNorm
    assert np.array_equal(nnx.jit(lambda model, x: model(x))(model, x), expected)
    assert str(pallas_norm.unpatch(model)[1]) == "found no RMSNorm"


def assert_same(ours: Any, theirs: Any) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert np.array_equal(own, other)


def test_patch_makes_a_new_equinox_tree_and_unpatch_the_old_one() -> None:
    eqx = pytest.importorskip("equinox", reason="needs equinox (pip install equinox)")
    from pallas_norm.equinox import RMSNorm

    class MyRMSNorm(eqx.Module):
        weight: Any

    class Model(eqx.Module):
        norms: list[Any]
        mine: Any

    model = Model([eqx.nn.RMSNorm(32), eqx.nn.RMSNorm(32, use_bias=False)], MyRMSNorm(jnp.ones(3)))
    patched, report = pallas_norm.patch(model)
    assert report.replaced == {"equinox RMSNorm": 2}
    assert [one.class_name for one in report.skipped] == ["MyRMSNorm"]
    assert all(type(norm) is RMSNorm for norm in patched.norms)
    assert all(type(norm) is eqx.nn.RMSNorm for norm in model.norms)
    x = draw(5, 32)
    for own, other in zip(patched.norms, model.norms, strict=True):
        assert_close(jax.vmap(own)(x), jax.vmap(other)(x))
    restored, report = pallas_norm.unpatch(patched)
    assert report.restored == {"equinox RMSNorm": 2}
    assert jax.tree.structure(restored) == jax.tree.structure(model)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError) as error:
        pallas_norm.patch({"norm": 1})
    assert str(error.value) == (
        "model is a dict; needed a flax.nnx.Module or an equinox.Module (Flax Linen: write pallas_norm.linen.RMSNorm; "
        "torch: pallas_norm_torch.patch)"
    )


def test_importing_pallas_norm_imports_neither_flax_nor_equinox() -> None:
    code = "import sys, pallas_norm; print([name for name in ('flax', 'equinox') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr


# --- a training step on a mesh --------------------------------------------------------------------------------------

HIDDEN, HEADS, HEAD = 64, 4, 32
MOVED = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* (all-gather)")


def attention_model(kind: Any, mesh: Any) -> Any:
    """Llama's shape: a norm of the residual stream, q and k norms whose hidden axis is split over `model`."""
    from flax import nnx

    def put(value: jax.Array, spec: P) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, spec))

    class Block(nnx.Module):
        def __init__(self, seed: int) -> None:
            rngs = nnx.Rngs(seed)
            self.norm, self.q_norm, self.k_norm = (kind(n, rngs=rngs) for n in (HIDDEN, HEADS * HEAD, HEADS * HEAD))
            self.q, self.k, self.o = (
                nnx.Param(put(draw(*shape, seed=seed + i, dtype="float32") / 8, spec))
                for i, (shape, spec) in enumerate(
                    [
                        ((HIDDEN, HEADS * HEAD), P(None, "model")),
                        ((HIDDEN, HEADS * HEAD), P(None, "model")),
                        ((HEADS * HEAD, HIDDEN), P("model", None)),
                    ]
                )
            )
            for norm, spec in ((self.norm, P()), (self.q_norm, P("model")), (self.k_norm, P("model"))):
                norm.scale = nnx.Param(put(norm.scale[...], spec))

        def __call__(self, x: jax.Array) -> jax.Array:
            h = self.norm(x)
            q, k = self.q_norm(h @ self.q[...]), self.k_norm(h @ self.k[...])
            return x + jnp.einsum("btc,cd->btd", jnp.tanh(q * k), self.o[...], out_sharding=P("data", None, None))

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.first, self.second = Block(0), Block(10)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    return Model()


@pytest.mark.skipif(jax.local_device_count("cpu") < 8, reason="needs 8 CPU devices (jax_num_cpu_devices)")
def test_an_nnx_model_trains_on_an_explicit_mesh_as_with_flax() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")
    from pallas_norm.nnx import RMSNorm

    mesh = jax.make_mesh((4, 2), ("data", "model"), devices=jax.devices("cpu")[:8])
    x = jax.device_put(draw(8, 4, HIDDEN, dtype="float32"), NamedSharding(mesh, P("data")))

    def losses(kind: Any) -> tuple[list[float], str]:
        with jax.set_mesh(mesh):
            graph, state = nnx.split(attention_model(kind, mesh))

            @jax.jit
            def step(state: Any, x: Any) -> Any:
                def loss(state: Any) -> Any:
                    return jnp.mean((nnx.merge(graph, state)(x) - jnp.roll(x, 1, axis=-1)) ** 2)

                value, gradients = jax.value_and_grad(loss)(state)
                return value, jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients)

            text = step.lower(state, x).compile().as_text()
            found = []
            for _ in range(8):
                value, state = step(state, x)
                found.append(float(value))
            return found, text

    (ours, text), (theirs, _) = losses(RMSNorm), losses(nnx.RMSNorm)
    assert ours[-1] < 0.9 * ours[0]
    assert np.allclose(ours, theirs, rtol=1e-5)
    assert not [sizes for _, sizes, _ in MOVED.findall(text) if sizes.count(",") >= 2]  # no activation is gathered
