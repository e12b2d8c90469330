"""Meshes of jax.make_mesh, Explicit (its default) and Auto, on 8 virtual CPU devices: eager and jitted, under set_mesh,
inside shard_map over some axes, two in one program, none but an abstract one. Bits and shardings as on one device.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.skipif(
    jax.local_device_count("cpu") < 8 or jax.default_backend() != "cpu",
    reason="needs 8 CPU devices (jax.config jax_num_cpu_devices) and no other backend",
)
COLLECTIVE = re.compile(
    r"= \(?(\w+\[[\d,]*\]).*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)
NAMES = ("data", "model")
KINDS = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit data, auto model": (AxisType.Explicit, AxisType.Auto),
    "auto data, explicit model": (AxisType.Auto, AxisType.Explicit),
}
BY_ROWS = {
    "batch": P("data"),
    "sequence": P(None, "data"),
    "batch and sequence": P("data", "model"),
    "batch over both axes": P(("data", "model")),
    "nothing": P(),
}
U32 = 2.0**-24
ROWS, N = 8 * 16, 256


def mesh_of(kind: str) -> Any:
    return jax.make_mesh((4, 2), NAMES, axis_types=KINDS[kind], devices=jax.devices("cpu")[:8])


def draw(*shape: int, seed: int, dtype: str = "bfloat16") -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


# Small integers: sums of their squares are exact, so no order of additions, XLA's or that of shards, changes a bit.
X, RESIDUAL = np.round(draw(8, 16, N, seed=0)), np.round(draw(8, 16, N, seed=1))
WEIGHT = draw(N, seed=2, dtype="float32")  # so that dweight shows its sum, not its last rounding
DY, DS = draw(8, 16, N, seed=3, dtype="float32"), draw(8, 16, N, seed=4)
DWEIGHT_BOUND = 2 * ROWS * U32 * 16 * np.sum(np.abs(DY), axis=(0, 1))  # as in test_sharding.py


def norm(x: Any, residual: Any, weight: Any, dy: Any, ds: Any) -> Any:
    del dy, ds
    return rms_norm(x, weight), *add_rms_norm(x, residual, weight, return_rstd=True)


def gradient(x: Any, residual: Any, weight: Any, dy: Any, ds: Any) -> Any:
    return jax.vjp(add_rms_norm, x, residual, weight)[1]((dy, ds))


def second(x: Any, residual: Any, weight: Any, dy: Any, ds: Any) -> Any:
    del residual

    def first(x: Any, weight: Any, dy: Any) -> Any:
        return jax.vjp(rms_norm, x, weight)[1](dy)

    return jax.vjp(first, x, weight, dy)[1]((ds, weight))


OPERANDS = (X, RESIDUAL, WEIGHT, DY, DS)


WHOLE = P()


def placed(mesh: Any, spec: P, *operands: Any, weight: P = WHOLE) -> list[Any]:
    def allowed(value: Any) -> P:
        return spec if value.ndim > 1 else weight

    return [jax.device_put(value, NamedSharding(mesh, allowed(value))) for value in operands]


def padded(value: Any) -> tuple[Any, ...]:
    return (*value.sharding.spec, *[None] * value.ndim)[: value.ndim]


def collectives(function: Callable[..., Any], *operands: Any) -> list[tuple[str, str]]:
    found = COLLECTIVE.findall(jax.jit(function).lower(*operands).compile().as_text())
    return sorted((name, shape) for shape, name in found)


def assert_equal(ours: Any, theirs: Any) -> None:
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert own.dtype == other.dtype
        assert np.array_equal(own, other)


def assert_close(own: Any, other: Any, bound: Any) -> None:
    assert np.all(np.abs(np.asarray(own, np.float64) - np.asarray(other, np.float64)) <= bound)


def of_every_kind(test: Any) -> Any:
    """JAX itself cannot split an axis over an Auto axis first and an Explicit one then: it forgets the first."""
    cases = [
        pytest.param(kind, spec, id=f"{kind}: {name}")
        for kind in KINDS
        for name, spec in BY_ROWS.items()
        if not (kind == "auto data, explicit model" and name == "batch over both axes")
    ]
    return pytest.mark.parametrize(("kind", "spec"), cases)(test)


@pytest.mark.sampled(4)
@of_every_kind
def test_rows_shared_out_over_any_axes_give_the_same_bits_without_communication(kind: str, spec: P) -> None:
    operands = placed(mesh_of(kind), spec, *OPERANDS)
    expected = jax.jit(norm)(*OPERANDS)
    for function in (jax.jit(norm), norm):
        results = function(*operands)
        assert_equal(results, expected)
        for value in results:
            assert padded(value) == (*spec, None, None, None)[: value.ndim]
    assert collectives(norm, *operands) == []


@pytest.mark.sampled(4)
@of_every_kind
def test_the_gradient_sums_dweight_in_float32_and_moves_nothing_else(kind: str, spec: P) -> None:
    operands = placed(mesh_of(kind), spec, *OPERANDS)
    expected = jax.jit(gradient)(*OPERANDS)
    for function in (jax.jit(gradient), gradient):
        dx, dresidual, dweight = function(*operands)
        assert_equal([dx, dresidual], expected[:2])
        assert padded(dx) == (*spec, None, None, None)[:3]
        assert_close(dweight, expected[2], DWEIGHT_BOUND)
    assert set(collectives(gradient, *operands)) <= ({("all-reduce", f"f32[{N}]")} if spec else set())


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_one_device(kind: str) -> None:
    operands = placed(mesh_of(kind), BY_ROWS["batch and sequence"], *OPERANDS)
    expected = jax.jit(second)(*OPERANDS)
    for own, other in zip(jax.jit(second)(*operands), expected, strict=True):
        wide = np.asarray(other, np.float64)
        assert_close(own, wide, (N + ROWS) * (U32 if own.dtype == jnp.float32 else 2.0**-8) * np.abs(wide).max())


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_sharded_members_is_one_program(kind: str) -> None:
    mesh = mesh_of(kind)
    x, dy = placed(mesh, P("data"), X, DY)
    expected = jax.jit(rms_norm)(X, WEIGHT)
    shared = jax.vmap(rms_norm, in_axes=(0, None))
    weight = jax.device_put(WEIGHT, NamedSharding(mesh, P()))
    assert_equal(jax.jit(shared)(x, weight), expected)
    assert_equal(shared(x, weight), expected)
    assert collectives(shared, x, weight) == []
    weights = jax.device_put(draw(8, N, seed=5, dtype="float32"), NamedSharding(mesh, P("data")))
    y = jax.jit(jax.vmap(rms_norm))(x, weights)
    assert padded(y) == ("data", None, None)
    assert_equal(y, jnp.stack([rms_norm(X[i], np.asarray(weights)[i]) for i in range(8)]))

    def gradients(x: Any, weight: Any, dy: Any) -> Any:
        return jax.vjp(rms_norm, x, weight)[1](dy)

    assert collectives(jax.vmap(gradients), x, weights, dy) == []
    dx, dweight = jax.jit(jax.vmap(gradients))(x, weights, dy)
    assert padded(dx)[0] == padded(dweight)[0] == "data"
    for i in range(8):
        alone = jax.jit(gradients)(X[i], np.asarray(weights)[i], DY[i])
        assert_equal(np.asarray(dx)[i], alone[0])
        assert_close(np.asarray(dweight)[i], alone[1], DWEIGHT_BOUND)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [P(), P("data")])
def test_a_mesh_in_context_and_operands_from_before_it(kind: str, spec: P) -> None:
    """NumPy arrays, arrays of one device, data made in the program, constraints: nothing of the op may take the mesh in
    context for its own."""
    mesh, expected = mesh_of(kind), jax.jit(norm)(*OPERANDS)
    before = [jnp.asarray(value) for value in OPERANDS]
    with jax.set_mesh(mesh):
        for operands in (OPERANDS, before):
            assert_equal(norm(*operands), expected)
            assert_equal(jax.jit(norm)(*operands), expected)
            gradient(*operands)
            jax.jit(gradient)(*operands)
        on_mesh = placed(mesh, spec, *OPERANDS)
        assert_equal(jax.jit(norm)(*on_mesh), expected)
        assert_equal(jax.jit(gradient)(*on_mesh)[0], jax.jit(gradient)(*OPERANDS)[0])
        made = jax.jit(lambda: rms_norm(jnp.ones((8, N)) * 2, jnp.ones(N)))()
        assert np.all(np.abs(made - 1) < 1e-5)
        if kind == "auto":
            constrained = jax.jit(lambda x, w: rms_norm(jax.lax.with_sharding_constraint(x, P("data")), w))
            assert_equal(constrained(before[0], before[2]), expected[0])


@pytest.mark.parametrize("implementation", ["xla", "interpret", None])
def test_auto_axes_inside_explicit_ones(implementation: Any) -> None:
    mesh = mesh_of("explicit")
    x, weight = placed(mesh, P("data"), X, WEIGHT)
    with jax.set_mesh(mesh):
        f = jax.sharding.auto_axes(
            lambda x, w: rms_norm(x, w, implementation=None if implementation == "interpret" else implementation)
        )
        assert_equal(jax.jit(lambda x, w: f(x, w, out_sharding=P("data")))(x, weight), jax.jit(rms_norm)(X, WEIGHT))
    assert_equal(rms_norm(x, weight, implementation=implementation), rms_norm(X, WEIGHT, implementation=implementation))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("manual", [{"data"}, {"model"}, {"data", "model"}], ids=lambda axes: "+".join(sorted(axes)))
def test_shard_map_over_some_axes_runs_on_local_rows(kind: str, manual: set[str], check_vma: bool) -> None:  # noqa: FBT001
    if kind == "auto data, explicit model" and len(manual) == 2:
        pytest.skip("JAX cannot place an axis split over an Auto axis first and an Explicit one then")
    mesh = mesh_of(kind)
    rows = P(tuple(sorted(manual)))
    mapped = jax.shard_map(
        add_rms_norm,
        mesh=mesh,
        in_specs=(rows, rows, P()),
        out_specs=rows,
        axis_names=manual,
        check_vma=check_vma,
    )
    expected = jax.jit(add_rms_norm)(X, RESIDUAL, WEIGHT)
    operands = placed(mesh, rows, X, RESIDUAL, WEIGHT)
    assert_equal(jax.jit(mapped)(*operands), expected)
    assert collectives(mapped, *operands) == []


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_two_meshes_in_one_program(kind: str) -> None:
    one = mesh_of(kind)
    other = jax.make_mesh((2, 4), ("a", "b"), axis_types=KINDS[kind], devices=jax.devices("cpu")[:8])
    (x,) = placed(one, P("data"), X)
    (again,) = placed(other, P("b"), X)
    results = jax.jit(lambda x, y: (rms_norm(x), rms_norm(y)))(x, again)
    assert_equal(results, (jax.jit(rms_norm)(X),) * 2)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_abstract_mesh_is_enough_to_lower(kind: str, platform: str) -> None:
    mesh = jax.sharding.AbstractMesh((4, 2), NAMES, axis_types=KINDS[kind])
    operands = [
        jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, P("data") if value.ndim > 1 else P())
        )
        for value in OPERANDS
    ]
    text = jax.jit(gradient).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    kernels = text.count("custom_call @mosaic_gpu") + text.count("custom_call @pallas_norm")
    assert kernels == (2 if "auto" in kind else 0 if platform == "cpu" else 3)


def test_an_explicit_mesh_of_one_device() -> None:
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
    operands = placed(mesh, P("data"), *OPERANDS)
    assert_equal(norm(*operands), jax.jit(norm)(*OPERANDS))
    assert_equal(gradient(*operands), jax.jit(gradient)(*OPERANDS))
    text = jax.jit(gradient).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


@pytest.mark.parametrize("weight", [P("data"), P("model"), P(("data", "model"))])
def test_a_weight_that_lies_split_keeps_rows_where_they_are(weight: P) -> None:
    """FSDP: the weight is gathered, never x; its gradient lies as it does."""
    operands = placed(mesh_of("explicit"), P("data"), *OPERANDS, weight=weight)
    assert_equal(jax.jit(norm)(*operands), jax.jit(norm)(*OPERANDS))
    dx, _, dweight = jax.jit(gradient)(*operands)
    assert_equal(dx, jax.jit(gradient)(*OPERANDS)[0])
    assert padded(dweight) == (*weight, None)[:1]
    assert all("," not in shape for _, shape in collectives(gradient, *operands))


def test_operands_that_disagree_raise_what_the_sum_raises() -> None:
    mesh = mesh_of("explicit")
    x, residual = (jax.device_put(X, NamedSharding(mesh, spec)) for spec in (P("data"), P("model")))
    for function in (jnp.add, add_rms_norm):
        with pytest.raises(Exception, match="incompatible shardings"):
            function(x, residual)
    y, s = add_rms_norm(x, jax.device_put(X, NamedSharding(mesh, P(None, "model"))))
    assert padded(y) == padded(s) == ("data", "model", None)
    assert_equal(s, add_rms_norm(X, X)[1])


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_a_weight_from_before_the_mesh_goes_with_rows_on_it(kind: str) -> None:
    """Outside jit nothing may move it: only a program knows the devices."""
    (x,) = placed(mesh_of(kind), P("data"), X)
    weight = jnp.asarray(WEIGHT)

    def gradients(x: Any, weight: Any) -> Any:
        y, pullback = jax.vjp(rms_norm, x, weight)
        return pullback(y)

    expected = jax.jit(gradients)(X, WEIGHT)
    for function in (gradients, jax.jit(gradients)):
        dx, dweight = function(x, weight)
        assert_equal(dx, expected[0])
        assert padded(dx) == ("data", None, None)
        assert_close(dweight, expected[1], 2 * ROWS * U32 * 16 * ROWS * np.abs(WEIGHT).max() * 16)
    assert_equal(rms_norm(x, weight), rms_norm(X, WEIGHT))
    assert jax.vmap(rms_norm, in_axes=(0, None))(x, weight).shape == X.shape
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(rms_norm, (x, weight), (x, weight))
