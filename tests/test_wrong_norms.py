"""Norms that `patch` must not take for an RMSNorm: each is wrong by one step, which a weaker proof does not see."""

from __future__ import annotations

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import pallas_norm
from pallas_norm import _attributes, _computing, _patching, _traces
from tests.people_s_norms import NO_FORM, WAY, counted, draw, equinox_norm, eqx, llama, nnx, unit

# People's norms multiply a weight (n,), of another dtype at times, with rows; `patch` is given them as they are.
pytestmark = pytest.mark.usefixtures("implicit_promotion")


def over_all_rows(self: Any, x: Any) -> Any:
    """One mean of every row of a sequence."""
    wide = x.astype("float32")
    mean = jnp.mean(wide * wide, axis=tuple(range(1, x.ndim)), keepdims=True)
    return self.weight * (wide * lax.rsqrt(mean + self.eps)).astype(x.dtype)


def over_two_axes(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    mean = jnp.mean(wide * wide, axis=(-2, -1), keepdims=True)
    return self.weight * (wide * lax.rsqrt(mean + self.eps)).astype(x.dtype)


def test_a_mean_over_two_axes_is_left() -> None:
    _, report = pallas_norm.patch(equinox_norm(over_two_axes))
    assert [one.reason for one in report.skipped] == [NO_FORM + WAY]


def assert_ours_of_rank_two_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norm = counted(monkeypatch), equinox_norm(over_all_rows)
    patched, report = pallas_norm.patch(norm)
    assert report.replaced == {"PersonsRMSNorm": 1}
    for shape in ((2, 3, 96), (2, 3, 2, 96), (2, 1, 3, 1, 96)):
        x = draw(*shape)
        assert np.array_equal(patched(x), norm(x)), shape
    assert not calls
    patched(draw(3, 96))
    assert len(calls) == 1


def test_a_mean_over_all_axes_but_the_first_is_ours_of_rank_two_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert_ours_of_rank_two_alone(monkeypatch)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("rank", "leading"), [(3, (16, 1)), (4, (16, 1, 1))])
def test_rows_with_an_axis_of_length_one_would_not_tell(
    rank: int, leading: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_computing.LEADING, rank, leading)
    with pytest.raises(AssertionError):
        assert_ours_of_rank_two_alone(monkeypatch)


def scaled_by(shape: Any, *, held_as: str) -> Any:
    """A norm without a weight of its own: it is in a module, or a bare array, that the norm holds."""

    class Scale(nnx().Module):
        def __init__(self) -> None:
            self.weight = nnx().Param(jnp.ones(shape))

        def __call__(self) -> Any:
            return self.weight[...]

    class RMSNorm(nnx().Module):
        def __init__(self) -> None:
            self.eps = 1e-6
            self.scale = Scale() if held_as == "module" else jnp.ones(shape)

        def __call__(self, x: Any) -> Any:
            return unit(self, x) * (self.scale() if held_as == "module" else self.scale)

    return RMSNorm()


@pytest.mark.parametrize("held_as", ["module", "bare array"])
@pytest.mark.parametrize("shape", [(96,), (1,)])
def test_a_weight_that_another_module_holds_is_left(shape: Any, held_as: str) -> None:
    """It is a constant of what is traced: the norm of the ones that it has now, whatever it learns."""
    _, report = pallas_norm.patch(scaled_by(shape, held_as=held_as))
    assert [one.reason for one in report.skipped] == [
        "arrays: 1 in all, 0 in attributes of its own; needed a weight in one, or none" + WAY
    ]


def norm_that_holds_a_scale() -> Any:
    class Scale(eqx().Module):
        weight: Any

    def scaled(self: Any, x: Any) -> Any:
        return unit(self, x) * self.scale.weight

    return equinox_norm(scaled, weight=None, scale=Scale(jnp.ones(96)))


def test_a_weight_in_a_module_inside_an_equinox_norm_is_left() -> None:
    _, report = pallas_norm.patch(norm_that_holds_a_scale())
    assert [one.reason for one in report.skipped] == [
        "arrays: 1 in all, 0 in attributes of its own; needed a weight in one, or none" + WAY
    ]


