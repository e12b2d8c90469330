"""Rotated heads in programs: under vmap, lowered for CUDA and elsewhere, and on several devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_norm import rms_norm_rope, rms_norm_rope_qkv
from tests import oracle
from tests.oracle import F32
from tests.rope_cases import NO_KERNEL, WIDTHS, operands
from tests.test_lowering import array, check


@pytest.mark.parametrize("implementation", ["xla", pytest.param("interpret", marks=pytest.mark.slow)])
def test_vmap_is_a_loop(implementation: Any) -> None:
    """Where members had one of the angles of their own, the kernel had its rows, and those of the first member of the
    other one, beyond whose end it read."""
    q, k, cos, sin, *rest = operands(64, (3, 2), (3, 2, 5), "bf16")
    many = np.stack([rest[0], -rest[0], 2 * rest[0]])
    of_tokens = [np.stack([one, -one, 2 * one]) for one in (cos, sin)]
    call = functools.partial(rms_norm_rope, implementation=implementation)
    for given, axes in (
        ((q, k, cos, sin, *rest), (0, 0, None, None, None, None)),
        ((q.swapaxes(0, 1), k, cos, sin, *rest), (1, 0, None, None, None, None)),
        ((q, k, *of_tokens, *rest), (0, 0, 0, 0, None, None)),
        ((q[0], k, cos, of_tokens[1], *rest), (None, 0, None, 0, None, None)),
        ((q[0], k[0], of_tokens[0], sin, *rest), (None, None, 0, None, None, None)),
        ((q, k[0], cos, sin, many, rest[1]), (0, None, None, None, 0, None)),
    ):
        if axes[4] == 0 and implementation == "interpret":
            continue  # a kernel has one weight for all rows, and says so
        batched = jax.vmap(call, in_axes=axes)(*given)
        for i in range(3):
            single = rms_norm_rope(
                *(one if at is None else np.take(one, i, axis=at) for one, at in zip(given, axes, strict=True)),
                implementation="xla",
            )
            for member, other in zip(batched, single, strict=True):
                oracle.assert_same(member[i], other)


@pytest.mark.sampled(21)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_it_lowers_to_one_kernel_for_cuda_and_to_none_elsewhere(dtype: str, n: int) -> None:
    given = [array(2, 7, heads, n, dtype=dtype) for heads in (5, 3)]
    rest = [*[array(7, n, dtype=dtype)] * 2, *[array(n, dtype=dtype)] * 2]
    check(rms_norm_rope, *given, *rest, kernels=1)
    fused = functools.partial(rms_norm_rope_qkv, q_heads=5, k_heads=2)
    check(lambda qkv, *rest: fused(qkv, *rest), array(2, 7, 8, n, dtype=dtype), *rest, kernels=1)


def test_heads_without_a_kernel_take_the_reference() -> None:
    for n in NO_KERNEL:
        given = [array(2, 7, heads, n, dtype="bfloat16") for heads in (5, 3)]
        check(rms_norm_rope, *given, *[array(7, n, dtype="bfloat16")] * 2, kernels=0)


def test_shard_map_runs_the_kernel_on_local_heads() -> None:
    q, k, *rest = operands(64, (8, 8), (4, 3), "bf16")
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "model"), devices=jax.devices("cpu")[:8], axis_types=auto)
    heads = P("data", None, "model")
    mapped = jax.shard_map(
        lambda *given: rms_norm_rope(*given),
        mesh=mesh,
        in_specs=(heads, heads, *[P()] * 4),
        out_specs=(heads, heads),
    )
    for one, other in zip(jax.jit(mapped)(q, k, *rest), rms_norm_rope(q, k, *rest), strict=True):
        oracle.assert_same(one, other)
    traced = jax.jit(mapped).trace(*(jax.ShapeDtypeStruct(one.shape, one.dtype) for one in (q, k, *rest)))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()

    def total(*given: Any) -> Any:
        return sum(jnp.sum(one.astype(F32)) for one in given)

    found = jax.jit(jax.grad(lambda *given: total(*mapped(*given)), argnums=(0, 4)))(q, k, *rest)
    expected = jax.jit(jax.grad(lambda *given: total(*rms_norm_rope(*given)), argnums=(0, 4)))(q, k, *rest)
    oracle.assert_same(found[0], expected[0])
    np.testing.assert_allclose(*(np.asarray(one[1], F32) for one in (found, expected)), rtol=2**-7)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_program_of_several_devices_is_the_reference(kind: Any) -> None:
    q, k, *rest = operands(64, (8, 8), (4, 3), "bf16")
    mesh = jax.make_mesh((2, 4), ("data", "model"), devices=jax.devices("cpu")[:8], axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        heads = jax.NamedSharding(mesh, P("data", None, "model"))
        placed = [*(jax.device_put(one, heads) for one in (q, k)), *map(jnp.asarray, rest)]
        for one, other in zip(jax.jit(rms_norm_rope)(*placed), rms_norm_rope(q, k, *rest), strict=True):
            oracle.assert_same(one, np.asarray(other))
        traced = jax.jit(rms_norm_rope).trace(*placed)
        assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cuda",)).as_text()
        forced = jax.jit(functools.partial(rms_norm_rope, implementation="mosaic_gpu")).trace(*placed)
        with pytest.raises(NotImplementedError) as raised:
            forced.lower(lowering_platforms=("cuda",))
    assert "the program is divided over devices, and this kernel runs inside shard_map only" in str(raised.value)


@pytest.mark.slow
def test_heads_whose_elements_are_split_are_gathered_on_explicit_axes() -> None:
    """Halves of a head meet: JAX refused to slice them where each device had one."""
    q, k, *rest = operands(64, (4, 2), (4, 3), "f32")

    def loss(q: Any, k: Any, weight: Any) -> Any:
        return sum(jnp.sum(jnp.sin(y)) for y in rms_norm_rope(q, k, *rest[:2], weight, rest[3]))

    expected, gradients = rms_norm_rope(q, k, *rest), jax.grad(loss, (0, 1, 2))(q, k, rest[2])
    mesh = jax.make_mesh((2, 4), ("data", "model"), devices=jax.devices("cpu")[:8])
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, P("data", None, None, "model"))
        columns = [jax.device_put(one, jax.NamedSharding(mesh, P(*[None] * (one.ndim - 1), "model"))) for one in rest]
        placed = jax.device_put(q, split), jax.device_put(k, split)
        for found in (rms_norm_rope(*placed, *rest), jax.jit(rms_norm_rope)(*placed, *columns)):
            for one, other in zip(found, expected, strict=True):
                assert one.sharding.spec == P("data", None, None, None)
                oracle.assert_same(one, other)
        dq, dk, dweight = jax.jit(jax.grad(loss, (0, 1, 2)))(*placed, rest[2])
        for one, other in zip((dq, dk), gradients[:2], strict=True):
            assert one.sharding.spec == split.spec
            oracle.assert_same(one, other)
        # A sum of 48 rows, of which each term is below 8, in another order.
        assert np.abs(np.asarray(dweight) - np.asarray(gradients[2])).max() <= 2 * 48 * 2.0**-24 * 48 * 8
