"""pallas_norm.patch of NNX models and Equinox trees: what it replaces, what it leaves, and unpatch."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from tests.modules_compared import assert_close, draw
from tests.people_s_norms import equinox_norm, llama

# Flax's and Equinox's own norms, beside which ours stand, multiply what has other dtypes and ranks.
pytestmark = pytest.mark.usefixtures("implicit_promotion")


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


def test_what_ours_does_not_compute_is_still_computed_after_patch() -> None:
    """By Flax's and Equinox's statements, in place of an error that the model did not have."""
    nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")
    norm, over_members = nnx.RMSNorm(32, rngs=nnx.Rngs(0)), nnx.RMSNorm(32, axis_name="members", rngs=nnx.Rngs(0))
    x, mask = draw(4, 32, dtype="float32"), jnp.arange(32)[None] < 16

    def found() -> Any:
        mapped = jax.vmap(lambda x: over_members(x), axis_name="members")
        return norm(x, mask=mask), norm(x.astype("complex64")), mapped(x[:, None])

    own = found()
    for one in (norm, over_members):
        assert pallas_norm.patch(one)[1].replaced == {"flax RMSNorm": 1}
    assert_same(found(), own)


def test_what_ours_does_not_compute_is_computed_by_equinox_s() -> None:
    eqx = pytest.importorskip("equinox", reason="needs equinox (pip install equinox)")
    norm = eqx.nn.RMSNorm(32)
    patched, _ = pallas_norm.patch(norm)
    with jax.enable_x64(True):  # noqa: FBT003
        for dtype in ("int32", "complex64", "float64"):
            x = jnp.arange(32).astype(dtype)
            ours, theirs = patched(x), norm(x)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)
            assert patched(x, "state")[1] == "state"


def test_norms_in_a_block_that_is_named_after_them() -> None:
    eqx = pytest.importorskip("equinox", reason="needs equinox (pip install equinox)")

    class PreRMSNormBlock(eqx.Module):
        norms: Any
        linear: Any

    class RMSNormModel(eqx.Module):
        blocks: Any

    def block() -> Any:
        return PreRMSNormBlock([eqx.nn.RMSNorm(32)], eqx.nn.Linear(32, 32, key=jax.random.key(0)))

    model = RMSNormModel([block(), block()])
    patched, report = pallas_norm.patch(model)
    assert report.replaced == {"equinox RMSNorm": 2}
    assert [one.name for one in report.skipped] == ["", "blocks[0]", "blocks[1]"]
    restored, report = pallas_norm.unpatch(patched)
    assert report.restored == {"equinox RMSNorm": 2}
    assert jax.tree.structure(restored) == jax.tree.structure(model)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("setting", ["debug_nans", "debug_infs", "check_tracer_leaks", "transfer_guard"])
def test_what_looks_for_faults_of_a_program_finds_none_in_a_proof(setting: str) -> None:
    """As its variable sets it, for every thread: a context that a test enters is of its own thread alone."""
    norm, x = equinox_norm(llama), draw(4, 96, dtype="bfloat16")
    expected, name = norm(x), f"jax_{setting}"
    before = getattr(jax.config, name)
    jax.config.update(name, "disallow" if setting == "transfer_guard" else True)
    try:
        patched, report = pallas_norm.patch(norm)
        found = patched(x)
    finally:
        jax.config.update(name, before)
    assert report.replaced == {"PersonsRMSNorm": 1}
    assert np.array_equal(found, expected)
