"""What a call computes in a program that computes its operands, or goes on with its results, is what it computes alone.

XLA kept float32 for an operand of 16 bits that the same program computed, and contracted a float32 product with what
was added to it; which it does depends on shapes and on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import _compat, _held, add_rms_norm, rms_norm, rms_norm_gated, rms_norm_quantized, rms_norm_rope
from tests import oracle
from tests.rewrites import Rewrite, rewritten

ROWS, N = 64, 512
Case = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]  # before, the call, and after


def first(x: Any, *_: Any) -> Any:
    return x


def sums(x: Any, y: Any, *rest: Any) -> Any:
    return x + y, y, *rest


def dx(x: Any, y: Any, weight: Any) -> Any:
    return jax.vjp(rms_norm, y, weight)[1](x)[0]


def gated_gradients(x: Any, y: Any, weight: Any) -> Any:
    function = functools.partial(rms_norm_gated, norm_before_gate=False)
    return jax.vjp(function, x, y, weight)[1](y)[:2]


def rotated(x: Any, y: Any, weight: Any) -> Any:
    heads = x.reshape(ROWS, 4, N // 4)
    return rms_norm_rope(heads, heads, *y.reshape(ROWS, 4, N // 4)[:, :2].swapaxes(0, 1), *[weight[: N // 4]] * 2)


CASES: dict[str, Case] = {
    "a sum": (sums, lambda x, y, w: rms_norm(x, w), first),
    "a product": (lambda x, y, w: (x * y, y, w), lambda x, y, w: rms_norm(x, w), first),
    "a constant times x": (lambda x, y, w: (x * 0.3, y, w), lambda x, y, w: rms_norm(x, w), first),
    "a scaled residual": (lambda x, y, w: (x * 0.22, y, w), add_rms_norm, first),
    "a product with the weight": (lambda x, y, w: (x, y, w * 2.5), lambda x, y, w: rms_norm(x, w), first),
    "added afterwards": (lambda *given: given, lambda x, y, w: rms_norm(x, w), lambda y, x, r, w: r + y),
    "a gate": (sums, lambda x, y, w: rms_norm_gated(y, x, w), first),
    "a gate before": (
        sums,
        functools.partial(rms_norm_gated, norm_before_gate=False),
        lambda y, x, r, w: r + y,
    ),
    "heads": (sums, rotated, first),
    "8 bits": (sums, lambda x, y, w: rms_norm_quantized(x, w, return_y=True)[2], first),
    "a gradient": (sums, dx, lambda d, x, y, w: y + d),
    "gradients of a gate": (sums, gated_gradients, lambda d, x, y, w: (y + d[0], y + d[1])),
}


def in_one_program_and_in_three(case: Case, given: list[Any]) -> tuple[Any, Any]:
    before, call, after = (jax.jit(one) for one in case)
    operands = before(*given)
    found = call(*operands)
    alone = after(found, *operands)

    def whole(*given: Any) -> Any:
        operands = case[0](*given)
        return case[2](case[1](*operands), *operands)

    return jax.jit(whole)(*given), alone


def operands(dtype: str) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape)).astype(dtype) for shape in ((ROWS, N), (ROWS, N), (N,))]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_a_program_around_it_changes_no_bit(name: str, dtype: str) -> None:
    for one, other in zip(
        *map(jax.tree.leaves, in_one_program_and_in_three(CASES[name], operands(dtype))), strict=True
    ):
        oracle.assert_same(one, other)


def read_twice(x: Any, y: Any, weight: Any) -> Any:
    return rms_norm(x, weight, return_rstd=True), dx(x, y, weight)


# Where XLA of jax 0.10 rounded x * y + z twice in the loop of the squares and once in that of y, or another way.
SHAPES = [(8, 128), (16, 256), (64, 256), (512, 64)]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_is_of_one_x(shape: tuple[int, int], dtype: str) -> None:
    """Not of one that is rounded twice in one of its loops, and once in another."""
    rng = np.random.default_rng(0)
    given = [jnp.asarray(rng.standard_normal(size)) for size in (shape, shape, shape, shape[1:])]

    def before(x: Any, y: Any, z: Any, weight: Any) -> Any:
        return (x * y + z).astype(dtype), (x * z + y).astype(dtype), (weight * 0.3 + 1).astype(dtype)

    for call in (lambda x, y, w: rms_norm(x, w), read_twice, add_rms_norm, dx):
        case = before, call, lambda found, *_: found
        for one, other in zip(*map(jax.tree.leaves, in_one_program_and_in_three(case, given)), strict=True):
            oracle.assert_same(one, other)


@pytest.mark.skipif(not _compat.COMPUTES_OPERANDS_AGAIN, reason="XLA of jax 0.11 and newer does not")
def test_a_call_of_two_x_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_held, "_computed_once", lambda value: value)
    jax.clear_caches()
    with pytest.raises(AssertionError):
        test_a_call_is_of_one_x((16, 256), "float32")
    jax.clear_caches()


def test_constants_change_no_bit() -> None:
    """Of which XLA knows more: it puts two constant factors together."""
    x, gate, weight = operands("float32")
    function = functools.partial(rms_norm_gated, norm_before_gate=False)
    found = jax.jit(lambda x: x + function(x, gate, weight))(x)
    oracle.assert_same(found, x + jax.jit(function)(x, gate, weight))
    cos, sin = x[:, : N // 4], gate[:, : N // 4]
    heads, columns = x.reshape(ROWS, 4, N // 4), weight[: N // 4]
    call = lambda q: rms_norm_rope(q, q, cos, sin, columns, columns)  # noqa: E731
    for one, other in zip(
        jax.jit(call)(heads), jax.jit(rms_norm_rope)(heads, heads, cos, sin, columns, columns), strict=True
    ):
        oracle.assert_same(one, other)


def test_members_with_weights_of_their_own_change_no_bit() -> None:
    x, gate, weight = operands("bfloat16")
    weights = jnp.stack([weight, -weight])
    for call in (
        lambda x, w: rms_norm(x, w),
        lambda x, w: rms_norm_gated(x, gate, w),
        lambda x, w: rms_norm_quantized(x, w)[0],
    ):
        members = jax.vmap(call, in_axes=(None, 0))
        found = jax.jit(lambda x, w, members=members: members(x + gate, w * 2.5))(x, weights)
        alone = jax.jit(members)(jax.jit(jnp.add)(x, gate), jax.jit(lambda w: w * 2.5)(weights))
        oracle.assert_same(np.asarray(found).astype(np.float32), np.asarray(alone).astype(np.float32))


def test_heads_of_k_alone_change_no_bit() -> None:
    """Where q has none no kernel is asked, and the specification was computed among the rest of the program."""
    x, gate, weight = operands("bfloat16")
    none, angles, columns = jnp.zeros((ROWS, 0, N // 4), x.dtype), x[:, : N // 4], weight[: N // 4]
    call = lambda k: rms_norm_rope(none, k, angles, angles, columns, columns)[1]  # noqa: E731
    heads = (x.reshape(ROWS, 4, N // 4), gate.reshape(ROWS, 4, N // 4))
    oracle.assert_same(jax.jit(lambda a, b: call(a + b))(*heads), jax.jit(call)(jax.jit(jnp.add)(*heads)))


def held_apart(dtype: str) -> None:
    """In the program that is traced, whatever XLA makes of it here: an operand is behind a barrier, and rounded or
    chosen before anything is computed of it."""
    x, _, weight = operands(dtype)
    (call,) = (one for one in _all(jax.make_jaxpr(rms_norm)(x, weight).jaxpr) if one.primitive.name == "pallas_norm")
    reference = call.params["reference"].jaxpr
    barriers = [one for one in reference.eqns if one.primitive.name == "optimization_barrier"]
    assert [one.invars[0] for one in barriers] == reference.invars

    def users(value: Any) -> list[Any]:
        return [one for one in reference.eqns if any(value is given for given in one.invars)]

    for operand in (one.outvars[0] for one in barriers):
        if _compat.COMPUTES_OPERANDS_AGAIN and dtype != "bfloat16":
            (choice,) = users(operand)  # by platform
            assert choice.primitive.name == "cond"
            (operand,) = choice.outvars
        if dtype == "float32":
            assert {one.primitive.name for one in users(operand)} <= {"jit", "pjit", "neg", "ne", "select_n"}
            continue
        for one in users(operand):
            assert one.primitive.name == "convert_element_type"
            assert {other.primitive.name for other in users(one.outvars[0])} == {"reduce_precision"}


def _all(jaxpr: Any) -> Any:
    for one in jaxpr.eqns:
        yield one
        for value in one.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None and one.primitive.name != "pallas_norm":
                yield from _all(inner)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lax.optimization_barrier(value)", "value"),
        ("return round_to(value.astype(F32), value.dtype)", "return value"),
        ("return jnp.where(jnp.isnan(value), -value, value)", "return value"),
    ],
)
def test_operands_that_are_not_held_are_seen(old: str, new: str, dtype: str) -> None:
    if (dtype == "float32") == ("round_to" in old) and "barrier" not in old:
        return  # is of the other dtype
    with rewritten(Rewrite("_held", old, new)), pytest.raises(AssertionError):
        held_apart(dtype)
    held_apart(dtype)
