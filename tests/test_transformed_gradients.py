"""Outputs and gradients through every transformation, to the bit: of operands whose sums are exact in any order.

Properties 18 and 31, on every path. Of other operands XLA orders a sum by the shapes of a program, and dweight of a
batch has another order than the sum of its parts; here no order changes a bit, so every difference is an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_norm
from tests import oracle, rewrites
from tests.oracle import F32
from tests.rewrites import Rewrite
from tests.strategies import Case

ROWS, N = 16, 128
Results = tuple[Any, Any, Any]  # y, dx, dweight in float32
Function = Callable[[Any, Any, Any], Results]


def gradients(implementation: str) -> Function:
    norm = functools.partial(pallas_norm.rms_norm, eps=0.0, implementation=implementation)

    def run(x: Any, weight: Any, dy: Any) -> Results:
        y, pullback = jax.vjp(norm, x, weight)
        return y, *pullback(dy)

    return run


def by_members(split: int, transform: Callable[[Function], Function], run: Function) -> Function:
    """The rows as `split` members, whose dweight are added up."""

    def call(x: Any, weight: Any, dy: Any) -> Results:
        def members(value: Any) -> Any:
            return value.reshape(split, -1, N)

        y, dx, dweight = transform(run)(members(x), weight, members(dy))
        return y.reshape(x.shape), dx.reshape(x.shape), jnp.sum(dweight, axis=0)

    return jax.jit(call)


def vmapped(run: Function) -> Function:
    return jax.vmap(run, in_axes=(0, None, 0))


def looped(run: Function) -> Function:
    return lambda x, weight, dy: jax.lax.map(lambda member: run(member[0], weight, member[1]), (x, dy))


def scanned(run: Function) -> Function:
    def call(x: Any, weight: Any, dy: Any) -> Results:
        def step(total: Any, member: Any) -> Any:
            y, dx, dweight = run(member[0], weight, member[1])
            return total + dweight, (y, dx)

        dweight, (y, dx) = jax.lax.scan(step, jnp.zeros((N,), F32), (x, dy))
        return y, dx, dweight[None]

    return call


def with_a_weight_each(run: Function) -> Function:
    def call(x: Any, weight: Any, dy: Any) -> Results:
        return jax.vmap(run)(x, jnp.tile(weight, (x.shape[0], 1)), dy)

    return call


def of_a_loss(implementation: str) -> Function:
    norm = functools.partial(pallas_norm.rms_norm, eps=0.0, implementation=implementation)

    def call(x: Any, weight: Any, dy: Any) -> Results:
        def loss(x: Any, weight: Any) -> tuple[Any, Any]:
            y = norm(x, weight)
            return jnp.sum(y * dy), y

        (_, y), (dx, dweight) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, weight)
        return y, dx, dweight

    return jax.jit(call)


def rematerialised(implementation: str, policy: Any = None) -> Function:
    norm = functools.partial(pallas_norm.rms_norm, eps=0.0, implementation=implementation)

    def run(x: Any, weight: Any, dy: Any) -> Results:
        y, pullback = jax.vjp(jax.checkpoint(norm, policy=policy), x, weight)
        return y, *pullback(dy)

    return jax.jit(run)


BY_ROWS, BY_COLUMNS = (P("data"), P()), (P(None, "data"), P("data"))


def devices(kind: AxisType = AxisType.Auto) -> Mesh:
    found = jax.devices()
    found = found[: 8 if len(found) >= 8 else 1]
    return jax.make_mesh((len(found),), ("data",), axis_types=(kind,), devices=found)


def sharded(run: Function, kind: AxisType = AxisType.Auto, specs: tuple[P, P] = BY_ROWS) -> Function:
    rows, columns = (NamedSharding(devices(kind), spec) for spec in specs)

    def call(x: Any, weight: Any, dy: Any) -> Results:
        return jax.jit(run)(jax.device_put(x, rows), jax.device_put(weight, columns), jax.device_put(dy, rows))

    return call


def in_shard_map(run: Function) -> Function:
    specs = {"in_specs": (P("data"), P(), P("data")), "out_specs": (P("data"), P("data"), P())}

    def local(x: Any, weight: Any, dy: Any) -> Results:
        y, dx, dweight = run(x, weight, dy)
        return y, dx, jax.lax.psum(dweight, "data")

    return jax.jit(jax.shard_map(local, mesh=devices(), check_vma=False, **specs))


SAVE_RSTD = jax.checkpoint_policies.save_only_these_names(pallas_norm.RSTD)
TRANSFORMS: dict[str, Callable[[str], Function]] = {
    "jit": lambda path: jax.jit(gradients(path)),
    "a loss": of_a_loss,
    "vmap": lambda path: by_members(4, vmapped, gradients(path)),
    "vmap over single rows": lambda path: by_members(ROWS, vmapped, gradients(path)),
    "vmap of jit": lambda path: by_members(4, vmapped, jax.jit(gradients(path))),
    "vmap, a weight each": lambda path: by_members(2, with_a_weight_each, gradients(path)),
    "nested vmap": lambda path: by_members(2, vmapped, by_members(2, vmapped, gradients(path))),
    "map": lambda path: by_members(2, looped, gradients(path)),
    "scan": lambda path: by_members(2, scanned, gradients(path)),
}
# Not interpreted: jax.checkpoint refuses the ordered callbacks that Pallas's GPU interpreter is made of, and its memory
# is one for all devices.
COMPILED: dict[str, Callable[[str], Function]] = {
    "remat": rematerialised,
    "remat that saves rstd": functools.partial(rematerialised, policy=SAVE_RSTD),
    "vmap of remat": lambda path: by_members(4, vmapped, rematerialised(path)),
    "rows on eight devices": lambda path: sharded(gradients(path)),
    "rows on an explicit mesh": lambda path: sharded(gradients(path), AxisType.Explicit),
    "remat on an explicit mesh": lambda path: sharded(rematerialised(path), AxisType.Explicit),
    "remat on eight devices": lambda path: sharded(rematerialised(path)),
    "shard_map": lambda path: in_shard_map(gradients(path)),
    "vmap in shard_map": lambda path: in_shard_map(by_members(2, vmapped, gradients(path))),
}


# No kernel takes a part of a row.
SPLIT: dict[str, Callable[[str], Function]] = {
    "columns on an explicit mesh": lambda path: sharded(gradients(path), AxisType.Explicit, BY_COLUMNS),
    "columns on an auto mesh": lambda path: sharded(gradients(path), AxisType.Auto, BY_COLUMNS),
}


def check(function: Function, dtype: str = "bf16") -> None:
    """Against NumPy, not against another program."""
    case = Case(N, ROWS, dtype, "f32", "normal", seed=0)
    x, weight, dy = case.exact()
    y, dx, dweight = map(np.asarray, function(*map(jnp.asarray, (x, weight, dy))))
    oracle.assert_same(y, x.astype(F32) * weight)
    rstd = np.ones(ROWS, F32)
    g = dy * weight
    mean = np.sum(g * x.astype(F32), axis=1, keepdims=True) / F32.type(N)
    oracle.assert_same(dx + 0, (g - x.astype(F32) * mean).astype(x.dtype) + 0)
    oracle.assert_within(dx, *oracle.input_gradient64(x, weight, rstd, dy, 0))
    oracle.assert_same(dweight + 0, np.sum(x.astype(F32) * dy, axis=0) + 0)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_the_eager_gradients_are_exact(implementation: str, dtype: str) -> None:
    check(gradients(implementation), dtype)


@pytest.mark.sampled(18)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transformation_changes_no_bit(implementation: str, name: str) -> None:
    check(TRANSFORMS[name](implementation))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("path", ["xla", pytest.param("mosaic_gpu", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", COMPILED)
def test_a_transformation_of_a_compiled_program_changes_no_bit(path: str, name: str) -> None:
    check(COMPILED[name](path))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SPLIT)
def test_splitting_rows_changes_no_bit_of_exact_sums(name: str) -> None:
    check(SPLIT[name]("xla"))


WRONG = {
    "dweight not summed over the devices": (
        Rewrite("_sharding", "lax.psum(sums, over) if over else sums", "sums"),
        "rows on an explicit mesh",
    ),
    "dweight of a member times another's dy": (
        Rewrite(
            "_transforms", "**spec.unit))(*rows.values())", "**spec.unit))(rows['x'], rows['rstd'], rows['dy'][::-1])"
        ),
        "vmap",
    ),
    "a member takes another's weight": (
        Rewrite("_transforms", "_scale_of_members(weight, results", "_scale_of_members(weight[::-1] * 3, results"),
        "vmap, a weight each",
    ),
    "a split row divided by its own columns": (
        Rewrite("_row_sum", "n * lax.psum(1, axis_name, axis_index_groups=axis_index_groups)", "n"),
        "columns on an explicit mesh",
    ),
    "the first shard's part of a row counted for all": (
        Rewrite("_sharding", "axis_name=spec.axis_name + split)", "axis_name=spec.axis_name)"),
        "columns on an explicit mesh",
    ),
    "dweight counted twice": (
        Rewrite("reference", "return jnp.sum(dy.astype(F32) * unit", "return 2 * jnp.sum(dy.astype(F32) * unit"),
        "scan",
    ),
}


@pytest.mark.sampled(6)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="needs several devices, which only the CPU tests have")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_transformation_is_seen(name: str) -> None:
    rewrite, transform = WRONG[name]
    with rewrites.rewritten(rewrite):
        function = (TRANSFORMS | COMPILED | SPLIT)[transform]("xla")
        with pytest.raises(AssertionError, match="differ"):
            check(function)
