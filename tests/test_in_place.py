"""in_place: the compiled program gives y the memory of a donated x, s that of the residual, and changes no value."""

from __future__ import annotations

import functools
import re
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import _compat, _dispatch, add_rms_norm, rms_norm
from pallas_norm.regimes import plan_for
from tests import gpus

BF16, F32 = jnp.bfloat16, jnp.float32
needs_references = pytest.mark.skipif(
    not _compat.takes_references(()), reason=f"jax {jax.__version__} has no kernels that write to their operands"
)
needs_gpu_description = pytest.mark.skipif(gpus.missing() is not None, reason=str(gpus.missing()))


def norm(x: Any, residual: Any, weight: Any, *, in_place: bool = True, **options: Any) -> Any:
    return add_rms_norm(x, residual, weight, in_place=in_place, **options)


def structs(rows: int, n: int, residual: Any = BF16, **options: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
    shapes = ((rows, n), BF16), ((rows, n), residual), ((n,), BF16)
    return tuple(jax.ShapeDtypeStruct(shape, dtype, **options) for shape, dtype in shapes)


def aliases(function: Any, *operands: jax.ShapeDtypeStruct) -> list[tuple[int, int]]:
    """(result, operand) of the kernel in the program that is lowered for CUDA."""
    text = function.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    (call,) = re.findall(r"custom_call @mosaic_gpu.*", text)
    found = re.findall(r"output_tuple_indices = \[(\d*)\], operand_index = (\d+)", call)
    return [(int(result or 0), int(operand)) for result, operand in found]


donating = functools.partial(jax.jit, donate_argnums=(0, 1))


@pytest.mark.sampled(3)
@needs_references
@pytest.mark.parametrize("n", [33, 128, 1000, 4096, 16384])
def test_the_lowered_kernel_writes_to_its_operands(n: int) -> None:
    rows = 3 * plan_for(n, "bfloat16", residual=True).block
    assert aliases(donating(norm), *structs(rows, n)) == [(0, 0), (1, 2)]
    assert aliases(donating(functools.partial(norm, in_place=False)), *structs(rows, n)) == []


@needs_references
def test_only_memory_of_the_same_dtype_is_taken() -> None:
    stream = structs(64, 4096, residual=F32)
    assert len(aliases(donating(functools.partial(norm, out_dtype=BF16)), *stream)) == 2
    assert len(aliases(donating(norm), *stream)) == 1  # y is float32
    assert len(aliases(donating(functools.partial(norm, s_dtype=F32, out_dtype=BF16)), *structs(64, 4096))) == 1
    assert aliases(donating(functools.partial(norm, s_dtype=F32)), *structs(64, 4096)) == []


@needs_references
@pytest.mark.parametrize(("rows", "n"), [(65, 128), (40, 65528)])
def test_rows_that_another_warp_may_still_read_are_not_written(rows: int, n: int) -> None:
    """Those that fill no block, which every warp holds, and those that are read twice."""
    assert aliases(donating(norm), *structs(rows, n)) == []
    with mock.patch.object(_dispatch, "may_be_in_place", return_value=True):  # the rule, and nothing else, says so
        assert len(aliases(donating(functools.partial(norm, eps=1e-5)), *structs(rows, n))) == 2


@needs_references
@needs_gpu_description
def test_the_compiled_program_copies_what_it_may_not_overwrite_and_nothing_else() -> None:
    options: Any = {"sharding": SingleDeviceSharding(gpus.described("H200")[0])}
    operands = structs(64, 4096, **options)

    def program(function: Any, **donation: Any) -> str:
        return jax.jit(function, **donation).trace(*operands).lower().compile().as_text()

    donated = program(norm, donate_argnums=(0, 1))
    assert "output_to_operand_aliasing={{0}: (0, {}), {1}: (2, {})}" in donated
    assert "input_output_alias={ {0}: (0, {}, may-alias), {1}: (1, {}, may-alias) }" in donated
    assert " copy(" not in donated
    kept = program(norm)
    assert kept.count(" copy(") == 2

    def used_later(x: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
        y, s = norm(x, residual, weight)
        return y, s, x * y

    assert " copy(" in program(used_later, donate_argnums=(0, 1))


@needs_references
@needs_gpu_description
def test_what_the_partitioner_divides_gets_memory_of_its_own() -> None:
    """Its callback lowers kernels without what resolves references: "Cannot lower jaxpr with effects", said XLA."""
    mesh = Mesh(np.array(gpus.described("H200", count=2)), ("rows",))
    rows, whole = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())
    placed = [
        jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding)
        for one, sharding in zip(structs(64, 4096), (rows, rows, whole), strict=True)
    ]
    text = donating(norm).trace(*placed).lower().compile().as_text()
    assert "mosaic_gpu" in text
    assert "output_to_operand_aliasing=" not in text


