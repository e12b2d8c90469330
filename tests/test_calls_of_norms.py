"""Which calls of a patched norm are `rms_norm`'s: those that are proved, with their arguments, dtypes, sizes and axes.
The others are the norm's own, bit for bit."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pallas_norm
from pallas_norm import _computing, _traces
from tests.people_s_norms import counted, draw, equinox_norm, eqx, llama, unit

# People's norms multiply a weight (n,), of another dtype at times, with rows; `patch` is given them as they are.
pytestmark = pytest.mark.usefixtures("implicit_promotion")


def called_with(call: Any, weight: Any = "float32", **attributes: Any) -> Any:
    """An Equinox norm with this __call__."""
    kind = type(equinox_norm(llama, weight=weight, **attributes))
    owner = type(eqx().Module)(
        "CalledRMSNorm", (eqx().Module,), {"__annotations__": vars(kind)["__annotations__"], "__call__": call}
    )
    array = None if weight is None else 1 + 0.3 * draw(96, dtype=weight)
    return owner(eps=1e-5, weight=array, **attributes)


def assert_own(patched: Any, norm: Any, x: Any, *arguments: Any, **named: Any) -> None:
    ours, theirs = patched(x, *arguments, **named), norm(x, *arguments, **named)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


def patch(norm: Any) -> Any:
    patched, report = pallas_norm.patch(norm)
    assert sum(report.replaced.values()) == 1, str(report)
    return patched


# --- arguments --------------------------------------------------------------------------------------------------------


def with_options(self: Any, hidden_states: Any, axis: Any = -1, out_dtype: Any = jnp.float32, **more: Any) -> Any:
    wide = hidden_states.astype("float32")
    y = wide * lax.rsqrt(jnp.mean(wide * wide, axis, keepdims=True) + self.eps)
    return (self.weight * y).astype(out_dtype or hidden_states.dtype)


def test_x_is_taken_from_where_it_was_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, x = counted(monkeypatch), draw(3, 96)
    patched = patch(called_with(with_options))
    expected = patched(x)
    for found in (patched(hidden_states=x), patched(x, -1), patched(axis=-1, hidden_states=x)):
        assert np.array_equal(found, expected)
    assert len(calls) == 4


def test_an_argument_that_is_not_its_default_runs_the_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """None too, where the default is another: it was taken for one that is not given."""
    calls, x, norm = counted(monkeypatch), draw(3, 96), called_with(with_options)
    patched = patch(norm)
    assert_own(patched, norm, x, out_dtype=None)
    assert_own(patched, norm, x, None)
    assert_own(patched, norm, x, other=1)
    with pytest.raises(TypeError, match="multiple values for argument 'hidden_states'"):
        patched(x, hidden_states=x)
    with pytest.raises(TypeError, match="hidden_states"):
        patched()
    assert not calls


def test_what_is_not_called_with_x_is_left() -> None:
    for call in (lambda self: self.weight, lambda self, *, x: llama(self, x)):
        (skipped,) = pallas_norm.patch(called_with(call))[1].skipped
        assert skipped.reason.startswith("it is not called with x")


# --- dtypes -----------------------------------------------------------------------------------------------------------


def test_a_weakly_typed_weight_gives_way_as_in_the_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """jnp.full(n, 1.0) is float32 and leaves bfloat16 what it is."""
    calls, norm, x = counted(monkeypatch), called_with(lambda self, x: llama(self, x)), draw(3, 96)
    strong, weak = norm.weight, jnp.full(96, 1.5)
    held = eqx().tree_at(lambda norm: norm.weight, norm, weak)
    patched = patch(held)
    assert patched(x).dtype == held(x).dtype == jnp.bfloat16
    assert len(calls) == 1
    assert_own(eqx().tree_at(lambda norm: norm.weight, patched, strong), norm, x)
    assert_own(eqx().tree_at(lambda norm: norm.weight, patch(norm), weak), held, x)
    assert_own(patched, held, jnp.full((3, 96), 0.7))
    assert len(calls) == 1


@pytest.mark.parametrize("since", [None, 2.0])
def test_a_weight_that_is_no_array_since_runs_the_own_call(since: Any) -> None:
    def optional(self: Any, x: Any) -> Any:
        return unit(self, x) if self.weight is None else llama(self, x)

    norm = called_with(optional)
    without, own = (eqx().tree_at(lambda norm: norm.weight, one, since) for one in (patch(norm), norm))
    assert_own(without, own, draw(3, 96))


def test_float64_is_left() -> None:
    """Statistics that are rounded to float32 at their end had float32's bits on the rows of the proof."""

    def wider(self: Any, x: Any) -> Any:
        wide = x.astype("float64")
        return (self.weight * (wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + self.eps))).astype(x.dtype)

    with jax.enable_x64(True):  # noqa: FBT003
        held = eqx().tree_at(lambda norm: norm.weight, called_with(llama), jnp.ones(96, "float64"))
        reasons = [pallas_norm.patch(norm)[1].skipped[0].reason for norm in (called_with(wider), held)]
    assert [reason.partition(";")[0] for reason in reasons] == ["it computes in float64", "its weight is float64"]


