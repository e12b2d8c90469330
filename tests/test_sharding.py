"""Sharded operands on 8 virtual CPU devices: which collectives the compiled program has, and that no bit changes.

On a mesh with Auto axes; test_meshes.py has the other kinds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.skipif(
    jax.local_device_count("cpu") < 8 or jax.default_backend() != "cpu",
    reason="needs 8 CPU devices (jax.config jax_num_cpu_devices) and no other backend",
)
COLLECTIVE = re.compile(r"= \(?(\w+)\[.*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\(")
U32 = 2.0**-24  # half a unit in the last place of a float32
SHAPE = (8, 16, 256)
ROWS = 8 * 16

BY_ROWS = {
    "batch": P("data", None, None),
    "sequence": P(None, "data", None),
    "batch and sequence": P("data", "model", None),
    "batch over both axes": P(("data", "model"), None, None),
    "nothing": P(),
}
BY_COLUMNS = {
    "columns": P(None, None, "model"),
    "columns and sequence": P(None, "data", "model"),
    "columns over both axes": P(None, None, ("data", "model")),
}


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("cpu")[:8])


def draw(*shape: int, seed: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


# Small integers: sums of their squares are exact, so no order of additions, XLA's or that of shards, changes a bit.
X, RESIDUAL = jnp.round(draw(*SHAPE, seed=0)), jnp.round(draw(*SHAPE, seed=1))
WEIGHT = draw(256, seed=2, dtype="float32")  # so that dweight shows its sum, not its last rounding
DY, DS = draw(*SHAPE, seed=3, dtype="float32"), draw(*SHAPE, seed=4)
# dweight is a sum over the rows in another order: each of two sums is off by at most ROWS roundings of the sum of
# absolute values, and no |unit| is larger than sqrt(n).
DWEIGHT_BOUND = 2 * ROWS * U32 * 16 * np.sum(np.abs(DY), axis=(0, 1))


def forward(x: Any, residual: Any, weight: Any) -> Any:
    return add_rms_norm(x, residual, weight, return_rstd=True)


def gradient(x: Any, residual: Any, weight: Any, dy: Any, ds: Any) -> Any:
    return jax.vjp(add_rms_norm, x, residual, weight)[1]((dy, ds))


def run(function: Callable[..., Any], mesh: Mesh, spec: P, *operands: jax.Array) -> tuple[list[jax.Array], list[str]]:
    """The results, and the collectives of the compiled program, each with the dtype that it moves."""
    placed = [
        jax.device_put(value, NamedSharding(mesh, spec if value.ndim == 3 else P())) for value in operands
    ]  # fmt: skip
    compiled = jax.jit(function).lower(*placed).compile()
    found = [f"{name} {dtype}" for dtype, name in COLLECTIVE.findall(compiled.as_text())]
    return jax.tree.leaves(compiled(*placed)), sorted(found)


def names(collectives: list[str]) -> set[str]:
    return {collective.partition(" ")[0] for collective in collectives}


def assert_rows_equal(ours: list[jax.Array], theirs: Any) -> None:
    for own, other in zip(ours, jax.tree.leaves(theirs), strict=True):
        assert own.dtype == other.dtype
        assert np.array_equal(own, other)


def padded(sharding: Any, rank: int) -> tuple[Any, ...]:
    return (*sharding.spec, *[None] * rank)[:rank]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("spec", BY_ROWS.values(), ids=BY_ROWS)
def test_sharded_rows_need_no_collective_forward(mesh: Mesh, spec: P) -> None:
    (y, s, rstd), collectives = run(forward, mesh, spec, X, RESIDUAL, WEIGHT)
    assert collectives == []
    assert_rows_equal([y, s, rstd], forward(X, RESIDUAL, WEIGHT))
    for value in (y, s):
        assert padded(value.sharding, 3) == (*spec, None, None, None)[:3]
    assert padded(rstd.sharding, 2) == (*spec, None, None)[:2]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("spec", BY_ROWS.values(), ids=BY_ROWS)
def test_sharded_rows_need_one_float32_sum_of_dweight_backward(mesh: Mesh, spec: P) -> None:
    (dx, dresidual, dweight), collectives = run(gradient, mesh, spec, X, RESIDUAL, WEIGHT, DY, DS)
    sharded_axes = [axis for axis in spec if axis is not None]
    assert names(collectives) == ({"all-reduce"} if sharded_axes else set())
    assert {collective.partition(" ")[2] for collective in collectives} <= {"f32"}
    expected = gradient(X, RESIDUAL, WEIGHT, DY, DS)
    assert_rows_equal([dx, dresidual], expected[:2])
    assert np.all(np.abs(np.asarray(dweight) - np.asarray(expected[2])) <= DWEIGHT_BOUND)
    assert padded(dx.sharding, 3) == (*spec, None, None, None)[:3]


def test_dweight_of_a_bfloat16_weight_is_summed_before_it_is_rounded(mesh: Mesh) -> None:
    narrow = WEIGHT.astype("bfloat16")
    results, collectives = run(gradient, mesh, BY_ROWS["batch"], X, RESIDUAL, narrow, DY.astype("bfloat16"), DS)
    assert collectives == ["all-reduce f32"]
    expected = gradient(X, RESIDUAL, narrow, DY.astype("bfloat16"), DS)
    # A float32 sum that lands on the other side of a tie moves the result by one bfloat16 step, no further.
    own, other = (np.asarray(value).view(np.int16).astype(int) for value in (results[2], expected[2]))
    assert np.max(np.abs(own - other)) <= 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("spec", BY_COLUMNS.values(), ids=BY_COLUMNS)
def test_a_sharded_last_axis_is_not_gathered(mesh: Mesh, spec: P) -> None:
    """Each shard adds up its own columns; one number a row is all that the devices tell each other."""
    (y,), collectives = run(rms_norm, mesh, spec, X, WEIGHT)
    assert set(collectives) == {"all-reduce f32"}
    assert_rows_equal([y], rms_norm(X, WEIGHT))  # the sums are exact, in any order

    (dx, dresidual, dweight), collectives = run(gradient, mesh, spec, X, RESIDUAL, WEIGHT, DY, DS)
    assert "all-gather bf16" not in collectives
    expected = gradient(X, RESIDUAL, WEIGHT, DY, DS)
    # One bfloat16 step, where a float32 sum in another order lands on the other side of a tie.
    for own, other in ((dx, expected[0]), (dresidual, expected[1])):
        wide = np.asarray(other, np.float64)
        assert np.all(np.abs(np.asarray(own, np.float64) - wide) <= 2.0**-7 * np.abs(wide) + 256 * U32)
    assert np.all(np.abs(np.asarray(dweight) - np.asarray(expected[2])) <= DWEIGHT_BOUND)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_arrays_of_every_rank_can_be_sharded(mesh: Mesh, rank: int) -> None:
    x = X.reshape([(256 * ROWS,), (ROWS, 256), SHAPE, (2, 4, 16, 256)][rank - 1])
    if rank == 1:
        x = x[:256]
    placed = jax.device_put(x, NamedSharding(mesh, P("model")))
    assert np.array_equal(jax.jit(rms_norm)(placed, WEIGHT), rms_norm(x, WEIGHT))


def test_rows_in_eight_places_are_the_rows_in_one(mesh: Mesh) -> None:
    """The eager call, too, works where its operand lies."""
    placed = jax.device_put(X, NamedSharding(mesh, BY_ROWS["batch over both axes"]))
    y = rms_norm(placed, WEIGHT)
    assert len(y.sharding.device_set) == 8
    assert np.array_equal(y, rms_norm(X, WEIGHT))


# Pallas's interpreter gives values of which shard_map cannot tell over which axes they vary.
MAPPED = [("xla", True), ("xla", False), (None, True), (None, False), ("interpret", False)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("path", "check_vma"), MAPPED)
def test_shard_map_runs_on_local_rows(mesh: Mesh, path: Any, check_vma: bool) -> None:  # noqa: FBT001
    def local(x: Any, residual: Any, weight: Any) -> Any:
        return add_rms_norm(x, residual, weight, implementation=path)

    rows = P("data", "model")
    specs = {"in_specs": (rows, rows, P()), "out_specs": (rows, rows)}
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs))
    assert_rows_equal(jax.tree.leaves(mapped(X, RESIDUAL, WEIGHT)), add_rms_norm(X, RESIDUAL, WEIGHT))
    assert COLLECTIVE.findall(mapped.lower(X, RESIDUAL, WEIGHT).compile().as_text()) == []


# Not interpreted: the interpreter's memory is one for all devices, and where several run a kernel that has barriers, as
# the backward one has, JAX 0.12 fails with "Barrier remains allocated".
@pytest.mark.sampled(4)
@pytest.mark.parametrize(("path", "check_vma"), [case for case in MAPPED if case[0] != "interpret"])
def test_the_gradient_inside_shard_map_sums_dweight_over_the_shards(
    mesh: Mesh,
    path: Any,
    check_vma: bool,  # noqa: FBT001
) -> None:
    def local(x: Any, residual: Any, weight: Any, dy: Any, ds: Any) -> Any:
        def norm(*operands: Any) -> Any:
            return add_rms_norm(*operands, implementation=path)

        dx, dresidual, dweight = jax.vjp(norm, x, residual, weight)[1]((dy, ds))
        # With check_vma the transpose of the replicated weight's cast has summed already; without, nobody has.
        return dx, dresidual, dweight if check_vma else jax.lax.psum(dweight, ("data", "model"))

    rows = P("data", "model")
    specs = {"in_specs": (rows, rows, P(), rows, rows), "out_specs": (rows, rows, P())}
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs))
    dx, dresidual, dweight = mapped(X, RESIDUAL, WEIGHT, DY, DS)
    expected = gradient(X, RESIDUAL, WEIGHT, DY, DS)
    assert_rows_equal([dx, dresidual], expected[:2])
    assert np.all(np.abs(np.asarray(dweight) - np.asarray(expected[2])) <= DWEIGHT_BOUND)


def test_shard_map_lowers_to_the_kernel_for_cuda(mesh: Mesh) -> None:
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
    mapped = jax.jit(jax.shard_map(rms_norm, mesh=mesh, **specs))
    text = mapped.trace(X, WEIGHT).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