@needs_references
@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_divided_program_each_device_writes_to_its_own(*, check_vma: bool) -> None:
    """Pallas takes no references whose type says that they vary over a mesh: memory of their own, then."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))
    rows, whole = NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())
    specs: Any = {"in_specs": (P("rows"), P("rows"), P()), "out_specs": (P("rows"), P("rows"))}
    mapped = jax.shard_map(norm, mesh=mesh, check_vma=check_vma, **specs)
    placed = [
        jax.ShapeDtypeStruct(one.shape, one.dtype, sharding=sharding)
        for one, sharding in zip(structs(64, 4096), (rows, rows, whole), strict=True)
    ]
    assert len(aliases(donating(mapped), *placed)) == (0 if check_vma else 2)


@needs_references
def test_inside_other_programs() -> None:
    def steps(x: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
        def step(carry: Any, _: Any) -> Any:
            return norm(*carry, weight), None

        return jax.lax.cond(
            jnp.any(x > 0), lambda: jax.lax.scan(step, (x, residual), None, length=3)[0], lambda: (x, x)
        )

    assert len(aliases(donating(steps), *structs(64, 4096))) == 2
    assert len(aliases(donating(jax.vmap(norm, (0, 0, None))), *structs(64, 4096))) == 2
    checks = [jax.export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]
    exported = jax.export.export(donating(norm), platforms=["cuda"], disabled_checks=checks)(*structs(64, 4096))
    assert "output_operand_alias<" in exported.mlir_module()

    def loss(x: jax.Array, residual: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(norm)(x, residual, weight)[0].astype(F32))

    text = jax.jit(jax.grad(loss)).trace(*structs(64, 4096)).lower(lowering_platforms=("cuda",)).as_text()
    assert "output_operand_alias<" in text


@pytest.mark.sampled(2)
@pytest.mark.parametrize("implementation", [None, "interpret"])
def test_no_value_changes(implementation: Any) -> None:
    rng = np.random.default_rng(0)
    x, residual = (jnp.asarray(rng.standard_normal((8, 128)), BF16) for _ in range(2))
    weight = jnp.asarray(rng.standard_normal(128), BF16)

    def loss(x: jax.Array, residual: jax.Array, weight: jax.Array, *, in_place: bool) -> Any:
        y, s = norm(x, residual, weight, in_place=in_place, implementation=implementation)
        z = rms_norm(y, weight, in_place=in_place, implementation=implementation)
        return jnp.sum(z.astype(F32)) + jnp.sum(s.astype(F32)), (y, s, z)

    gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    found, expected = (
        jax.jit(functools.partial(gradients, in_place=flag))(x, residual, weight) for flag in (True, False)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.gpu
@needs_references
@pytest.mark.parametrize("n", [128, 1000, 4096, 16384])
def test_on_a_gpu_the_results_lie_where_the_operands_lay(n: int) -> None:
    rng = np.random.default_rng(n)
    rows = 40 * plan_for(n, "bfloat16", residual=True).block
    values = [rng.standard_normal((rows, n)) for _ in range(2)]
    weight = jnp.asarray(rng.standard_normal(n), BF16)
    expected = norm(*(jnp.asarray(value, BF16) for value in values), weight, in_place=False)
    x, residual = (jnp.asarray(value, BF16) for value in values)
    places = [array.unsafe_buffer_pointer() for array in (x, residual)]
    found = donating(norm)(x, residual, weight)
    assert [array.unsafe_buffer_pointer() for array in found] == places
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(one).view(np.uint16), np.asarray(other).view(np.uint16))
