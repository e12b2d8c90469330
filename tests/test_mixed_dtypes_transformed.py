"""Mixed dtypes where a call is transformed or becomes a program: vmap, several devices, second derivatives, exports."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import add_rms_norm, rms_norm
from tests import oracle
from tests.mixed_dtypes import TRAINED, Mix, call, check, draw
from tests.oracle import BF16, F32, Array


def test_a_float32_unit_has_two_names_and_one_program() -> None:
    x, weight = (draw(Mix("bf16", None, "bf16"))[name] for name in ("x", "weight"))
    texts = {
        jax.jit(functools.partial(rms_norm, **options)).lower(x, weight).as_text()
        for options in ({"unit_dtype": "float32"}, {"cast_before_scale": False}, {"unit_dtype": np.float32})
    }
    assert len(texts) == 1
    assert rms_norm(x, weight, cast_before_scale=False, unit_dtype="float32").dtype == BF16


@pytest.mark.sampled(10)
@pytest.mark.parametrize("mix", TRAINED, ids=str)
def test_members_with_and_without_weights_of_their_own_are_those_of_a_loop(mix: Mix) -> None:
    given = [draw(mix, 3, 64) for _ in range(2)]
    given[1] = {name: (2 * value.astype(F32)).astype(value.dtype) for name, value in given[0].items()}
    whole = {name: jnp.stack([one[name] for one in given]) for name in given[0]}
    loop = [call(mix, one, "xla") for one in given]
    batched = jax.vmap(functools.partial(call, mix, implementation="xla"))(whole)
    for name, value in batched.items():
        oracle.assert_same(value, np.stack([np.asarray(one[name]) for one in loop]))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("mix", TRAINED, ids=str)
def test_rows_on_four_devices_are_those_on_one_but_for_the_order_of_dweight(mix: Mix) -> None:
    devices = jax.devices("cpu")[:4]
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,), devices=devices)
    given = draw(mix, 16, 64)

    def placed(name: str, value: Array) -> jax.Array:
        spec = jax.P() if name == "weight" else jax.P("rows")
        return jax.device_put(value, jax.NamedSharding(mesh, spec))

    run = jax.jit(functools.partial(call, mix, implementation="xla"))
    with jax.set_mesh(mesh):
        spread = run({name: placed(name, value) for name, value in given.items()})
    check(mix, given, spread, "xla")
    assert "dweight" not in spread or spread["dweight"].sharding.spec == jax.P(None)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("mix", TRAINED[:6], ids=str)
def test_second_derivatives_are_of_the_dtypes_of_what_they_are_of(mix: Mix) -> None:
    given = {name: jnp.asarray(value) for name, value in draw(mix, 3, 64).items()}
    operands = {name: given[name] for name in ("x", "residual", "weight") if name in given}
    norm = rms_norm if mix.residual is None else add_rms_norm

    def loss(operands: dict[str, Any]) -> Any:
        y = norm(**operands, weight_offset=mix.weight_offset, **mix.dtypes)
        return sum(jnp.sum(one.astype(F32) ** 3) for one in jax.tree.leaves(y))

    def length(operands: dict[str, Any]) -> Any:
        return sum(jnp.sum(one.astype(F32) ** 2) for one in jax.tree.leaves(jax.grad(loss)(operands)))

    second = jax.jit(jax.grad(length))(operands)
    for name, value in second.items():
        assert value.dtype == operands[name].dtype
        assert np.isfinite(np.asarray(value).astype(F32)).all()
        assert (np.asarray(value) != 0).any()


def test_the_second_derivative_of_a_rounded_weight_is_not_rounded_on_the_way() -> None:
    given = draw(Mix("bf16", None, "f32", round_weight=True), 4, 64)
    x, dy = jnp.asarray(given["x"]), jnp.asarray(given["dy"])

    def dx(weight: Any) -> Any:
        return jax.vjp(lambda x: rms_norm(x, weight, round_weight=True, out_dtype="float32"), x)[1](dy.astype(F32))[0]

    second = np.asarray(jax.grad(lambda weight: jnp.sum(dx(weight).astype(F32)))(jnp.asarray(given["weight"])))
    assert second.dtype == F32
    assert (second.astype(BF16).astype(F32) != second).mean() > 0.9


def test_an_exported_program_keeps_the_dtypes() -> None:
    mix = TRAINED[5]
    given = {name: jnp.asarray(value) for name, value in draw(mix).items()}
    run = jax.jit(functools.partial(call, mix, implementation="xla"))
    again = jax.export.deserialize(jax.export.export(run)(given).serialize())
    for name, value in again.call(given).items():
        oracle.assert_same(value, np.asarray(run(given)[name]))
