"""Which statements of a layer's forward become one kernel, and that the others run as they are written."""

from __future__ import annotations

import inspect
import traceback
from typing import Any

import pytest
import torch
from torch import nn

from pallas_norm_torch import _decoder_layers, add_rms_norm, patch
from pallas_norm_torch._decoder_layers import UNKNOWN, fused_forward
from tests.interop.launched import as_if_launched
from tests.interop.tiny_models import same

FACTOR = 1.0  # what the module says when the forward runs


class Norm(nn.Module):
    """As a person writes it."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(0.5, 1.5, n)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm, self.mlp = Norm(), Norm(), nn.Linear(64, 64)

    def forward(self, h: torch.Tensor) -> Any:
        raise NotImplementedError


class Sandwich(Layer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        r = h
        h = self.mlp(h)
        h = r + h
        r = h
        h = self.first_norm(h)
        return r + h


class NamedOtherwise(Layer):
    def forward(self, h: torch.Tensor, *, scale: float = 2.0) -> torch.Tensor:
        """The sum keeps its own name, and the second operand is an expression."""
        stream = h + self.mlp(h) * scale * FACTOR
        normed = self.first_norm(stream)
        stream = stream + normed
        again = stream
        normed = self.second_norm(again)
        return again * normed


class InABlock(Layer):
    def forward(self, h: torch.Tensor, deep: bool = True) -> torch.Tensor:  # noqa: FBT001, FBT002
        if deep:
            r = h + self.mlp(h)
            h = self.first_norm(r)
        else:
            r = h
        return h + r


class SumNotNeeded(Layer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h + self.mlp(h)
        h = self.first_norm(h)
        return h


class SeenInBetween(Layer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        r = h + self.mlp(h)
        r = r.clone()
        h = self.first_norm(r)
        return h + r


class OfAnother(Layer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        r = h + self.mlp(h)
        y = self.first_norm(h)
        return r + y


class TwoNames(Layer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        r = h + self.mlp(h)
        kept = r
        y = self.first_norm(kept)
        return r + y + kept


class InPlace(Layer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        r = self.mlp(h)
        r += h
        h = self.first_norm(r)
        return h + r


class Hooked(Layer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Of the sum's gradient the norm's part belongs to what the hook sees."""
        r = h + self.mlp(h)
        h = self.first_norm(r)
        r.register_hook(lambda gradient: gradient.clamp(-1e-2, 1e-2))
        return h + r


class Super(Sandwich):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        r = h + self.mlp(h)
        h = self.first_norm(r)
        return super().forward(h + r)


class Renamed(Layer):
    def forward(self, h: torch.Tensor) -> torch.Tensor:
        r = h + self.__twice(h)
        h = self.first_norm(r)
        return h + r

    def __twice(self, h: torch.Tensor) -> torch.Tensor:
        return h + h


@pytest.mark.parametrize(
    ("layer", "norms"),
    [
        (Sandwich, ("first_norm",)),
        (NamedOtherwise, ("first_norm", "second_norm")),
        (InABlock, ("first_norm",)),
        (SumNotNeeded, None),
        (SeenInBetween, None),
        (OfAnother, None),
        (TwoNames, ("first_norm",)),
        (InPlace, None),
        (Hooked, None),
        (Super, None),
        (Renamed, None),
    ],
)
def test_an_addition_just_before_a_norm_goes_into_it(
    layer: type[Layer], norms: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: Any = fused_forward(layer)
    assert (UNKNOWN if norms is None else norms) == getattr(fused, "norms", fused)
    torch.manual_seed(0)
    model, h = layer(), torch.randn(3, 64)
    own = model(h)
    taken_in = list[int]()

    def adding(norm: Any, left: torch.Tensor, right: torch.Tensor) -> Any:
        taken_in.append(id(norm))
        return add_rms_norm(left, right, norm.weight, norm.eps)

    monkeypatch.setattr(_decoder_layers, "add_norm", adding)
    if norms is not None:  # made again, with the one that counts
        fused = _decoder_layers.fused_forward(layer)
        assert same(fused(model, h), own)
        assert taken_in == [id(getattr(model, name)) for name in norms]


def test_what_is_not_a_norm_is_called_with_the_sum_as_before() -> None:
    class Plain(Layer):
        def forward(self, h: torch.Tensor) -> torch.Tensor:
            r = h + h
            h = self.mlp(r)
            return h + r

    model, h = Plain(), torch.randn(3, 64)
    fused: Any = fused_forward(Plain)
    assert same(fused(model, h), model(h))
    assert patch(model, fuse_residual=True).fused == {}


def test_the_fused_forward_has_the_defaults_the_module_and_the_lines_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, h = NamedOtherwise(), torch.randn(3, 64)
    patch(model, fuse_residual=True)
    assert type(model) is not NamedOtherwise
    assert inspect.signature(type(model).forward) == inspect.signature(NamedOtherwise.forward)
    assert same(model(h, scale=3.0), NamedOtherwise.forward(model, h, scale=3.0))
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    assert same(model(h), NamedOtherwise.forward(model, h))
    monkeypatch.setitem(globals(), "FACTOR", "no number")
    with pytest.raises(TypeError) as caught:
        model(h)
    frame = next(
        one
        for one in traceback.extract_tb(caught.value.__traceback__)
        if one.filename == __file__ and one.name == "forward"
    )
    assert frame.line == "stream = h + self.mlp(h) * scale * FACTOR"


class AddsANumber(Layer):
    def forward(self, h: torch.Tensor, residual: Any = 0) -> Any:
        h = residual + h
        y = self.first_norm(h)
        return y + h


def test_what_is_added_may_be_a_number() -> None:
    model, h = AddsANumber(), torch.randn(3, 64)
    own = [model(h), model(h, 0.5), model(h, h)]
    assert patch(model, fuse_residual=True).fused == {"AddsANumber": 1}
    assert all(map(same, [model(h), model(h, 0.5), model(h, h)], own))


def test_a_residual_that_is_negated_lazily_is_added_in_a_step() -> None:
    model, h = AddsANumber(), torch.randn(3, 64)
    negated = torch.randn(3, 64, dtype=torch.complex64).conj().imag
    own = model(h, negated)
    patch(model, fuse_residual=True)
    with as_if_launched():
        assert negated.is_neg()
        torch.testing.assert_close(model(h, negated), own)


def test_a_norm_without_the_name_of_one_is_taken_in() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln, self.mlp = Norm(), nn.Linear(64, 64)

        def forward(self, h: torch.Tensor) -> torch.Tensor:
            r = h + self.mlp(h)
            h = self.ln(r)
            return h + r

    assert patch(Short(), fuse_residual=True).fused == {"Short": 1}


def test_a_norm_that_was_left_is_told() -> None:
    model = Sandwich()
    model.first_norm.weight = nn.Parameter(torch.ones(64, dtype=torch.float64))
    report = patch(model, fuse_residual=True)
    assert report.fused == {}
    assert ("its first_norm was not replaced, so the addition before it stays outside") in {
        one.reason for one in report.left
    }
