"""Rows whose last axis is split over devices: nothing is gathered, the devices tell each other one number a row."""

from __future__ import annotations

import re
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
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\(")
ROWS, N = 32, 256
U32 = 2.0**-24
SPECS = {
    "columns": P(None, "model"),
    "rows and columns": P("data", "model"),
    "columns over both axes": P(None, ("data", "model")),
}


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind), devices=jax.devices("cpu")[:8])


def draw(*shape: int, seed: int, dtype: str = "float32") -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def operands(dtype: str) -> tuple[Any, ...]:
    """x, residual, weight, dy, ds; the sums of squares are exact in any order."""
    x, residual = (np.round(2 * draw(ROWS, N, seed=seed)).astype(jnp.dtype(dtype)) for seed in (0, 1))
    return x, residual, draw(N, seed=2), draw(ROWS, N, seed=3), draw(ROWS, N, seed=4, dtype=dtype)


def all_of(*operands: Any, axis_name: Any = None) -> Any:
    x, residual, weight, dy, ds = operands

    def norm(x: Any, residual: Any, weight: Any) -> Any:
        return add_rms_norm(x, residual, weight, axis_name=axis_name)

    results, pullback = jax.vjp(norm, x, residual, weight)
    return (*results, *pullback((dy, ds)))


def check(found: Any, expected: Any, dtype: str) -> None:
    y, s, dx, dresidual, dweight = found
    for own, other in ((y, expected[0]), (s, expected[1])):
        assert own.dtype == other.dtype
        assert np.array_equal(own, other)
    step = float(jnp.finfo(dtype).eps)
    for own, other in ((dx, expected[2]), (dresidual, expected[3])):
        wide = np.asarray(other, np.float64)
        # mean(g * unit) in another order: at most N roundings of a mean of products below 64; then one step of dx.
        assert np.all(np.abs(np.asarray(own, np.float64) - wide) <= step * np.abs(wide) + N * U32 * 64)
    bound = 2 * ROWS * U32 * 16 * np.sum(np.abs(operands(dtype)[3]), axis=0)
    assert np.all(np.abs(np.asarray(dweight) - np.asarray(expected[4])) <= bound)


