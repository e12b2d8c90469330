"""`patch` on NNX and Equinox norms that people write: known by what they compute, or left with the reason."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pallas_norm
from pallas_norm import _computing, _patching, _proof_rows
from tests.people_s_norms import NO_FORM, WAY, counted, draw, equinox_norm, eqx, llama, nnx, unit

# People's norms multiply a weight (n,), of another dtype at times, with rows; `patch` is given them as they are.
pytestmark = pytest.mark.usefixtures("implicit_promotion")

DTYPES = ["bfloat16", "float16", "float32"]


def maxtext_norm(**changed: Any) -> Any:
    """A norm of MaxText's form: statistics in float32, rounded to dtype, times the scale cast to dtype."""

    class RMSNorm(nnx().Module):
        def __init__(self) -> None:
            self.epsilon, self.dtype, self.scale_offset, self.use_scale = 1e-6, jnp.bfloat16, 0.0, True
            self.scale = nnx().Param(1 + 0.3 * draw(96, dtype="float32"))
            for name, value in changed.items():
                setattr(self, name, value)

        def __call__(self, x: Any, out_sharding: Any = None) -> Any:
            x = jnp.asarray(x, jnp.float32)
            y = jnp.asarray(x * lax.rsqrt(jnp.mean(lax.square(x), axis=-1, keepdims=True) + self.epsilon), self.dtype)
            if out_sharding is not None:
                y = jax.lax.with_sharding_constraint(y, out_sharding)
            scale = jnp.asarray(self.scale.get_value(), self.dtype) + self.scale_offset
            return jnp.einsum("i...k,...k->i...k", y, scale)

    return RMSNorm()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_norm_of_maxtext_s_form(offset: float, *, jitted: bool) -> None:
    norm, x = maxtext_norm(scale_offset=offset), draw(6, 5, 96)
    state = [leaf.copy() for leaf in jax.tree.leaves(nnx().state(norm))]
    weight = norm.scale.get_value().astype("bfloat16")
    weight = weight + 1.0 if offset else weight
    with jax.disable_jit():
        expected = pallas_norm.rms_norm(x, weight, implementation="xla")
    _, report = pallas_norm.patch(norm)
    assert report.replaced == {"RMSNorm": 1}
    assert not report.skipped
    call = nnx().jit(lambda norm, x: norm(x)) if jitted else lambda norm, x: norm(x)
    assert np.array_equal(call(norm, x).view("uint16"), expected.view("uint16"))
    assert type(norm).__name__ == "RMSNorm"
    assert all(map(np.array_equal, jax.tree.leaves(nnx().state(norm)), state))
    loss = nnx().grad(lambda norm: jnp.sum(norm(x).astype("float32")))
    assert jax.tree.leaves(loss(norm))[0].dtype == jnp.float32
    assert pallas_norm.patch(norm)[1].already == {"RMSNorm": 1}
    assert pallas_norm.unpatch(norm)[1].restored == {"RMSNorm": 1}
    assert _patching.ORIGINAL not in vars(type(norm))


def test_its_own_call_runs_where_the_form_was_not_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of integers, with other arguments, and with attributes that have changed."""
    calls, (norm, _) = counted(monkeypatch), pallas_norm.patch(maxtext_norm())
    x = draw(6, 96)
    norm(x)
    assert len(calls) == 1
    norm(x.astype("int8"))
    norm(x, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    norm.scale_offset = 1.0
    assert np.array_equal(norm(x), maxtext_norm(scale_offset=1.0)(x))
    assert len(calls) == 1


def cast_weight(self: Any, x: Any) -> Any:
    return unit(self, x).astype(x.dtype) * self.weight.astype(x.dtype)


def gemma(self: Any, x: Any) -> Any:
    return (unit(self, x) * (1.0 + self.weight.astype("float32"))).astype(x.dtype)


def weightless(self: Any, x: Any) -> Any:
    return unit(self, x).astype(x.dtype)


def one_row(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    return self.weight * (wide * lax.rsqrt(jnp.mean(wide**2) + self.eps)).astype(x.dtype)


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("body", "weight", "dtypes"),
    [
        (llama, "float32", DTYPES),
        (llama, "bfloat16", DTYPES),
        (cast_weight, "float32", DTYPES),
        (gemma, "bfloat16", DTYPES),
        (weightless, None, DTYPES),
    ],
)
def test_equinox_norms_that_people_write(body: Any, weight: Any, dtypes: list[str], monkeypatch: Any) -> None:
    calls, norm = counted(monkeypatch), equinox_norm(body, weight=weight)
    patched, report = pallas_norm.patch(norm)
    assert report.replaced == {"PersonsRMSNorm": 1}, str(report)
    for dtype in DTYPES:
        x = draw(7, 96, dtype=dtype, seed=2)
        ours, theirs = patched(x), norm(x)
        assert ours.dtype == theirs.dtype
        step = float(jnp.finfo(theirs.dtype).eps)  # rstd's last bit: XLA's rsqrt, the order of the sum
        wide = np.asarray(theirs, np.float64)
        assert np.all(np.abs(np.asarray(ours, np.float64) - wide) <= 4 * step * np.abs(wide))
    assert [operands[0].dtype.name for operands in calls] == dtypes
    restored, _ = pallas_norm.unpatch(patched)
    assert type(restored) is type(norm)


def test_a_norm_of_one_row_is_ours_under_vmap_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a batch it takes one mean of all rows."""
    calls, norm = counted(monkeypatch), equinox_norm(one_row)
    patched, report = pallas_norm.patch(norm)
    assert report.replaced == {"PersonsRMSNorm": 1}
    x = draw(3, 96)
    assert np.array_equal(patched(x), norm(x))
    assert not calls
    jax.vmap(patched)(x)
    assert len(calls) == 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight_dtype", _computing.DTYPES)
