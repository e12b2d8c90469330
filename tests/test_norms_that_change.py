"""Norms that change when they are called, or by what they hold: left, or run as they are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import _attributes, _traces
from tests.people_s_norms import WAY, counted, draw, equinox_norm, eqx, nnx, unit

# People's norms multiply a weight (n,), of another dtype at times, with rows; `patch` is given them as they are.
pytestmark = pytest.mark.usefixtures("implicit_promotion")


def norm_that(does: Any, *, weight: bool = True, **attributes: Any) -> Any:
    """An NNX norm that does something with what it computes."""

    class RMSNorm(nnx().Module):
        def __init__(self) -> None:
            self.eps, self.calls = 1e-6, 0
            if weight:
                self.weight = nnx().Param(1 + 0.3 * draw(96, dtype="float32"))
            for name, value in attributes.items():
                setattr(self, name, value)

        def __call__(self, x: Any) -> Any:
            y = unit(self, x)
            does(self, y)
            return (y * self.weight[...] if weight else y).astype(x.dtype)

    return RMSNorm()


# Flax would have a norm sow inside nnx.capture; people's do elsewhere.
SOWING = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


def counts(self: Any, y: Any) -> None:
    self.calls += 1


def sows(self: Any, y: Any) -> None:
    self.sow(nnx().Intermediate, "unit", y)


def keeps(self: Any, y: Any) -> None:
    self.last = y


def trains(self: Any, y: Any) -> None:
    self.weight[...] = self.weight[...] + jnp.float32(1)


@SOWING
@pytest.mark.parametrize(
    ("does", "weight"), [(counts, True), (sows, True), (keeps, True), (trains, True), (counts, False), (sows, False)]
)
def test_a_norm_that_changes_itself_is_left(does: Any, *, weight: bool) -> None:
    """A trace does it once, on a copy, and rms_norm never."""
    norm = norm_that(does, weight=weight)
    before = [one.copy() for one in jax.tree.leaves(nnx().state(norm))]
    (skipped,) = pallas_norm.patch(norm)[1].skipped
    assert skipped.reason == "it changes itself when it is called, which rms_norm would not do" + WAY
    assert (norm.calls, hasattr(norm, "unit"), hasattr(norm, "last")) == (0, False, False)
    assert all(map(np.array_equal, jax.tree.leaves(nnx().state(norm)), before))


@pytest.mark.slow
@SOWING
@pytest.mark.parametrize("does", [counts, sows])
def test_without_that_look_the_change_would_vanish(does: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_traces, "_same", lambda before, after: True)
    norm = norm_that(does)
    assert pallas_norm.patch(norm)[1].replaced == {"RMSNorm": 1}
    norm(draw(3, 96))
    assert (norm.calls, hasattr(norm, "unit")) == (0, False)


def gain() -> Any:
    class Gain(nnx().Module):
        def __init__(self) -> None:
            self.deterministic = True

        def __call__(self, y: Any) -> Any:
            return y if self.deterministic else y * jnp.float32(2)

    return Gain()


def with_a_gain() -> Any:
    class RMSNorm(nnx().Module):
        def __init__(self) -> None:
            self.eps, self.weight, self.gain = 1e-6, nnx().Param(jnp.ones(96)), gain()

        def __call__(self, x: Any) -> Any:
            return self.weight[...] * self.gain(unit(self, x)).astype(x.dtype)

    return RMSNorm()


def test_a_flag_of_a_module_inside_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As train() sets it, after a patch in eval()."""
    calls, norm, x = counted(monkeypatch), with_a_gain(), draw(3, 96)
    norm.eval()
    pallas_norm.patch(norm)
    quiet = norm(x)
    assert len(calls) == 1
    norm.train()
    assert np.array_equal(norm(x), 2 * quiet)
    assert len(calls) == 1
    norm.eval()
    norm(x)
    assert len(calls) == 2


def test_without_the_modules_inside_the_flag_would_not_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attributes, "_is_module", lambda value: False)
    norm, x = with_a_gain(), draw(3, 96)
    pallas_norm.patch(norm)
    quiet = norm(x)
    norm.train()
    assert np.array_equal(norm(x), quiet)


def test_a_field_of_an_equinox_module_inside_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scale(eqx().Module):
        factor: float

    def scaled(self: Any, x: Any) -> Any:
        return self.weight * (unit(self, x) if self.scale.factor == 1 else 2 * unit(self, x)).astype(x.dtype)

    calls, x = counted(monkeypatch), draw(3, 96)
    patched, _ = pallas_norm.patch(equinox_norm(scaled, scale=Scale(1.0)))
    quiet = patched(x)
    assert np.array_equal(eqx().tree_at(lambda norm: norm.scale.factor, patched, 2.0)(x), 2 * quiet)
    assert len(calls) == 1


def test_modules_that_hold_each_other_have_words() -> None:
    norm = with_a_gain()
    norm.gain.norm = norm
    words = dict(_attributes.plain_attributes(norm))["gain"].replace("gain.<locals>.", "")
    assert words == "Gain(deterministic=True, norm=with_a_RMSNorm())"