# --- sizes ------------------------------------------------------------------------------------------------------------


def of_heads(self: Any, x: Any) -> Any:
    heads = x.reshape(*x.shape[:-1], -1, self.dim)
    return unit(self, heads).astype(x.dtype).reshape(x.shape)


def of_one_width(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    return (wide * lax.rsqrt(jnp.sum(wide * wide, -1, keepdims=True) / self.dim + self.eps)).astype(x.dtype)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("call", [of_heads, of_one_width])
def test_without_a_weight_each_length_is_proved(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the length of the attribute both are norms of whole rows."""
    calls, norm = counted(monkeypatch), called_with(call, None, dim=96)
    patched = patch(norm)
    patched(draw(3, 96))
    assert len(calls) == 1
    assert_own(patched, norm, draw(3, 192))
    assert len(calls) == 1


def test_a_norm_without_a_weight_is_ours_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, patched = counted(monkeypatch), patch(called_with(unit, None))
    jax.jit(patched)(draw(3, 128))
    patched(draw(3, 128, dtype="float32"))
    assert len(calls) == 2


def third_axis(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    return self.weight * (wide * lax.rsqrt(jnp.mean(wide * wide, 3, keepdims=True) + self.eps)).astype(x.dtype)


def test_a_rank_without_a_proof_runs_the_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norm, plain = counted(monkeypatch), called_with(third_axis), called_with(llama)
    patched = patch(norm)
    assert_own(patched, norm, draw(2, 2, 2, 3, 96))
    assert_own(patch(plain), plain, draw(1, 2, 1, 2, 3, 96))
    assert not calls
    patched(draw(2, 2, 3, 96))
    patch(plain)(draw(2, 1, 2, 3, 96))
    assert len(calls) == 2


def narrow_where(large: Any) -> Any:
    def call(self: Any, x: Any) -> Any:
        wide = x if large(x.shape) else x.astype("float32")
        mean = jnp.mean(wide * wide, -1, keepdims=True).astype("float32")
        return self.weight * (x.astype("float32") * lax.rsqrt(mean + self.eps)).astype(x.dtype)

    return call


BRANCHES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...]]] = {  # a shape that is ours, and one that is not
    "many rows": (lambda shape: shape[0] >= 64, (63, 96), (64, 96)),
    "decode": (lambda shape: len(shape) == 3 and shape[1] == 1, (2, 2, 96), (2, 1, 96)),
    "the size": (lambda shape: np.prod(shape) > 2**20, (8, 96), (2**14, 96)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", BRANCHES)
@pytest.mark.parametrize("jitted", [False, True])
def test_a_branch_on_sizes_runs_the_own_call(name: str, *, jitted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    large, ours, theirs = BRANCHES[name]
    calls, norm = counted(monkeypatch), called_with(narrow_where(large))
    patched = patch(norm)
    patched(draw(*ours))
    assert len(calls) == 1
    assert_own(*((jax.jit(one.__call__) if jitted else one) for one in (patched, norm)), draw(*theirs))
    assert len(calls) == 1


def test_without_the_comparison_a_branch_would_not_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    large, _, theirs = BRANCHES["many rows"]
    calls, patched = counted(monkeypatch), patch(called_with(narrow_where(large)))
    monkeypatch.setattr(_traces, "alike", lambda *given: True)
    patched(draw(*theirs))
    assert len(calls) == 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "shape", [(1, 96), (11, 96), (1, 1, 96), (13, 11, 96), (22, 1, 2, 96), (0, 96), (1, 1, 1, 1, 96)]
)
def test_any_leading_sizes_are_ours(shape: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    patch(called_with(llama))(draw(*shape))
    assert len(calls) == 1


@pytest.mark.parametrize("n", [2, 11, 143, 11 * 13 * 17])
def test_the_sizes_that_stand_for_others_divide_no_row(n: int) -> None:
    found = _traces.primes((4, 2, 2), n)
    assert len(set(found)) == 3
    assert all(n % prime for prime in found)


# --- what is around a call --------------------------------------------------------------------------------------------


def over_tp(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    mean = jnp.mean(wide * wide, -1, keepdims=True)
    with contextlib.suppress(NameError):
        mean = lax.pmean(mean, "tp")
    return self.weight * (wide * lax.rsqrt(mean + self.eps)).astype(x.dtype)


def test_a_collective_where_an_axis_is_bound_runs_the_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norm, x = counted(monkeypatch), called_with(over_tp), draw(4, 3, 96)
    patched = patch(norm)
    patched(x[0])
    assert len(calls) == 1
    assert_own(*(jax.vmap(one, axis_name="tp") for one in (patched, norm)), x)
    # also of an x that is the same for all members, whose shape was seen outside
    alike = (lambda member, one=one: one(x[0]) + member for one in (patched, norm))
    assert_own(*(jax.vmap(one, axis_name="tp") for one in alike), jnp.zeros(4))
    assert len(calls) == 1


@pytest.mark.parametrize("way", [lax.with_sharding_constraint, lambda y, at: jax.jit(lambda y: y, out_shardings=at)(y)])
def test_a_sharding_constraint_is_not_dropped(way: Any) -> None:
    def constrained(self: Any, x: Any) -> Any:
        return way(llama(self, x), jax.sharding.SingleDeviceSharding(jax.devices()[0]))

    (skipped,) = pallas_norm.patch(called_with(constrained))[1].skipped
    assert skipped.reason.startswith("it constrains how an array is sharded")


def test_patch_while_a_program_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norm, x = counted(monkeypatch), called_with(llama), draw(3, 96)

    @jax.jit
    def step(weight: Any, x: Any) -> Any:
        return patch(eqx().tree_at(lambda norm: norm.weight, norm, weight))(x)

    assert np.array_equal(step(norm.weight, x), patch(norm)(x))
    assert len(calls) == 2


def test_a_length_that_is_first_met_on_a_mesh_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a shard_map no operation of the proof would run."""
    calls, patched = counted(monkeypatch), patch(called_with(unit, None))
    kinds, rows = (jax.sharding.AxisType.Auto,), jax.sharding.PartitionSpec("d")
    mesh = jax.make_mesh((2,), ("d",), axis_types=kinds, devices=jax.devices("cpu")[:2])
    with jax.set_mesh(mesh):
        jax.jit(jax.shard_map(lambda x: patched(x), mesh=mesh, in_specs=rows, out_specs=rows))(draw(4, 64))
    assert len(calls) == 1


def test_without_a_cpu_the_proof_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under JAX_PLATFORMS=cuda."""

    def devices(**options: Any) -> Any:
        raise RuntimeError("Unknown backend cpu")

    norm = called_with(llama)
    monkeypatch.setattr(jax, "local_devices", devices)
    (skipped,) = pallas_norm.patch(norm)[1].skipped
    assert skipped.reason.startswith("its proof is computed on a CPU, and JAX has none here; add cpu to JAX_PLATFORMS")


def test_a_new_length_without_a_cpu_runs_the_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = called_with(unit, None)
    patched = patch(norm)
    monkeypatch.setattr(_computing, "_proofs", _refusing)
    assert_own(patched, norm, draw(3, 64))


def _refusing(*given: Any) -> Any:
    raise _traces.RefusedError("no CPU")