@pytest.mark.parametrize("dtype", _computing.DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_the_proof_tells_any_two_forms_apart_that_can_differ(dtype: Any, weight_dtype: Any) -> None:
    x, weight = _proof_rows.rows(96, dtype, 1e-6), _proof_rows.weight(96, weight_dtype)
    name, own = jnp.dtype(dtype).name, jnp.dtype(weight_dtype).name

    def what_can_differ(form: _computing.Form) -> Any:
        factor = form.out if form.cast_weight else own
        lost = factor if factor not in (own, "float32") else None  # float32 holds every weight
        rounded = None if not form.offset or form.offset_in_float32 or factor == "float32" else factor
        return form.unit, lost, form.offset, rounded

    for out in (name, "bfloat16", "float32"):
        bits: dict[Any, set[Any]] = {}
        for form in _computing.forms(name, out, (1.0,)):
            found = _computing._bits(form.compute(_computing._exact, x, weight, 1e-6))
            bits.setdefault(what_can_differ(form), set()).add(found)
        for key, found in bits.items():
            assert len(found) == 1, (out, key)
        units = {key[0] for key in bits}
        by_unit = [{one for key, found in bits.items() if key[0] == unit for one in found} for unit in units]
        assert len(set.union(*by_unit)) == sum(map(len, by_unit))  # no form of one unit has the bits of another's


def test_a_weight_of_another_dtype_than_the_proved_one_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norm = counted(monkeypatch), equinox_norm(llama, weight="float32")
    patched, _ = pallas_norm.patch(norm)
    narrow, own = (
        eqx().tree_at(lambda one: one.weight, module, module.weight.astype("bfloat16")) for module in (patched, norm)
    )
    x = draw(7, 96)
    assert np.array_equal(narrow(x), own(x))
    assert not calls


def eps_outside(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    return self.weight * (wide / (jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True)) + self.eps)).astype(x.dtype)


def bf16_statistics(self: Any, x: Any) -> Any:
    narrow = x.astype("bfloat16")
    mean = jnp.mean(narrow * narrow, -1, keepdims=True)
    return self.weight * (narrow * lax.rsqrt(mean + jnp.bfloat16(self.eps)))


def fewer(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    mean = jnp.sum(wide * wide, -1, keepdims=True) / (x.shape[-1] - 1)
    return self.weight * (wide * lax.rsqrt(mean + self.eps)).astype(x.dtype)


def branches(self: Any, x: Any) -> Any:
    return lax.cond(jnp.max(x) > 1e4, lambda: jnp.zeros_like(x, "float32"), lambda: llama(self, x))


def noisy(self: Any, x: Any) -> Any:
    return llama(self, x + jax.random.normal(jax.random.key(0), x.shape, x.dtype))


def two_results(self: Any, x: Any) -> Any:
    return llama(self, x), x


def particular(self: Any, x: Any) -> Any:
    assert x.shape == (3, 5), x.shape
    return llama(self, x)


def checkpointed(self: Any, x: Any) -> Any:
    return jax.checkpoint(lambda x: llama(self, x))(x)


def one_rank(self: Any, x: Any) -> Any:
    assert x.ndim == 2
    return llama(self, x)


def test_a_norm_that_asserts_a_rank_is_ours_for_that_one() -> None:
    """Whatever anybody's call raises for an x that it does not take, `patch` does not."""
    patched, report = pallas_norm.patch(equinox_norm(one_rank))
    assert report.replaced == {"PersonsRMSNorm": 1}
    assert patched(draw(3, 96)).shape == (3, 96)
    with pytest.raises(AssertionError):
        patched(draw(2, 3, 96))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (eps_outside, NO_FORM),
        (bf16_statistics, NO_FORM),
        (fewer, NO_FORM),
        (particular, NO_FORM),
        (checkpointed, "it computes with "),
        (branches, "it computes with "),
        (noisy, "it computes with random_"),
        (two_results, "it gives 2 arrays; needed one of the shape of x"),
    ],
)
def test_what_is_wrong_by_a_step_is_left(body: Any, reason: str) -> None:
    norm = equinox_norm(body)
    same, report = pallas_norm.patch(norm)
    assert type(same) is type(norm)
    (skipped,) = report.skipped
    assert skipped.reason.startswith(reason)
    assert skipped.reason.endswith(WAY)


def test_what_has_no_eps_or_two_weights_is_left() -> None:
    reasons = [
        pallas_norm.patch(equinox_norm(llama, bias=draw(96)))[1].skipped[0].reason,
        pallas_norm.patch(equinox_norm(llama, eps2=1e-3))[1].skipped[0].reason,
    ]
    assert reasons == [
        "it has 2 arrays, weight, bias; needed a weight, or none; call pallas_norm.rms_norm in its __call__",
        "2 of its attributes are named after eps and hold a float; needed one; call pallas_norm.rms_norm in its "
        "__call__",
    ]
