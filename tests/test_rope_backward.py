"""The backward kernel of rotated heads: dx has the bits of the steps, dweight adds up every row once, and programs have
it wherever they have the forward one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import _rope, rms_norm_rope, rms_norm_rope_qkv
from pallas_norm._spec import Spec
from pallas_norm.kernels import rope_backward
from pallas_norm.plans.fitting import Misfit, backward_plan_on
from pallas_norm.plans.hardware import H200
from pallas_norm.plans.rope import SHARES, rope_backward_plan_on, rope_plan_on
from tests import oracle
from tests.meshes import KINDS as MESHES
from tests.meshes import mesh_of, on_eight
from tests.oracle import F32
from tests.rope_cases import WIDTHS, operands
from tests.strategies import numbers
from tests.test_lowering import array, check

DTYPES = ("bfloat16", "float16", "float32")


def gradients(implementation: str, dr: Any, *given: Any, **options: Any) -> Any:
    """Of every operand but the angles."""
    function = functools.partial(rms_norm_rope, implementation=implementation, **options)
    q, k, cos, sin, *weights = given
    rotated = lambda q, k, *weights: function(q, k, cos, sin, *weights)  # noqa: E731
    return jax.jit(lambda *leaves: jax.vjp(rotated, *leaves)[1](tuple(dr)))(q, k, *weights)


def of_both(
    n: int, dtype: str, *, heads: tuple[int, int] = (5, 3), tokens: tuple[int, ...] = (2, 7)
) -> tuple[list[Any], list[Any]]:
    given = operands(n, heads, tokens, dtype)
    return given, [numbers(np.random.default_rng(at), x.shape, dtype, "normal") for at, x in enumerate(given[:2])]


@pytest.mark.sampled(12)
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("n", [n if n <= 128 else pytest.param(n, marks=pytest.mark.slow) for n in WIDTHS])
def test_dx_has_the_bits_of_the_steps_and_dweight_their_sum(n: int, dtype: str) -> None:
    given, dr = of_both(n, dtype, heads=(3, 2), tokens=(2, 2))  # the last block of k is not full
    found, expected = (gradients(name, dr, *given) for name in ("interpret", "xla"))
    for one, other in zip(found[:2], expected[:2], strict=True):
        oracle.assert_same(one, other)
    for one, other in zip(found[2:], expected[2:], strict=True):
        largest = np.abs(np.asarray(other, F32)).max()
        assert np.abs(np.asarray(one, F32) - np.asarray(other, F32)).max() <= 2**-7 * largest
    for one, other in zip(gradients("interpret", dr, *given[:4]), expected[:2], strict=True):
        assert one.dtype == other.dtype  # without weights


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"weight_offset": 1.0}, {"cast_before_scale": False}, {"eps": 0.25}])
def test_options_are_those_of_the_steps(options: dict[str, Any]) -> None:
    given, dr = of_both(64, "bf16", heads=(2, 1), tokens=(2, 2))
    if "cast_before_scale" in options:
        options, given = (
            {"cast_before_scale": False},
            [one.astype(F32) if at > 1 else one for at, one in enumerate(given)],
        )
        dr = [one.astype(F32) for one in dr]
    for one, other in zip(*(gradients(name, dr, *given, **options)[:2] for name in ("interpret", "xla")), strict=True):
        oracle.assert_same(one, other)


def exact(n: int, heads: tuple[int, int], tokens: int) -> tuple[list[Any], list[Any]]:
    """Rows of 1 and -1, turned by whole quarters, and weights of 1: every number is exact, in any order."""
    rng = np.random.default_rng(n)
    pair = [rng.choice([-1.0, 1.0], (tokens, count, n)).astype(F32) for count in heads]
    quarters = rng.integers(0, 4, (tokens, n))
    cos, sin = (np.array(of)[quarters].astype(F32) for of in ([1, 0, -1, 0], [0, 1, 0, -1]))
    dr = [rng.integers(-3, 4, x.shape).astype(F32) for x in pair]
    return [*pair, cos, sin, *(np.ones(n, F32) for _ in pair)], dr


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("heads", "tokens"), [((1, 1), 1), ((5, 3), 7), ((1, 8), 3), ((9, 1), 2)])
def test_every_row_is_added_to_dweight_once(heads: tuple[int, int], tokens: int) -> None:
    """The last rows of a block are the last one again."""
    given, dr = exact(64, heads, tokens)
    found, expected = (gradients(name, dr, *given, eps=0.0) for name in ("interpret", "xla"))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_projection_has_the_gradients_of_q_and_k_and_zeros_elsewhere() -> None:
    (q, k, cos, sin, *weights), dr = of_both(64, "bf16")
    qkv = np.concatenate([q, k, k], axis=-2)
    fused = functools.partial(rms_norm_rope_qkv, q_heads=5, k_heads=3, implementation="interpret")
    pulled = jax.jit(lambda *given: jax.vjp(lambda *one: fused(one[0], cos, sin, *one[1:]), *given)[1](tuple(dr)))
    dqkv, *dweights = pulled(qkv, *weights)
    dq, dk, *others = gradients("interpret", dr, q, k, cos, sin, *weights)
    oracle.assert_same(dqkv, np.concatenate([dq, dk, np.zeros_like(k)], axis=-2))
    for one, other in zip(dweights, others, strict=True):
        oracle.assert_same(one, other)


@pytest.mark.slow
def test_members_have_dweights_of_their_own() -> None:
    given, dr = of_both(64, "bf16")
    q, k, *rest = given
    call = lambda q, k, dq, dk: gradients("interpret", (dq, dk), q, k, *rest)  # noqa: E731
    found = jax.vmap(call)(q, k, *dr)
    for at in range(2):
        for one, other in zip(found, call(q[at], k[at], *(one[at] for one in dr)), strict=True):
            bound = 2**-7 * np.abs(np.asarray(other, F32)).max() if one.ndim == 2 else 0
            assert np.abs(np.asarray(one[at], F32) - np.asarray(other, F32)).max() <= bound


def both_ways(q: Any, k: Any, cos: Any, sin: Any, *weights: Any) -> Any:
    """What is rotated, and the gradients of its own values."""
    rotated = lambda q, k, *weights: rms_norm_rope(q, k, cos, sin, *weights)  # noqa: E731
    found, pullback = jax.vjp(rotated, q, k, *weights)
    return found, pullback(found)


@pytest.mark.sampled(21)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_lowers_to_one_kernel_and_the_sums_of_dweight(dtype: str, n: int) -> None:
    given = [array(2, 7, heads, n, dtype=dtype) for heads in (5, 3)]
    angles, weights = [array(7, n, dtype=dtype)] * 2, [array(n, dtype=dtype)] * 2
    check(both_ways, *given, *angles, *weights, kernels=4)
    check(both_ways, *given, *angles, kernels=2)


@pytest.mark.slow
def test_heads_whose_sums_differ_take_the_steps() -> None:
    """224 elements: 32 columns in the forward pass, 64 in the backward one."""
    alone = backward_plan_on(H200, 224, "bfloat16", dy_dtype="bfloat16", residual=False, with_dweight=True)
    assert rope_plan_on(H200, 224, "bfloat16").width != alone.width
    with pytest.raises(Misfit, match="the gradients of heads of 224 elements have no kernel of their own"):
        rope_backward_plan_on(H200, 224, "bfloat16", dy_dtype="bfloat16")
    given = [array(7, heads, 224, dtype="bfloat16") for heads in (5, 3)]
    rest = [*[array(7, 224, dtype="bfloat16")] * 2, *[array(224, dtype="bfloat16")] * 2]
    check(both_ways, *given, *rest, kernels=1 + 2 * 3)  # rstd, the gradient and the sum of dweight, for q and for k
    forced = functools.partial(rms_norm_rope, implementation="interpret")
    (q, k, cos, sin, *weights), dr = of_both(224, "bf16")
    found = jax.vjp(lambda q: forced(q, k, cos, sin, *weights), q)[1](tuple(dr))  # is not refused
    assert found[0].shape == q.shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_plans_keep_the_order_of_the_norms_backward_pass(dtype: str) -> None:
    found = set[int]()
    for n in range(32, 1025, 2):
        try:
            plan = rope_backward_plan_on(H200, n, dtype, dy_dtype=dtype)
        except Misfit:
            continue
        alone = backward_plan_on(H200, n, dtype, dy_dtype=dtype, residual=False, with_dweight=True)
        assert plan.order == alone.order
        assert plan.vec * plan.chunks <= max(share.elements for share in SHARES)
        vectors, rest = divmod(n, 2 * plan.vec)
        assert not rest
        assert vectors % plan.lanes in (0, plan.lanes // 2)
        found.add(n)
    assert set(WIDTHS) <= found


@pytest.mark.parametrize(("rows", "expected"), [((320, 80), (33, 8)), ((8, 8), (1, 1)), ((1 << 20, 8), (791, 1))])
def test_programs_are_shared_out_as_the_blocks_are(rows: tuple[int, int], expected: tuple[int, int]) -> None:
    plan = rope_backward_plan_on(H200, 128, "bfloat16", dy_dtype="bfloat16")
    assert plan.block == 8
    assert plan.programs == 792
    if rows[0] < 1000:
        expected = tuple(-(-count // plan.block) for count in rows)  # no program without a block
    assert rope_backward.programs_of(rows, plan) == expected


@pytest.mark.sampled(4)
@on_eight
@pytest.mark.parametrize("kind", MESHES)
def test_on_a_mesh_the_gradients_are_those_of_one_device(kind: str) -> None:
    """q and k by their tokens; dweight is summed over them before it is rounded."""
    q, k, cos, sin, *weights = operands(64, (4, 2), (8, 3), "bf16")
    expected = both_ways(q, k, cos, sin, *weights)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(one, NamedSharding(mesh, P("data"))) for one in (q, k)]
        rest = [jax.device_put(one, NamedSharding(mesh, P())) for one in (cos, sin, *weights)]
        found = jax.jit(both_ways)(*placed, *rest)
    for one, other in zip((*found[0], *found[1][:2]), (*expected[0], *expected[1][:2]), strict=True):
        oracle.assert_same(one, other)
    for one, other in zip(found[1][2:], expected[1][2:], strict=True):
        largest = np.abs(np.asarray(other, F32)).max()
        assert np.abs(np.asarray(one, F32) - np.asarray(other, F32)).max() <= 2**-7 * largest


@on_eight
def test_in_shard_map_dweight_is_summed_over_the_shards_before_it_is_rounded() -> None:
    """The shards' parts of one column are 256, 1 and -256: rounded to bfloat16 in between, the 1 would be lost."""
    given, dr = exact(64, (1, 1), 8)
    dr = [np.zeros_like(one) for one in dr]
    q = np.abs(given[0])
    cos, sin = np.ones_like(given[2]), np.zeros_like(given[3])
    for at, value in enumerate((256.0, 1.0, -256.0)):
        dr[0][at] = value
    bf16 = [jnp.asarray(one, jnp.bfloat16) for one in (q, given[1], cos, sin, *given[4:], *dr)]
    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices("cpu")[:8], axis_types=(jax.sharding.AxisType.Auto,))

    def local(q: Any, k: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any, dq: Any, dk: Any) -> Any:
        function = functools.partial(rms_norm_rope, eps=0.0)
        rotated = lambda *leaves: function(*leaves[:2], cos, sin, *leaves[2:])  # noqa: E731
        return jax.vjp(rotated, q, k, q_weight, k_weight)[1]((dq, dk))[2:]

    rows, whole = P("data"), P()
    specs = (rows, rows, rows, rows, whole, whole, rows, rows)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(whole, whole))
    found, _ = jax.jit(mapped)(*bf16)
    np.testing.assert_array_equal(np.asarray(found, F32), np.ones(64, F32))


def test_a_call_without_a_kernel_asks_for_the_steps() -> None:
    q, k, cos, sin, *_ = operands(80, (1, 1), (3,), "bf16")
    given = {"q": q, "k": k, "cos": cos, "sin": sin, "dq_out": q, "dk_out": k}
    for n, expected in ((80, False), (64, True)):
        cut = {name: jnp.asarray(one[..., :n]) for name, one in given.items()}
        call = _rope.GradientCall(tuple(cut), Spec(), None, ("dq", "dk"))
        assert _rope._has_kernel(call, cut) == expected  # pyright: ignore[reportPrivateUsage]