def test_without_that_count_the_weight_would_not_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    norm, x = norm_that_holds_a_scale(), draw(3, 96)
    found = _patching._of_equinox(norm)
    assert found is not None
    monkeypatch.setattr(_patching, "_of_equinox", lambda module: found._replace(leaves=lambda norm: []))
    patched, report = pallas_norm.patch(norm)
    assert report.replaced == {"PersonsRMSNorm": 1}
    before = patched(x)
    trained = eqx().tree_at(lambda norm: norm.scale.weight, patched, 3 * jnp.ones(96))
    assert np.array_equal(trained(x), before)


@jax.custom_vjp
def frozen_weight(x: Any, weight: Any, eps: Any) -> Any:
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


frozen_weight.defvjp(
    lambda x, weight, eps: (frozen_weight(x, weight, eps), (x, weight)),
    lambda kept, dy: (dy, jnp.zeros_like(kept[1]), None),
)


@jax.custom_jvp
def straight_through(x: Any) -> Any:
    return jnp.asarray(x, "float32")


straight_through.defjvps(lambda dx, y, x: jnp.zeros_like(y))


def own_vjp(self: Any, x: Any) -> Any:
    return frozen_weight(x, self.weight, self.eps)


def own_jvp(self: Any, x: Any) -> Any:
    return self.weight * unit(self, straight_through(x)).astype(x.dtype)


OWN_RULES = pytest.mark.parametrize(("body", "name"), [(own_vjp, "custom_vjp"), (own_jvp, "custom_jvp")])


@OWN_RULES
def test_a_gradient_rule_of_its_own_is_not_replaced(body: Any, name: str) -> None:
    """The values are those of rms_norm, and the gradients are not."""
    norm = equinox_norm(body)
    patched, report = pallas_norm.patch(norm)
    assert [one.reason for one in report.skipped] == [
        f"it has a gradient rule of its own ({name}), which rms_norm's would replace" + WAY
    ]
    assert patched.__class__ is norm.__class__


@pytest.mark.slow
@OWN_RULES
def test_the_values_alone_would_not_tell(body: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_traces, "CALLS", _traces.CALLS | {f"{name}_call", f"{name}_call_jaxpr"})
    _, report = pallas_norm.patch(equinox_norm(body))
    assert report.replaced == {"PersonsRMSNorm": 1}


def test_jax_s_own_functions_with_such_a_rule_are_refused_by_name() -> None:
    def rectified(self: Any, x: Any) -> Any:
        return llama(self, jax.nn.relu(x))

    (skipped,) = pallas_norm.patch(equinox_norm(rectified))[1].skipped
    assert skipped.reason.startswith("it has a gradient rule of its own (custom_jvp)")


def norm_of_weight(*shape: int) -> Any:
    class RMSNorm(nnx().Module):
        def __init__(self) -> None:
            self.eps, self.weight = 1e-6, nnx().Param(1 + 0.3 * draw(*shape, dtype="float32"))

        def __call__(self, x: Any) -> Any:
            return self.weight[...] * unit(self, x).astype(x.dtype)

    return RMSNorm()


@pytest.mark.parametrize("shape", [(), (1,), (4, 1)])
def test_a_weight_that_is_not_one_for_each_element_is_left(shape: Any) -> None:
    (skipped,) = pallas_norm.patch(norm_of_weight(*shape))[1].skipped
    assert skipped.reason == f"its weight has shape {shape}; needed (n,), for the n elements of a row{WAY}"


