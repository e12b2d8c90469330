"""Sharded operands on two GPUs: the kernel runs on each one's rows, and the bits are those of one GPU.

Without GPUs two devices of a CPU stand in, and XLA's path: while only a machine with two GPUs ran these tests, one
was wrong from the day on which the suite got jax_numpy_rank_promotion="raise", and nobody saw it.
"""

from __future__ import annotations

import math
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
from tests.meshes import collectives, padded

pytestmark = pytest.mark.slow
ROWS, N = 1024, 4096
U32 = 2.0**-24  # half a unit in the last place of a float32
KINDS = {
    "explicit": (AxisType.Explicit,) * 2,
    "auto": (AxisType.Auto,) * 2,
    "explicit data, auto model": (AxisType.Explicit, AxisType.Auto),
    "auto data, explicit model": (AxisType.Auto, AxisType.Explicit),
}


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], autouse=True)
def platform(request: pytest.FixtureRequest) -> str:
    if request.param != jax.default_backend():
        pytest.skip(f"a rehearsal for machines without GPUs; this one's devices are {jax.devices()}")
    if len(jax.devices()) < 2:
        pytest.skip(f"needs two devices; this machine has {jax.devices()}")
    return request.param


def two_devices() -> list[Any]:
    return jax.devices()[:2]


@pytest.fixture(params=[AxisType.Explicit, AxisType.Auto], ids=str)
def mesh(request: pytest.FixtureRequest) -> Mesh:
    return jax.make_mesh((2,), ("data",), axis_types=(request.param,), devices=two_devices())


def mesh_of(kind: str, *, split: str) -> Mesh:
    """Of two axes, one of which has both devices."""
    shape = (2, 1) if split == "data" else (1, 2)
    return jax.make_mesh(shape, ("data", "model"), axis_types=KINDS[kind], devices=two_devices())


def operands() -> list[jax.Array]:
    """x, residual, dy; weight in float32, so that dweight shows its sum. Exact sums in any order."""
    draw = np.random.default_rng(0)
    x, residual = (jnp.asarray(draw.choice([-1.0, 1.0], (ROWS, N)), "bfloat16") for _ in range(2))
    dy = jnp.asarray(draw.integers(-3, 4, (ROWS, N)), "float32")
    return [x, residual, dy, jnp.asarray(draw.integers(1, 4, N), "float32")]


def forward(x: Any, residual: Any, dy: Any, weight: Any) -> Any:
    return rms_norm(x, weight), add_rms_norm(x, residual, weight)


def gradients(x: Any, residual: Any, dy: Any, weight: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](dy)


BY_ROWS, WHOLE = P("data", None), P()


def placed(mesh: Mesh, rows: P = BY_ROWS, weight: P = WHOLE) -> list[jax.Array]:
    return [jax.device_put(value, NamedSharding(mesh, weight if value.ndim == 1 else rows)) for value in operands()]


def add_gradients(x: Any, residual: Any, dy: Any, weight: Any) -> Any:
    return jax.vjp(add_rms_norm, x, residual, weight)[1]((dy, residual))


def elements(shape: str) -> int:
    """Of what a collective moves: f32[1024,1], or several that were combined into one, (f32[1024,1], f32[1024,1])."""
    return sum(math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"\[([\d,]+)\]", shape))


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.mark.parametrize("function", [forward, gradients])
def test_the_bits_of_two_gpus_are_those_of_one(mesh: Mesh, function: Callable[..., Any], platform: str) -> None:
    jitted = jax.jit(function)
    program = jitted.lower(*placed(mesh)).compile().as_text() or ""
    assert ("mosaic_gpu" in program) == (platform == "gpu")
    assert "all-gather" not in program  # every GPU works on its own rows
    assert ("all-reduce" in program) == (function is gradients)  # dweight alone is summed over the GPUs
    assert_equal(jitted(*placed(mesh)), jitted(*operands()))


