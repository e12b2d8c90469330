"""vmap, jit, scan and remat: the same bits as the plain loop, and rstd saved where a policy says so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import add_rms_norm, rms_norm

PATHS = ["xla", "interpret"]
U32 = 2.0**-24  # half a unit in the last place of a float32
SIZE, ROWS, N = 2, 3, 80


class Axes(NamedTuple):
    x: int | None = 0
    residual: int | None = 0
    weight: int | None = None
    dy: int | None = 0


BATCHED = {
    "x": Axes(),
    "x along axis 1": Axes(x=1, residual=1, dy=1),
    "x along the last axis": Axes(x=2, residual=-1, dy=2),
    "weight": Axes(x=None, residual=None, weight=0, dy=None),
    "weight along axis 1": Axes(x=None, residual=None, weight=1, dy=None),
    "both": Axes(weight=0),
    "both, along different axes": Axes(x=1, residual=0, weight=-1, dy=2),
    "x, but not the residual": Axes(residual=None),
    "the residual, but not x": Axes(x=None),
    "dy only": Axes(x=None, residual=None),
    "all but dy": Axes(weight=0, dy=None),
}


def draw(*shape: int, seed: int, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def batch(axis: int | None, *shape: int, seed: int, dtype: str = "bfloat16") -> jax.Array:
    """An operand of each member, along `axis`; one for all where axis is None."""
    return draw(*shape, seed=seed, dtype=dtype) if axis is None else jnp.moveaxis(
        draw(SIZE, *shape, seed=seed, dtype=dtype), 0, axis
    )  # fmt: skip


def norm_and_gradients(x: Any, residual: Any, weight: Any, dy: Any, *, path: str) -> dict[str, Any]:
    (y, s), pullback = jax.vjp(functools.partial(add_rms_norm, implementation=path), x, residual, weight)
    dx, dresidual, dweight = pullback((dy, s))
    return {"y": y, "s": s, "dx": dx, "dresidual": dresidual, "dweight": dweight}


def assert_equal(ours: Any, theirs: Any) -> None:
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert own.dtype == other.dtype
        assert np.array_equal(own, other)


INTERPRETED = ("x along axis 1", "weight", "both, along different axes", "x, but not the residual")  # seconds each


@pytest.mark.sampled(15)
@pytest.mark.parametrize(
    ("path", "which"), [*(("xla", name) for name in BATCHED), *(("interpret", name) for name in INTERPRETED)]
)
def test_vmap_gives_the_bits_of_a_loop(path: str, which: str) -> None:
    axes = BATCHED[which]
    operands = (
        batch(axes.x, ROWS, N, seed=0),
        batch(axes.residual, ROWS, N, seed=1),
        batch(axes.weight, N, seed=2, dtype="float32"),  # so that dweight shows its sum, not its last rounding
        batch(axes.dy, ROWS, N, seed=3, dtype="float32"),
    )
    # Under jit, so that the members share one compilation; a test below compares jit with the eager call.
    function = jax.jit(functools.partial(norm_and_gradients, path=path))
    together = jax.vmap(function, in_axes=tuple(axes))(*operands)
    for member in range(SIZE):
        own = [
            value if axis is None else jnp.take(value, member, axis) for value, axis in zip(operands, axes, strict=True)
        ]
        alone = function(*own)
        for name in ("y", "s", "dx", "dresidual"):
            assert np.array_equal(together[name][member], alone[name]), name
        # |unit| of the longest row is no larger than sqrt(n); each of two sums of ROWS products is off by at most
        # ROWS roundings of the sum of absolute values.
        bound = 2 * ROWS * U32 * np.sum(np.abs(own[3]), axis=0) * np.sqrt(N)
        assert np.all(np.abs(together["dweight"][member] - alone["dweight"]) <= bound)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", PATHS)
def test_nested_vmap_gives_the_bits_of_two_loops(path: str) -> None:
    x, weight = draw(2, 3, 4, N, seed=0), draw(3, N, seed=1)
    norm = jax.jit(functools.partial(rms_norm, implementation=path))
    together = jax.vmap(jax.vmap(norm), in_axes=(0, None))(x, weight)
    alone = jnp.stack([jnp.stack([norm(x[i, j], weight[j]) for j in range(3)]) for i in range(2)])
    assert_equal(together, alone)
    rows_alone = jax.vmap(jax.vmap(jax.vmap(norm, in_axes=(0, None)), in_axes=(0, None)), in_axes=(0, None))
    assert_equal(rows_alone(x, weight[0]), norm(x, weight[0]))


def test_out_axes_move_the_batch() -> None:
    x, weight = draw(SIZE, ROWS, N, seed=0), draw(N, seed=1)
    moved = jax.vmap(lambda x: rms_norm(x, weight), out_axes=1)(x)
    assert_equal(moved, jnp.moveaxis(rms_norm(x, weight), 0, 1))


def test_vmap_over_nothing_of_ours_calls_once() -> None:
    x, weight = draw(ROWS, N, seed=0), draw(N, seed=1)
    y = jax.vmap(lambda number: (number, rms_norm(x, weight)), out_axes=(0, None))(jnp.arange(4))[1]
    assert_equal(y, rms_norm(x, weight))


def test_vmap_with_a_shared_weight_is_one_call_on_more_rows() -> None:
    """Not a loop, whose kernels would be as many as there are members."""
    x, weight = draw(SIZE, ROWS, N, seed=0), draw(N, seed=1)
    text = jax.jit(jax.vmap(rms_norm, in_axes=(0, None))).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "stablehlo.while" not in text


@pytest.mark.sampled(6)
@pytest.mark.parametrize("n", [31, 80, 1040])
@pytest.mark.parametrize("path", PATHS)
def test_jit_gives_the_bits_of_the_eager_call(path: str, n: int) -> None:
    if path == "interpret" and n < 32:
        path = "xla"
    function = functools.partial(norm_and_gradients, path=path)
    operands = draw(7, n, seed=0), draw(7, n, seed=1), draw(n, seed=2), draw(7, n, seed=3)
    assert_equal(jax.jit(function)(*operands), function(*operands))


def layers(path: str, *, scanned: bool, remat: bool) -> Callable[..., jax.Array]:
    """A stack of norms, each with a weight of its own, and the sum of squares of the result.

    Every rounding is one of ours: XLA drops those of bfloat16 sums and sines where it fuses them.
    """

    def layer(carry: Any, weight: jax.Array) -> tuple[Any, None]:
        return add_rms_norm(*carry, weight, implementation=path), None

    body = jax.checkpoint(layer) if remat else layer

    def loss(x: jax.Array, weights: jax.Array) -> jax.Array:
        carry = x, jnp.zeros_like(x)
        if scanned:
            carry, _ = jax.lax.scan(body, carry, weights)
        else:
            for weight in weights:
                carry, _ = body(carry, weight)
        return jnp.sum(carry[0].astype(jnp.float32) ** 2)

    return loss


# jax.checkpoint refuses the ordered callbacks that Pallas's GPU interpreter is made of.
@pytest.mark.sampled(3)
@pytest.mark.parametrize(("path", "remat"), [("xla", False), ("xla", True), ("interpret", False)])
def test_scan_and_remat_give_the_bits_of_the_unrolled_loop(path: str, remat: bool) -> None:  # noqa: FBT001
    x, weights = draw(ROWS, N, seed=0), draw(3, N, seed=1)
    unrolled = jax.jit(jax.value_and_grad(layers(path, scanned=False, remat=False), (0, 1)))(x, weights)
    scanned = jax.jit(jax.value_and_grad(layers(path, scanned=True, remat=remat), (0, 1)))(x, weights)
    assert_equal(scanned, unrolled)


def one_layer(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.sum(rms_norm(x, weight).astype(jnp.float32) ** 2)


SAVE_RSTD = jax.checkpoint_policies.save_only_these_names(pallas_norm.RSTD)


def test_a_policy_saves_rstd_by_its_name_and_nothing_else_of_the_norm(capsys: pytest.CaptureFixture[str]) -> None:
    operands = draw(ROWS, N, seed=0), draw(N, seed=1)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(one_layer, policy=SAVE_RSTD), *operands)
    saved = capsys.readouterr().out.splitlines()
    assert [line for line in saved if "from the argument" not in line] == [
        line for line in saved if line.startswith(f"f32[{ROWS}] named '{pallas_norm.RSTD}'")
    ]
    assert sum(pallas_norm.RSTD in line for line in saved) == 1

    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(one_layer), *operands)
    assert pallas_norm.RSTD not in capsys.readouterr().out


def test_the_gradient_keeps_rstd_in_float32_whatever_the_dtype_of_x(capsys: pytest.CaptureFixture[str]) -> None:
    jax.ad_checkpoint.print_saved_residuals(one_layer, draw(ROWS, N, seed=0), draw(N, seed=1))
    assert f"f32[{ROWS}] named '{pallas_norm.RSTD}'" in capsys.readouterr().out


def test_a_saved_rstd_changes_no_bit() -> None:
    operands = draw(ROWS, N, seed=0), draw(N, seed=1)
    plain = jax.jit(jax.grad(one_layer, (0, 1)))(*operands)
    saved = jax.jit(jax.grad(jax.checkpoint(one_layer, policy=SAVE_RSTD), (0, 1)))(*operands)
    assert_equal(saved, plain)


def forward_passes(function: Callable[..., jax.Array]) -> int:
    """In the step that is traced; of two that are alike a compiler may make one."""
    step = jax.value_and_grad(lambda x, weight: function(jnp.sin(x), weight), (0, 1))

    def count(jaxpr: Any) -> int:
        inner = (getattr(value, "jaxpr", value) for one in jaxpr.eqns for value in one.params.values())
        calls = [one.params["call"].operation for one in jaxpr.eqns if one.primitive.name == "pallas_norm"]
        return calls.count("forward") + sum(count(one) for one in inner if hasattr(one, "eqns"))

    return count(jax.make_jaxpr(step)(draw(ROWS, N, seed=0), draw(N, seed=1)).jaxpr)


def test_a_saved_rstd_spares_the_second_forward_pass_that_remat_costs() -> None:
    def linear(x: jax.Array, weight: jax.Array) -> jax.Array:  # needs no y for its own gradient
        return jnp.sum(rms_norm(x, weight, implementation="xla").astype(jnp.float32))

    counts = [forward_passes(f) for f in (linear, jax.checkpoint(linear), jax.checkpoint(linear, policy=SAVE_RSTD))]
    assert counts == [1, 2, 1]