def test_a_weight_for_each_head_runs_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be told from that of stacked layers before it is called."""
    calls, norm, x = counted(monkeypatch), norm_of_weight(4, 96), draw(3, 4, 96)
    expected = norm(x)
    pallas_norm.patch(norm)
    assert np.array_equal(norm(x), expected)
    assert not calls


def test_a_weight_of_stacked_layers_is_ours_inside_their_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, norm, x = counted(monkeypatch), norm_of_weight(4, 96), draw(3, 96)

    def through_the_layers(norm: Any, x: Any) -> Any:
        return nnx().scan(lambda x, layer: layer(x).astype(x.dtype), in_axes=(nnx().Carry, 0), out_axes=nnx().Carry)(
            x, norm
        )

    expected = through_the_layers(norm, x)
    assert pallas_norm.patch(norm)[1].replaced == {"RMSNorm": 1}
    assert not calls
    found = through_the_layers(norm, x)
    assert calls
    assert all(operands[1].shape == (96,) for operands in calls)
    wide = np.asarray(expected, np.float64)
    assert np.all(np.abs(np.asarray(found, np.float64) - wide) <= 4 * 4 * 2.0**-8 * np.abs(wide))  # a step in a layer


def test_without_the_shape_of_the_weight_the_call_would_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(self: Any, module: Any, x: Any, *given: Any) -> Any:
        return dict(self.computation.proved)[(x.dtype.name, x.ndim, 96)].form

    monkeypatch.setattr(_computing.Proofs, "form", form)
    norm = norm_of_weight(4, 96)
    pallas_norm.patch(norm)
    with pytest.raises(ValueError, match=r"^weight has shape \(4, 96\)"):
        norm(draw(3, 4, 96))


def norm_with(factor: Any, held: Any) -> Any:
    """Times a factor that factor(held) finds in an attribute."""

    class RMSNorm(nnx().Module):
        def __init__(self) -> None:
            self.eps, self.held, self.weight = 1e-6, held, nnx().Param(jnp.ones(96))

        def __call__(self, x: Any) -> Any:
            y = unit(self, x) if factor(self.held) == 1 else unit(self, x) * jnp.float32(2)
            return self.weight[...] * y.astype(x.dtype)

    return RMSNorm()


class Scale(enum.Enum):
    ONE, TWO = 1, 2


HELD: dict[str, tuple[Any, Any, Any]] = {  # the factor of what is held, what is held, and what with a factor of two
    "a number of NumPy": (float, np.float32(1), np.float32(2)),
    "a dict": (lambda held: held["factor"], {"factor": 1.0}, {"factor": 2.0}),
    "a list in a tuple": (lambda held: held[0][0], ([1], "a"), ([2], "a")),
    "a set": (min, {1, 3}, {2, 3}),
    "a complex": (abs, 1 + 0j, 2j),
    "an enum": (lambda held: held.value, Scale.ONE, Scale.TWO),
    "a type of its own": (lambda held: 1 if isinstance(held, list) else 2, [], ()),
}


def call_after_a_change(name: str, calls: list[Any]) -> tuple[Any, Any]:
    """By a patched module whose attribute has changed since, and by one that is as it was written."""
    factor, held, other = HELD[name]
    norm, x = norm_with(factor, held), draw(3, 96)
    assert pallas_norm.patch(norm)[1].replaced == {"RMSNorm": 1}
    norm(x)  # what is proved of its calls is known then
    calls.clear()
    norm.held = other
    return norm(x), norm_with(factor, other)(x)


@pytest.mark.parametrize("name", HELD)
def test_an_attribute_that_has_changed_runs_its_own_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    found, expected = call_after_a_change(name, calls)
    assert np.array_equal(found, expected)
    assert not calls


def test_a_dict_that_was_changed_in_place_is_seen() -> None:
    norm, x = norm_with(lambda held: held["factors"][0], {"factors": [1.0]}), draw(3, 96)
    pallas_norm.patch(norm)
    norm.held["factors"][0] = 2.0
    assert np.array_equal(norm(x), norm_with(lambda held: 2, None)(x))


@pytest.mark.parametrize("name", HELD)
def test_of_numbers_and_strings_alone_the_change_would_not_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(module: Any) -> Any:
        return tuple((key, repr(value)) for key, value in sorted(vars(module).items()) if type(value) in (float, str))

    monkeypatch.setattr(_attributes, "plain_attributes", numbers)
    found, expected = call_after_a_change(name, [])
    assert not np.array_equal(found, expected)