def test_inside_shard_map(mesh: Mesh) -> None:
    @jax.jit
    def sharded(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.shard_map(rms_norm, mesh=mesh, in_specs=(P("data", None), P()), out_specs=P("data", None))(x, weight)

    x, _, _, weight = placed(mesh)
    assert_equal(sharded(x, weight), jax.jit(rms_norm)(*(operands()[i] for i in (0, 3))))


@pytest.mark.parametrize("function", [forward, gradients, add_gradients])
@pytest.mark.parametrize("split", ["data", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_axis_of_two_eager_and_jitted(kind: str, split: str, function: Callable[..., Any]) -> None:
    given = placed(mesh_of(kind, split=split), P(split, None))
    expected = jax.jit(function)(*operands())
    for way in (jax.jit(function), function):
        found = way(*given)
        if function is add_gradients:  # the sums of its rows are not exact, so only what each row gives is
            found, expected_now = found[:2], expected[:2]
        else:
            expected_now = expected
        assert_equal(found, expected_now)
        for value in jax.tree.leaves(found):
            if value.ndim == 2:
                assert padded(value) == (split, None)
    moved = {name for name, _ in collectives(function, *given)}
    assert moved == (set() if function is forward else {"all-reduce"})


@pytest.mark.parametrize("split", ["data", "model"])
@pytest.mark.parametrize("kind", KINDS)
def test_shard_map_over_some_axes(kind: str, split: str) -> None:
    mesh = mesh_of(kind, split=split)
    rows = P(split, None)
    x, residual, _, weight = placed(mesh, rows)
    expected = jax.jit(add_rms_norm)(*(operands()[i] for i in (0, 1, 3)))
    for manual in ({split}, {"data", "model"}):
        mapped = jax.shard_map(add_rms_norm, mesh=mesh, in_specs=(rows, rows, P()), out_specs=rows, axis_names=manual)
        assert_equal(jax.jit(mapped)(x, residual, weight), expected)
        assert collectives(mapped, x, residual, weight) == []


def test_the_gradient_inside_shard_map(mesh: Mesh) -> None:
    """The transpose of the replicated weight sums dweight over the GPUs, of exact sums here."""

    def local(x: Any, residual: Any, dy: Any, weight: Any) -> Any:
        return gradients(x, residual, dy, weight)

    rows = P("data", None)
    mapped = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=(rows, P())))
    assert_equal(mapped(*placed(mesh)), jax.jit(gradients)(*operands()))


@pytest.mark.parametrize("weight", [P("data"), P()], ids=["split weight", "whole weight"])
def test_fsdp(mesh: Mesh, weight: P) -> None:
    """A weight that lies split is gathered, never x; its gradient has the bits of one GPU."""
    given = placed(mesh, weight=weight)
    assert_equal(jax.jit(forward)(*given), jax.jit(forward)(*operands()))
    dx, dweight = jax.jit(gradients)(*given)
    assert_equal([dx, dweight], jax.jit(gradients)(*operands()))
    if mesh.axis_types == (AxisType.Explicit,):
        assert padded(dweight) == (*weight, None)[:1]
    for function in (forward, gradients):
        assert all(elements(shape) <= N for _, shape in collectives(function, *given))


def test_a_sharded_last_axis_is_not_gathered(mesh: Mesh) -> None:
    given = placed(mesh, P(None, "data"))
    moved = collectives(forward, *given)
    assert {name for name, _ in moved} == {"all-reduce"}
    assert sum(elements(shape) for _, shape in moved) <= 2 * ROWS  # two norms, a sum of each row
    x, _, _, weight = operands()
    y = jax.jit(forward)(*given)[0]
    # rstd may be the neighbour of the kernel's; of signs nothing of it is left in bfloat16.
    assert_equal(y, weight[None] * x.astype("float32"))
    dx, dweight = jax.jit(gradients)(*given)
    expected_dx, expected_dweight = jax.jit(gradients)(*operands())
    wide = np.asarray(expected_dx, np.float64)
    assert np.all(np.abs(np.asarray(dx, np.float64) - wide) <= 2.0**-7 * np.abs(wide) + N * U32)
    # Both add ROWS integers of at most 3, times unit, which is a few units in the last place off.
    assert np.all(np.abs(np.asarray(dweight, np.float64) - np.asarray(expected_dweight)) <= ROWS * 3 * 8 * U32)


def test_a_mesh_in_context(mesh: Mesh) -> None:
    """Operands from before it, and on it."""
    expected = jax.jit(forward)(*operands())
    with jax.set_mesh(mesh):
        for given in (operands(), placed(mesh)):
            assert_equal(jax.jit(forward)(*given), expected)
            assert_equal(forward(*given), expected)
            assert_equal(jax.jit(gradients)(*given), jax.jit(gradients)(*operands()))


def test_one_gpu_has_the_bits_of_the_other() -> None:
    found = [
        [
            jax.jit(function)(*(jax.device_put(value, device) for value in operands()))
            for function in (forward, gradients)
        ]
        for device in two_devices()
    ]
    for values, device in zip(found, two_devices(), strict=True):
        assert all(value.devices() == {device} for value in jax.tree.leaves(values))
    assert_equal(found[0], found[1])