def moved(function: Any, *placed: Any) -> list[tuple[str, str]]:
    return [(name, shape) for shape, name in COLLECTIVE.findall(jax.jit(function).lower(*placed).compile().as_text())]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_forward_and_backward_reduce_one_number_a_row(kind: AxisType, spec: P, dtype: str) -> None:
    mesh, given = mesh_of(kind), operands(dtype)
    placed = [jax.device_put(v, NamedSharding(mesh, spec if v.ndim == 2 else P(spec[1]))) for v in given]
    found = jax.jit(all_of)(*placed)
    check(found, jax.jit(all_of)(*given), dtype)
    for value in found:
        assert (*value.sharding.spec, None)[: value.ndim] == (tuple(spec) if value.ndim == 2 else (spec[1],))
    collectives = moved(all_of, *placed)
    assert {name for name, _ in collectives} == {"all-reduce"}
    rows = ROWS // (2 if spec[0] else 1)
    for _, shape in collectives:  # of (rows, 1), and of dweight's columns where rows are shared out too
        sizes = [
            int(np.prod([int(size) for size in one.split(",") if size])) for one in re.findall(r"\[([\d,]*)\]", shape)
        ]
        assert all(size in (rows, N // 4) for size in sizes), shape


@pytest.mark.sampled(8)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("axis", ["model", ("data", "model")])
def test_shard_map_names_the_axis(axis: Any, dtype: str, check_vma: bool) -> None:  # noqa: FBT001
    mesh, given = mesh_of(AxisType.Explicit), operands(dtype)
    rows, columns = P(None, axis), P(axis)
    specs = (rows, rows, columns, rows, rows)
    mapped = jax.shard_map(
        lambda *operands: all_of(*operands, axis_name=axis),
        mesh=mesh,
        in_specs=specs,
        out_specs=(rows, rows, rows, rows, columns),
        check_vma=check_vma,
    )
    placed = [jax.device_put(v, NamedSharding(mesh, s)) for v, s in zip(given, specs, strict=True)]
    check(jax.jit(mapped)(*placed), jax.jit(all_of)(*given), dtype)
    assert {name for name, _ in moved(mapped, *placed)} == {"all-reduce"}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_second_derivatives_of_split_rows(kind: AxisType) -> None:
    x, _, weight, dy, ddx = operands("float32")
    mesh = mesh_of(kind)

    def second(x: Any, weight: Any, dy: Any, ddx: Any, axis_name: Any = None) -> Any:
        def first(x: Any, weight: Any, dy: Any) -> Any:
            return jax.vjp(lambda x, weight: rms_norm(x, weight, axis_name=axis_name), x, weight)[1](dy)

        return jax.vjp(first, x, weight, dy)[1]((ddx, weight))

    expected = jax.jit(second)(x, weight, dy, ddx)
    rows = P(None, "model")
    placed = [jax.device_put(v, NamedSharding(mesh, rows if v.ndim == 2 else P("model"))) for v in (x, weight, dy, ddx)]
    mapped = jax.shard_map(
        lambda *operands: second(*operands, axis_name="model"),
        mesh=mesh,
        in_specs=(rows, P("model"), rows, rows),
        out_specs=(rows, P("model"), rows),
    )
    for function in (second, mapped):
        for own, other in zip(jax.jit(function)(*placed), expected, strict=True):
            wide = np.asarray(other, np.float64)
            assert np.all(np.abs(np.asarray(own, np.float64) - wide) <= (N + ROWS) * U32 * np.abs(wide).max())


def test_weights_and_results_of_members_whose_rows_are_split() -> None:
    mesh = mesh_of(AxisType.Explicit)
    x, weights = draw(2, 8, N, seed=0), draw(2, N, seed=1)
    placed = (
        jax.device_put(x, NamedSharding(mesh, P("data", None, "model"))),
        jax.device_put(weights, NamedSharding(mesh, P("data", "model"))),
    )
    y = jax.jit(jax.vmap(rms_norm))(*placed)
    assert tuple(y.sharding.spec) == ("data", None, "model")
    assert np.allclose(y, jax.vmap(rms_norm)(x, weights), rtol=1e-6)
    assert {name for name, _ in moved(jax.vmap(rms_norm), *placed)} == {"all-reduce"}


def test_a_forced_kernel_says_that_it_needs_whole_rows() -> None:
    mesh = mesh_of(AxisType.Explicit)
    x = jax.device_put(draw(8, N, seed=0), NamedSharding(mesh, P(None, "model")))
    with pytest.raises(NotImplementedError) as error:
        rms_norm(x, implementation="mosaic_gpu")
    assert str(error.value) == (
        'implementation="mosaic_gpu" cannot run: the rows are split over the mesh axes model, and a kernel needs whole '
        "rows; pass implementation=None, or gather the last axis of x first"
    )


def test_an_axis_name_is_a_name() -> None:
    with pytest.raises(TypeError) as error:
        rms_norm(draw(8, N, seed=0), axis_name=3)  # type: ignore[arg-type]
    assert str(error.value) == "axis_name is 3; needed the name of a mesh axis, or a tuple of names"


def test_an_axis_of_one_device_splits_nothing() -> None:
    """Then a kernel has the whole row."""
    mesh = jax.make_mesh((2, 1), ("data", "model"), devices=jax.devices("cpu")[:2])
    x, weight = draw(8, N, seed=0), draw(N, seed=1)
    placed = (
        jax.device_put(x, NamedSharding(mesh, P("data", "model"))),
        jax.device_put(weight, NamedSharding(mesh, P("model"))),
    )
    assert np.array_equal(rms_norm(*placed), rms_norm(x, weight))
    text = jax.jit(rms_norm).trace(*placed).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("bound", [True, False])
def test_an_axis_that_no_shard_map_has_is_told(bound: bool) -> None:  # noqa: FBT001
    """Under jax.vmap there was an AssertionError without words: its axis has members, not shards."""

    def call(x: Any) -> Any:
        return rms_norm(x, axis_name="model")

    x = jnp.ones((4, 3, 64))
    with pytest.raises(ValueError, match="axis_name") as raised:
        jax.vmap(call, axis_name="model")(x) if bound else call(x)
    assert str(raised.value) == (
        "axis_name is 'model', which is no mesh axis of a jax.shard_map around this call; needed one, over whose "
        "shards the rows are split: jax.vmap's axis_name has members, not shards"
    )
