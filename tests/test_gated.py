"""rms_norm_gated and its gradients: every bit of y, dx and dgate is the oracle's, on every path."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import pallas_norm
from pallas_norm import rms_norm_gated
from tests import gated_oracle, oracle
from tests.gated_oracle import Gate
from tests.oracle import BF16, DTYPES, F32, Array
from tests.strategies import Case, examples, flushes, numbers

# Of the interpreter one for each way to read a row: a call takes seconds. Row lengths, and groups of each.
GROUPS = {
    "interpret": ((33, 1), (128, 1), (1000, 1), (1024, 3), (1025, 2), (2880, 1)),
    "xla": ((1, 1), (7, 3), (33, 1), (128, 1), (128, 4), (1000, 1), (1024, 3), (2880, 2), (4097, 1), (8192, 1)),
    "mosaic_gpu": (
        (33, 1),
        (128, 1),
        (1000, 1),
        (1024, 3),
        (1024, 8),
        (2880, 1),
        (4096, 2),
        (4097, 1),
        (8192, 1),
        (16384, 1),
    ),
}
VALUES = ("normal", "tiny", "integers", "sparse", "special")


@functools.cache
def _jitted(implementation: str, how: Gate, eps: float) -> Any:
    call = functools.partial(rms_norm_gated, **how._asdict(), eps=eps, implementation=implementation)

    def all_of(operands: dict[str, Any], dy: Any) -> tuple[Any, Any]:
        y, pullback = jax.vjp(lambda operands: call(**operands), operands)
        return y, pullback(dy)[0]

    return jax.jit(all_of)


def check(implementation: str, x: Array, gate: Array, weight: Array | None, how: Gate, eps: float = 1e-6) -> None:
    of_y = gated_oracle.results(x, gate, weight, None, how, eps, flushes=flushes(implementation)).y
    dy = np.random.default_rng(3).standard_normal(x.shape).astype(of_y.dtype)
    operands = {"x": x, "gate": gate} | ({} if weight is None else {"weight": weight})
    y, found = _jitted(implementation, how, eps)(operands, dy)
    oracle.assert_same(y, of_y)
    expected = gated_oracle.results(x, gate, weight, dy, how, eps, flushes=flushes(implementation))
    oracle.assert_same(found["x"], expected.dx)
    oracle.assert_same(found["gate"], expected.dgate)
    if weight is not None:
        assert found["weight"].dtype == weight.dtype
        assert expected.dweight is not None
        bound = expected.dweight_error + oracle.spacing(np.abs(expected.dweight), weight.dtype)
        finite = np.isfinite(expected.dweight)
        oracle.assert_within(np.asarray(found["weight"])[finite], expected.dweight[finite], bound[finite])


@st.composite
def drawn(draw: st.DrawFn, implementation: str) -> tuple[Case, int, str, Gate]:
    """(a case of whole rows, groups, the gate's dtype, options)."""
    size, groups = draw(st.sampled_from(GROUPS[implementation]))
    dtype = draw(st.sampled_from(tuple(DTYPES)))
    weight = draw(st.sampled_from((None, dtype, dtype, "f32")))
    of_gate = dtype if implementation != "xla" else draw(st.sampled_from((dtype, dtype, "f32")))
    case = Case(size * groups, draw(st.sampled_from((1, 5, 9))), dtype, weight, draw(st.sampled_from(VALUES)), 0)
    how = Gate(
        draw(st.sampled_from(("silu", "sigmoid"))),
        draw(st.booleans()),
        size,
        draw(st.booleans()),
        0.0 if weight is None else draw(st.sampled_from((0.0, 1.0))),
        draw(st.sampled_from((None, DTYPES[dtype].name))),
    )
    return case, groups, of_gate, how


@pytest.mark.sampled(2)
@examples(0.2)
@hypothesis.given(data=st.data())
def test_every_bit_is_the_oracles(implementation: str, data: st.DataObject) -> None:
    case, _, of_gate, how = data.draw(drawn(implementation))
    gate = (4 * case.rng(5).standard_normal((case.rows, case.n))).astype(DTYPES[of_gate])
    gate[0, : min(8, case.n)] = np.array([0, -0.0, 1, -1, 30, -30, 100, -100])[: case.n]
    check(implementation, numbers(case.rng(), gate.shape, case.dtype, case.values), gate, case.weight(), how)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("before", [True, False])
def test_a_row_with_a_nan_or_an_infinity_spoils_no_other(implementation: str, before: bool) -> None:  # noqa: FBT001
    rng = np.random.default_rng(4)
    x, gate = (rng.standard_normal((9, 128)).astype(BF16) for _ in range(2))
    x[1, 3], x[2, 0], gate[3, 5], gate[4, 127], gate[5, 1] = np.nan, np.inf, np.nan, -np.inf, np.inf
    y = np.asarray(rms_norm_gated(x, gate, norm_before_gate=before, implementation=implementation))
    expected = gated_oracle.results(x, gate, None, None, Gate(norm_before_gate=before), 1e-6, flushes=True).y
    oracle.assert_same(y, expected)
    assert np.isfinite(y[[0, 6, 7, 8]].astype(F32)).all()
    assert not any(np.isfinite(y[row].astype(F32)).all() for row in (1, 3, 4))


def test_a_large_gate_leaves_the_norm_as_it_is() -> None:
    case = Case(256, 5, "bf16", "bf16", "normal", seed=1)
    x, weight = case.x(), case.weight()
    gate = np.full(x.shape, 100, BF16)
    y = rms_norm_gated(x, gate, weight, activation="sigmoid")
    oracle.assert_same(y, pallas_norm.rms_norm(x, weight))
    oracle.assert_same(rms_norm_gated(x, gate, weight, activation="sigmoid", norm_before_gate=False), y)


def test_any_leading_axes_and_no_rows() -> None:
    case = Case(128, 12, "bf16", "bf16", "normal", seed=0)
    x, weight = case.x(), case.weight()
    gate = x[::-1]
    y = np.asarray(rms_norm_gated(x, gate, weight, group_size=64))
    for shape in ((3, 4, 128), (12, 1, 128), (2, 2, 3, 128)):
        shaped = rms_norm_gated(x.reshape(shape), gate.reshape(shape), weight, group_size=64)
        assert np.asarray(shaped).tobytes() == y.tobytes()
        assert shaped.shape == shape
    assert rms_norm_gated(x[0], gate[0], weight).shape == (128,)
    assert rms_norm_gated(x[:0], gate[:0], weight).shape == (0, 128)
    none = jax.grad(lambda w: jnp.sum(rms_norm_gated(x[:0], gate[:0], w).astype(F32)))(weight)
    assert not np.asarray(none, F32).any()


def test_vmap_is_a_loop() -> None:
    case = Case(128, 60, "bf16", "bf16", "normal", seed=7)
    x, weight = case.x().reshape(3, 4, 5, 128), case.weight()
    assert weight is not None
    gate, weights = x[::-1], np.stack([weight, -2 * weight, np.roll(weight, 1)])

    def call(x: Any, gate: Any, weight: Any) -> Any:
        y, pullback = jax.vjp(functools.partial(rms_norm_gated, group_size=64), x, gate, weight)
        return y, *pullback(jnp.ones_like(y))

    for axes in ((0, 0, None), (0, 0, 0), (0, None, None), (None, None, 0)):
        given = [v if axis == 0 else v[0] for v, axis in zip((x, gate, weights), axes, strict=True)]
        batched = jax.jit(jax.vmap(call, in_axes=axes))(*given)
        for i in range(3):
            member = [v[i if axis == 0 else 0] for v, axis in zip((x, gate, weights), axes, strict=True)]
            for many, one in list(zip(batched, call(*member), strict=True)):
                distance = np.abs(np.asarray(many[i], F32) - np.asarray(one, F32))
                assert distance.max() <= (0 if one.ndim > 1 else 2.0**-6 * np.abs(np.asarray(one, F32)).max())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_derivatives_are_those_of_the_formula(activation: str, before: bool) -> None:  # noqa: FBT001
    """First and second, beside JAX's own of the plain formula in float32."""
    rng = np.random.default_rng(2)
    x, gate, weight, dy = (rng.standard_normal(shape).astype(F32) for shape in ((5, 96), (5, 96), 96, (5, 96)))

    def plain(x: Any, gate: Any, weight: Any) -> Any:
        a = jax.nn.silu(gate) if activation == "silu" else jax.nn.sigmoid(gate)
        h = (x if before else x * a).reshape(5, 3, 32)
        unit = (h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6)).reshape(5, 96)
        return unit * weight[None] * a if before else unit * weight[None]

    def ours(x: Any, gate: Any, weight: Any) -> Any:
        return rms_norm_gated(x, gate, weight, activation=activation, norm_before_gate=before, group_size=32)

    def second(function: Any) -> Any:
        def total(*operands: Any) -> Any:
            gradients = jax.vjp(function, *operands)[1](dy)
            return sum(jnp.sum(gradient * gradient) for gradient in gradients)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(x, gate, weight)

    first = [jax.jit(lambda f=f: jax.vjp(f, x, gate, weight)[1](dy))() for f in (ours, plain)]
    for one, other in [*zip(*first, strict=True), *zip(second(ours), second(plain), strict=True)]:
        assert np.abs(np.asarray(one - other)).max() <= 2e-6 * np.abs(np.asarray(other)).max()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no gate": ({"gate": None}, TypeError, "gate is None; needed an array: call rms_norm where there is no gate"),
    "a gate of another shape": (
        {"gate": np.ones((2, 1), BF16)},
        ValueError,
        "gate is bfloat16[2,1] but x is bfloat16[2,192]; needed the same shape: broadcast it first",
    ),
    "a gate of another dtype": (
        {"gate": np.ones((2, 192), np.int8)},
        TypeError,
        "gate is int8[2,192]; needed one of bfloat16, float16, float32: cast it with astype first",
    ),
    "activation": ({"activation": "gelu"}, ValueError, 'activation is \'gelu\'; needed "silu" or "sigmoid"'),
    "a number": ({"activation": 3}, TypeError, 'activation is int; needed "silu" or "sigmoid"'),
    "no activation": ({"activation": None}, TypeError, 'activation is NoneType; needed "silu" or "sigmoid"'),
    "norm_before_gate": ({"norm_before_gate": 1}, TypeError, "norm_before_gate is int; needed True or False"),
    "group type": ({"group_size": 64.0}, TypeError, "group_size is float; needed None or an int"),
    "group": (
        {"group_size": 128},
        ValueError,
        "group_size is 128 but the last axis of x has length 192; needed a number that divides it: pass "
        "group_size=None to normalise whole rows",
    ),
    "group of none": (
        {"group_size": 0},
        ValueError,
        "group_size is 0 but the last axis of x has length 192; needed a number that divides it: pass group_size=None "
        "to normalise whole rows",
    ),
    "out_dtype": ({"out_dtype": jnp.int8}, TypeError, "out_dtype is int8; needed one of bfloat16, float16, float32"),
    "a kernel of short groups": (
        {"group_size": 64, "weight": np.ones(192, BF16), "implementation": "interpret"},
        NotImplementedError,
        'implementation="interpret" cannot run: rows of 64 elements share a warpgroup, which keeps one weight, and '
        "there are 3; pass implementation=None to let XLA compile the reference",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_told(name: str) -> None:
    options, error, message = WRONG[name]
    with pytest.raises(error) as raised:
        rms_norm_gated(np.ones((2, 192), BF16), **{"gate": np.ones((2, 192), BF16)} | options)
    assert str(raised.value) == message


def test_a_gate_of_another_dtype_has_no_backward_kernel() -> None:
    x, gate = np.ones((2, 128), BF16), np.ones((2, 128), F32)
    with pytest.raises(NotImplementedError) as raised:
        jax.grad(lambda x: jnp.sum(rms_norm_gated(x, gate, implementation="interpret").astype(F32)))(jnp.asarray(x))
    assert str(raised.value) == (
        'implementation="interpret" cannot run: the backward kernel takes x and gate of one dtype, and they are '
        "bfloat16 and float32; pass implementation=None to let XLA compile the reference"
    )
