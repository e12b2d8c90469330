"""Programs for four GPUs, compiled ahead of time on a machine without one: their kernels and their collectives."""

from __future__ import annotations

import functools
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
from tests import aot

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=aot.missing() or "")
COLLECTIVE = re.compile(r"= (\S+|\(.*?\)) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\(")
KINDS = {
    "explicit": (AxisType.Explicit,) * 2,
    "auto": (AxisType.Auto,) * 2,
    "explicit data, auto model": (AxisType.Explicit, AxisType.Auto),
}
SHAPE, N = (8, 16, 256), 256


@functools.cache
def gpus() -> Any:
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("h200", platform="cuda", target_config=aot.H200, topology="1x1x4")
    return np.array(topology.devices)


def mesh_of(kind: str, shape: tuple[int, int] = (2, 2)) -> Mesh:
    return Mesh(gpus().reshape(shape), ("data", "model"), axis_types=KINDS[kind])


def structs(mesh: Mesh, rows: P, columns: P = P()) -> tuple[jax.ShapeDtypeStruct, ...]:  # noqa: B008
    def of(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    return of(SHAPE, rows), of((N,), columns), of(SHAPE, rows)


def gradient(x: Any, weight: Any, dy: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](dy)


def forward(x: Any, weight: Any, dy: Any) -> Any:
    return add_rms_norm(x, dy, weight, return_rstd=True)


def compiled(function: Callable[..., Any], *operands: Any) -> tuple[Any, list[tuple[str, list[int]]], int]:
    """The executable; its collectives, each with the sizes that it moves; the number of kernels."""
    done = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).compile()
    text = done.as_text()
    found = [
        (
            name,
            [int(np.prod([int(size) for size in one.split(",") if size])) for one in re.findall(r"\[([\d,]*)\]", what)],
        )
        for what, name in COLLECTIVE.findall(text)
    ]
    return done, found, len(re.findall(r'custom_call_target="mosaic_gpu', text))


@pytest.mark.parametrize("rows", [P("data", "model"), P("model"), P(None, "data"), P(("data", "model")), P()], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_gpu_runs_the_kernels_on_its_rows(kind: str, rows: P) -> None:
    mesh = mesh_of(kind)
    done, collectives, kernels = compiled(forward, *structs(mesh, rows))
    assert (collectives, kernels) == ([], 1)
    done, collectives, kernels = compiled(gradient, *structs(mesh, rows))
    assert kernels == 3
    assert all(name == "all-reduce" and sizes[0] == N for name, sizes in collectives)
    assert len(collectives) == (1 if rows else 0)
    assert ("f32" in done.as_text().split("all-reduce(")[0].rpartition("=")[2]) == bool(rows)  # before its one rounding
    dx, _ = done.output_shardings
    assert (*dx.spec, None, None, None)[:3] == (*rows, None, None, None)[:3]


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_a_weight_that_lies_split_is_gathered_and_x_is_not(kind: str) -> None:
    _, collectives, kernels = compiled(gradient, *structs(mesh_of(kind), P("data"), P("model")))
    assert kernels == 3
    assert collectives
    assert all(max(sizes) <= N for _, sizes in collectives)


@pytest.mark.parametrize("rows", [P(None, None, "model"), P("data", None, "model")], ids=str)
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_split_rows_are_not_gathered(kind: str, rows: P) -> None:
    _, collectives, kernels = compiled(gradient, *structs(mesh_of(kind), rows, P("model")))
    assert kernels == 0
    assert {name for name, _ in collectives} == {"all-reduce"}
    shared_out = 2 if rows[0] else 1
    assert all(set(sizes) <= {8 * 16 // shared_out, N // 2} for _, sizes in collectives)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_map_over_one_of_two_axes(kind: str) -> None:
    mesh = mesh_of(kind)
    specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": (P("data"), P())}
    mapped = jax.shard_map(gradient, mesh=mesh, axis_names={"data"}, **specs)
    done, collectives, kernels = compiled(mapped, *structs(mesh, P("data")))
    assert kernels == 3
    assert [name for name, _ in collectives] == ["all-reduce"]
    assert re.search(
        rf"= f32\[{N}\]\S* all-reduce\(", done.as_text()
    )  # the replicated weight's gradient, before rounding


@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_members_with_a_weight_each_stay_where_they_are(kind: str) -> None:
    mesh = mesh_of(kind)
    x, _, dy = structs(mesh, P("data"))
    weights = jax.ShapeDtypeStruct((8, N), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    done, collectives, kernels = compiled(jax.vmap(gradient), x, weights, dy)
    assert (collectives, kernels) == ([], 2)
    assert "while(" not in done.as_text()


def test_two_meshes_and_an_executable_that_can_be_stored() -> None:
    """jax.experimental.custom_partitioning wants one mesh, and puts what cannot be pickled into the executable."""
    from jax.experimental import serialize_executable

    one, other = mesh_of("auto"), mesh_of("auto", (4, 1))
    x, weight, _ = structs(one, P("data"))
    again, _, _ = structs(other, P("data"))
    done, collectives, kernels = compiled(lambda x, y, w: (rms_norm(x, w), rms_norm(y, w)), x, again, weight)
    assert (collectives, kernels) == ([], 2)
    payload, _, _ = serialize_executable.serialize(done)
    assert len(payload) > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_a_mesh_in_context_means_nothing_to_the_program_of_one_gpu(kind: str) -> None:
    """What is traced for one device while set_mesh's mesh was in context held calls to Sharding, which no GPU has."""
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        for function in (gradient, lambda x, weight, dy: gradient(jnp.sin(x), 2 * weight, dy)):
            _, collectives, kernels = compiled(function, *structs(mesh, P("data")))
            assert ([name for name, _ in collectives], kernels) == (["all-reduce"], 3)
        _, collectives, kernels = compiled(lambda: rms_norm(jnp.ones((8, N)), jnp.ones(N)))
        assert (collectives, kernels) == ([], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_a_shard_map_around_does_not_share_out_are_still_shared_out(kind: str) -> None:
    """In a shard_map over data the partitioner numbers those along model only: the all-reduce names all groups."""
    mesh = mesh_of(kind)
    specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": (P("data"), P())}
    mapped = jax.shard_map(gradient, mesh=mesh, axis_names={"data"}, **specs)
    done, collectives, kernels = compiled(mapped, *structs(mesh, P("data", "model")))
    assert kernels == 3
    assert {name for name, _ in collectives} == {"all-reduce"}
    assert all(sizes[0] == N for _, sizes in collectives)
    assert (*done.output_shardings[0].spec, None)[:1] == ("data",)


def test_spmd_axis_name_of_members_with_a_weight_each() -> None:
    mesh = mesh_of("auto")
    x, _, _ = structs(mesh, P("data"))
    weights = jax.ShapeDtypeStruct((8, N), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    done, collectives, kernels = compiled(jax.vmap(rms_norm, spmd_axis_name="data"), x, weights)
    assert (collectives, kernels) == ([], 1)
    assert tuple(done.output_shardings.spec)[:1] == ("data",)
