"""Wrong rotated heads that must be seen: rewrites of the kernel and of the specification, and what kills each."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import rms_norm, rms_norm_rope
from pallas_norm._spec import Spec
from pallas_norm.plans.hardware import H200
from pallas_norm.plans.rope import rope_backward_plan_on, rope_plan_on
from tests import oracle, rope_oracle
from tests.oracle import BF16, Array
from tests.rewrites import Rewrite, rewritten

EPS = 0.25  # that is seen
HEADS = (3, 2)

# In the kernel for heads of n, and in the specification.
ROPE: dict[str, Rewrite] = {
    "y * cos not rounded": Rewrite("rope", "block.plus(a, block.half_negated(b, i))", "(block.widened(y[i]) * block.widened(cos[i]) + block.widened(block.half_negated(b, i))).astype(b.dtype)", n=128),  # noqa: E501
    "y not rounded before it is rotated": Rewrite("rope", "return block.times(unit, weight)", "return block.widened(unit) * block.widened(weight)", n=128, also=("a, b = block.times(y[i], cos[i]), block.times(partner, sin[i])", "a, b = ((one.astype(jnp.float32) * of.astype(jnp.float32)).astype(of.dtype) for one, of in ((y[i], cos[i]), (partner, sin[i])))")),  # noqa: E501
    "unit not rounded": Rewrite("rope", "block.narrowed(chunk * scale, dtypes.unit)", "chunk * scale", n=128),
    "the other half negated": Rewrite("heads", "self._position() < columns, *halves", "self._position() >= columns, *halves", n=128),  # noqa: E501
    "no half negated": Rewrite("rope", "block.half_negated(b, i)", "b", n=128),
    "the first chunk's half for all": Rewrite("heads", "- index * plan.span", "", n=96),
    "partners a quarter away": Rewrite("heads", "jnp.roll(whole, plan.n // 2, axis=1)", "jnp.roll(whole, plan.n // 4, axis=1)", n=128),  # noqa: E501
    "cos for sin": Rewrite("rope", "block.times(partner, sin[i])", "block.times(partner, cos[i])", n=128),
    "k with the weight of q": Rewrite("heads", "jnp.where(self.is_k == 1, found[1], found[0])", "found[0]", n=128),
    "angles of the next token": Rewrite("heads", "rows // self.heads % ref.tokens", "(rows // self.heads + 1) % ref.tokens", n=128),  # noqa: E501
    "positions not repeated": Rewrite("heads", "rows // self.heads % ref.tokens", "rows // self.heads", n=128),
    "heads at another stride": Rewrite("rope", "own = tokens * heads[i] - 1", "own = tokens * heads[i] - 2", n=128),
    "k's heads begin with q's": Rewrite("rope", "within * n, i * heads[0] * n", "within * n, 0", n=128),
    "no eps": Rewrite("rope", "block.inverse_root(total, spec.eps)", "block.inverse_root(total, 0.0)", n=128),
    "cast: a plain one in the interpreter": Rewrite("conversions", "reference.round_to(value.astype(F32), dtype) if interpret", "value.astype(dtype) if interpret"),  # noqa: E501
    "vmap: angles beside which the others stay alone": Rewrite("_rope", "(name in ANGLES and not own_angles)", "(name in ANGLES and not is_batched[name])"),  # noqa: E501
    "xla: products not rounded": Rewrite("rope_reference", "b = round_to(product(rotate_half(wide), sin), y.dtype).astype(F32)", "b = product(rotate_half(wide), sin)"),  # noqa: E501
    "xla: y1 negated": Rewrite("rope_reference", "[-second, first]", "[second, -first]"),
    "xla: zeros keep their sign": Rewrite("rope_reference", "jnp.where(dy == 0, jnp.zeros_like(dy), dy)", "dy"),
    "xla: the gradient rotated onwards": Rewrite("rope_reference", "round_to(a - rotate_half(b)", "round_to(a + rotate_half(b)"),  # noqa: E501
}  # fmt: skip

# In the kernel of the gradients.
BACKWARD: dict[str, Rewrite] = {
    "rotated onwards": Rewrite("rope_backward", "i, second=True)", "i)", n=128),
    "products not rounded": Rewrite("rope_backward", "block.plus(block.times(dr[i], cos[i]), block.half_negated(partner, i, second=True))", "block.narrowed(block.widened(dr[i]) * block.widened(cos[i]) + block.widened(block.half_negated(partner, i, second=True)), dr[i].dtype)", n=128),  # noqa: E501
    "cos for sin": Rewrite("rope_backward", "zip(dr, sin, strict=True)", "zip(dr, cos, strict=True)", n=128),
    "zeros keep their sign": Rewrite("pairs", "jnp.where(a == 0, jnp.zeros_like(a), a)", "a", n=128),
    "rows that are taken again are added again": Rewrite("rope_backward", "[block.of_new_rows(*pair) for", "[pair[0] for", n=128),  # noqa: E501
    "the last row is left out": Rewrite("heads", "jnp.where(row <= self.last, chunk", "jnp.where(row < self.last, chunk", n=128),  # noqa: E501
    "no eps": Rewrite("rope_backward", "block.inverse_root(total, eps)", "block.inverse_root(total, 0.0)", n=128),
    "the block before": Rewrite("rope_backward", "return partial, following", "return partial, loaded", n=128),
    "a program's first block again": Rewrite("rope_backward", "self.program + step * self.programs", "self.program", n=128),  # noqa: E501
    "k's dweight in q's": Rewrite("rope_backward", "pl.when(is_k == i)", "pl.when(is_k == 0)", n=128),
    "k's programs begin with q's": Rewrite("rope_backward", "program -= is_k * numbers", "program -= 0 * numbers", n=128),  # noqa: E501
    "gradients at the strides of x": Rewrite("rope_backward", 'own["dr_outer"], own["dr_inner"], own["dr_offset"]', 'own["outer"], own["inner"], own["offset"]', n=128),  # noqa: E501
}  # fmt: skip


@functools.cache
def operands(n: int) -> tuple[Array, ...]:
    """q and k of 4 tokens, rows of angles for 2, two weights."""
    rng = np.random.default_rng(n)
    shapes = ((4, HEADS[0], n), (4, HEADS[1], n), (2, n), (2, n), (n,), (n,))
    return tuple(rng.standard_normal(shape).astype(BF16) for shape in shapes)


@functools.cache
def normalised(n: int) -> tuple[Array, Array]:
    q, k, _, _, *weights = operands(n)
    norm = jax.jit(functools.partial(rms_norm, eps=EPS, implementation="xla"))
    of_q, of_k = (np.asarray(norm(x, weight)) for x, weight in zip((q, k), weights, strict=True))
    return of_q, of_k


def kernel(n: int) -> None:
    q, k, cos, sin, *weights = operands(n)
    given = {"cos": cos, "sin": sin, "q_weight": weights[0], "k_weight": weights[1]}
    spec, plan = Spec(eps=EPS), rope_plan_on(H200, n, BF16)
    options: dict[str, Any] = {"plan": plan, "spec": spec, "dtypes": spec.dtypes(BF16, weight=BF16), "interpret": True}
    run = sys.modules["pallas_norm.kernels.rope"].rope  # of a mutant
    for tensors, heads in (({"q": q, "k": k}, None), ({"qkv": np.concatenate([q, k, k], axis=1)}, HEADS)):
        found = run({name: jnp.asarray(one) for name, one in (tensors | given).items()}, heads=heads, **options)
        for name, y in zip(("q_out", "k_out"), normalised(n), strict=True):
            expected = rope_oracle.rotated(y, np.tile(cos, (2, 1)), np.tile(sin, (2, 1)), flushes=True)
            oracle.assert_same(np.asarray(found[name]).reshape(expected.shape), expected)


@functools.cache
def expected_gradients(n: int) -> list[Array]:
    """dq and dk, then their dweights."""
    q, k, cos, sin, *weights = operands(n)
    found = list[Any]()
    for x, weight, dr in zip((q, k), weights, gradients_of(n), strict=True):
        dy = rope_oracle.rotated_back(dr, np.tile(cos, (2, 1)), np.tile(sin, (2, 1)))
        norm = functools.partial(rms_norm, eps=EPS, implementation="xla")
        found.append(jax.jit(lambda x, weight, dy, norm=norm: jax.vjp(norm, x, weight)[1](dy))(x, weight, dy))
    return [np.asarray(one[at]) for at in (0, 1) for one in found]


def gradients_of(n: int) -> tuple[Array, Array]:
    """Some of which are turned to -0."""
    rng = np.random.default_rng(n + 1)
    q, k, *_ = operands(n)
    of_q, of_k = (rng.standard_normal(x.shape).astype(BF16) for x in (q, k))
    of_q[0], of_k[1] = -0.0, -0.0
    return of_q, of_k


def backward_kernel(n: int) -> None:
    """Of fewer programs than blocks, the last of which has fewer rows."""
    q, k, cos, sin, *weights = operands(n)
    dq, dk = gradients_of(n)
    given = {"cos": cos, "sin": sin, "q_weight": weights[0], "k_weight": weights[1], "dq_out": dq, "dk_out": dk}
    plan = dataclasses.replace(rope_backward_plan_on(H200, n, BF16, dy_dtype=BF16), programs=4)
    spec = Spec(eps=EPS)
    options: dict[str, Any] = {"plan": plan, "spec": spec, "dtypes": spec.dtypes(BF16, weight=BF16), "interpret": True}
    run = sys.modules["pallas_norm.kernels.rope_backward"].backward
    for tensors, heads in (({"q": q, "k": k}, None), ({"qkv": np.concatenate([q, k, k], axis=1)}, HEADS)):
        found = run({name: jnp.asarray(one) for name, one in (tensors | given).items()}, heads=heads, **options)
        *of_pair, of_q, of_k = expected_gradients(n)
        for name, expected in zip(("dq", "dk"), of_pair, strict=True):
            oracle.assert_same(np.asarray(found[name]).reshape(expected.shape), expected)
        for name, expected in (("q_dweight", of_q), ("k_dweight", of_k)):
            largest = np.abs(expected.astype(np.float32)).max()
            assert np.abs(np.asarray(found[name]) - expected.astype(np.float32)).max() <= 2.0**-8 * largest


def specification() -> None:
    module = sys.modules["pallas_norm.rope_reference"]
    dr, _, cos, sin, *_ = operands(64)
    dr = dr[:2].copy()
    dr[0] = -0.0
    for name in ("rotated", "rotated_back"):
        found = jax.jit(getattr(module, name))(dr, cos, sin)
        oracle.assert_same(found, getattr(rope_oracle, name)(dr, cos, sin))


def members() -> None:
    """Each with sines of its own, the cosines shared."""
    q, k, cos, sin, *_ = operands(64)
    q, k, many = q[:2], k[:2], np.stack([sin, -sin])
    call = functools.partial(sys.modules["pallas_norm"].rms_norm_rope, implementation="interpret")
    found = jax.vmap(call, in_axes=(None, None, None, 0))(q, k, cos, many)
    for i, own in enumerate(many):
        expected = rms_norm_rope(q, k, cos, own, implementation="xla")
        for one, other in zip(found, expected, strict=True):
            oracle.assert_same(one[i], other)


def in_one_program() -> None:
    """Of a shape in which XLA, given plain casts, rounded y * cos together with the sum."""
    rng = np.random.default_rng(0)
    q, k, cos, sin = (
        rng.standard_normal(shape).astype(np.float16) for shape in ((2, 2, 5, 128), (2, 2, 1, 128), *[(2, 128)] * 2)
    )
    function = sys.modules["pallas_norm"].rms_norm_rope
    found, expected = (
        jax.jit(functools.partial(function, implementation=name))(q, k, cos, sin) for name in ("interpret", "xla")
    )
    for one, other in zip(found, expected, strict=True):
        oracle.assert_same(one, other)


IN_KERNELS = {name: rewrite for name, rewrite in ROPE.items() if not name.startswith(("xla", "vmap", "cast"))}


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_KERNELS)
def test_a_rewritten_kernel_is_killed(name: str) -> None:
    with rewritten(IN_KERNELS[name]), pytest.raises(AssertionError):
        kernel(IN_KERNELS[name].n)


@pytest.mark.slow
@pytest.mark.parametrize("name", BACKWARD)
def test_a_rewritten_kernel_of_the_gradients_is_killed(name: str) -> None:
    with rewritten(BACKWARD[name]), pytest.raises(AssertionError):
        backward_kernel(BACKWARD[name].n)


@pytest.mark.slow
def test_the_real_kernel_of_the_gradients_is_killed_by_nothing() -> None:
    backward_kernel(128)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [name for name in ROPE if name.startswith("xla")])
def test_a_rewritten_specification_is_killed(name: str) -> None:
    with rewritten(ROPE[name]), pytest.raises(AssertionError):
        specification()


@pytest.mark.slow
@pytest.mark.parametrize("n", sorted({rewrite.n for rewrite in IN_KERNELS.values()}))
def test_the_real_kernel_is_killed_by_nothing(n: int) -> None:
    kernel(n)


def test_the_specification_is_killed_by_nothing() -> None:
    specification()


@pytest.mark.slow
def test_a_rule_of_vmap_for_one_of_the_angles_is_killed() -> None:
    with rewritten(ROPE["vmap: angles beside which the others stay alone"]), pytest.raises(AssertionError):
        members()
    members()


def rounds_before_it_casts() -> None:
    """A cast alone is for XLA to drop where what it gives is widened again: on some CPUs it does, on others not."""
    narrowed = sys.modules["pallas_norm.kernels.conversions"].narrowed
    for dtype in (jnp.bfloat16, jnp.float16):
        text = str(jax.make_jaxpr(lambda x, dtype=dtype: narrowed(x, dtype, interpret=True))(jnp.ones(8)))
        assert "reduce_precision" in text


def test_a_cast_that_xla_may_drop_is_killed() -> None:
    with rewritten(ROPE["cast: a plain one in the interpreter"]), pytest.raises(AssertionError):
        rounds_before_it_casts()
    rounds_before_it_casts()


def test_the_roundings_survive_in_one_program() -> None:
    in_one_program()
