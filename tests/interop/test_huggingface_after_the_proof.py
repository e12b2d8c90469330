"""What is changed after a norm was recognised: a replaced norm computes what its own forward does then."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from pallas_norm_torch import _computation, patch, unpatch
from pallas_norm_torch._forms import Computation
from pallas_norm_torch._outside import outside_of, unchanged
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import BF16, N
from tests.interop.zoo_entries import Base, Tensor
from tests.interop.zoo_of_wrong_questions import unit

THIS = sys.modules[__name__]
MODE, FLOOR = "twice", 1e-6


def helped(x: Tensor, eps: float) -> Tensor:
    return unit(x, eps)


class Config:
    eps = 1e-5


class Reading(Base):
    """Reads everything that a forward may read outside of its instance's simple attributes."""

    once = False

    def __init__(self, n: int = N) -> None:
        super().__init__(n)
        self.config = Config()

    @property
    def scale(self) -> Tensor:
        return self.weight

    @staticmethod
    def static(h: Tensor) -> Tensor:
        return h

    @classmethod
    def of_class(cls, h: Tensor) -> Tensor:
        return h

    def method(self, x: Tensor) -> Tensor:
        return helped(x, max(self.eps, FLOOR))

    def forward(self, x: Tensor) -> Tensor:
        h = self.of_class(self.static(self.method(x)))
        if MODE == "once" or Reading.once or hasattr(self, "alpha") or getattr(self.config, "once", False):
            return (self.scale * h).to(x.dtype)
        return self.scale * h.to(x.dtype)


def doubled(h: Tensor) -> Tensor:
    return 2 * h


Change = Callable[[pytest.MonkeyPatch, Any], None]
CHANGES: dict[str, Change] = {
    "a global": lambda patch, module: patch.setattr(THIS, "MODE", "once"),
    "a global number": lambda patch, module: patch.setattr(THIS, "FLOOR", 1e-2),
    "a helper": lambda patch, module: patch.setattr(THIS, "helped", lambda x, eps: 2 * unit(x, eps)),
    "the class": lambda patch, module: patch.setattr(Reading, "once", True),
    "a method": lambda patch, module: patch.setattr(Reading, "method", lambda self, x: 2 * unit(x, self.eps)),
    "a static method": lambda patch, module: patch.setattr(Reading, "static", staticmethod(doubled)),
    "a class method": lambda patch, module: patch.setattr(Reading, "of_class", classmethod(lambda cls, h: 2 * h)),
    "a property": lambda patch, module: patch.setattr(Reading, "scale", property(lambda self: 2 * self.weight)),
    "an attribute that hides a static method": lambda patch, module: setattr(module, "static", doubled),
    "an attribute that was not there": lambda patch, module: setattr(module, "alpha", 1),
    "one of its configuration": lambda patch, module: setattr(module.config, "once", True),
    "its configuration": lambda patch, module: setattr(module, "config", type("Other", (), {"once": True})()),
    "an eps below the floor": lambda patch, module: setattr(module, "eps", 1e-12),
}


def rows() -> Tensor:
    return (torch.randn(6, N, generator=torch.Generator().manual_seed(3)) * 1e-3).to(BF16)


@functools.cache
def _patched() -> nn.Module:
    module = Reading().to(BF16)
    module.weight.data += 0.3  # one rounding shows
    assert patch(module).replaced == {"Reading": 1}
    return module


def pair() -> tuple[Any, Any]:
    """A replaced norm, and one that is as its class has it."""
    module = copy.deepcopy(_patched())
    unpatch(own := copy.deepcopy(module))
    return module, own


@pytest.mark.sampled(3)
@pytest.mark.parametrize("change", CHANGES)
def test_what_its_own_forward_reads_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (module, own), x = pair(), rows()
    takes = type(module).forward.residual.takes
    before = own(x)
    assert takes(module, x)
    assert torch.equal(module(x), before)
    for one in (module, own):
        CHANGES[change](monkeypatch, one)
    assert not takes(module, x)
    assert torch.equal(module(x), own(x))
    assert not torch.equal(own(x), before) or change == "an eps below the floor"


@pytest.mark.sampled(3)
@pytest.mark.parametrize("change", ["a global", "a helper", "the class", "a method", "one of its configuration"])
def test_compiled_it_is_read_anew_too(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (module, own), x = pair(), rows()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), own(x))
    for one in (module, own):
        CHANGES[change](monkeypatch, one)
    assert torch.equal(compiled(x), own(x))


def test_what_is_around_its_class() -> None:
    once = False

    def switch() -> None:
        nonlocal once
        once = True

    class Around(Base):
        def forward(self, x: Tensor) -> Tensor:
            h = unit(x, self.eps)
            return (self.weight * h).to(x.dtype) if once else self.weight * h.to(x.dtype)

    module, x = Around(N).to(BF16), rows()
    module.weight.data += 0.3
    assert patch(module).replaced == {"Around": 1}
    before = module(x)
    switch()
    assert torch.equal(module(x), Around.forward(module, x))
    assert not torch.equal(module(x), before)


def test_a_copy_made_after_a_change_is_none_of_what_was_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    (module, own), x = pair(), rows()
    kept = pickle.dumps(module)
    monkeypatch.setattr(THIS, "MODE", "once")
    assert torch.equal(pickle.loads(kept)(x), own(x))
    assert torch.equal(copy.deepcopy(module)(x), own(x))


def test_another_process_has_the_same_functions_and_globals_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    outside = outside_of(Reading)
    assert pickle.loads(pickle.dumps(outside)) == outside
    again = types.FunctionType(helped.__code__, vars(THIS), "helped")
    monkeypatch.setattr(THIS, "helped", again)
    assert unchanged(Reading, outside)()
    monkeypatch.setattr(THIS, "MODE", "once")
    assert not unchanged(Reading, outside)()
    monkeypatch.undo()
    monkeypatch.setattr(THIS, "helped", doubled)
    assert not unchanged(Reading, outside)()


def test_a_method_of_a_class_that_is_known_by_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = GemmaRMSNorm(N).to(BF16), rows()
    patch(module)
    norm = GemmaRMSNorm._norm
    monkeypatch.setattr(GemmaRMSNorm, "_norm", lambda self, h: 2 * norm(self, h))
    assert torch.equal(module(x), GemmaRMSNorm.forward(module, x))


# --- columns ----------------------------------------------------------------------------------------------------------


class AnyColumns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return unit(x, 1e-6).to(x.dtype)


class SumOfColumns(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / x.shape[-1] + 1e-6)).to(x.dtype)


class HeadNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = 64

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / self.head_dim + 1e-6)).to(x.dtype)


class EpsOfColumnsNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return unit(x, 1.0 / x.shape[-1]).to(x.dtype)


class WideFrom300Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return unit(x, 1e-6) if x.shape[-1] > 300 else unit(x, 1e-6).to(x.dtype)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("owner", "columns"),
    [(AnyColumns, None), (SumOfColumns, None), (HeadNorm, 64), (EpsOfColumnsNorm, 64), (WideFrom300Norm, 64)],
)
def test_a_norm_without_a_weight_is_used_for_the_columns_that_it_was_proved_for(
    owner: type[nn.Module], columns: int | None
) -> None:
    found = _computation.compute(owner())
    assert isinstance(found, Computation)
    assert found.columns == columns
    module = owner()
    patch(module)
    for n in (64, 128, 320):
        x = (torch.randn(4, n, generator=torch.Generator().manual_seed(4)) * 1e-2).to(BF16)
        y, expected = module(x), owner()(x)
        assert y.dtype == expected.dtype
        assert torch.equal(y, expected)


# --- classes that hear of their subclasses ----------------------------------------------------------------------------

REGISTRY = dict[str, type]()


class Registered(Base):
    def __init_subclass__(cls, *, kind: str) -> None:
        REGISTRY[cls.__name__] = cls


class RegisteredRMSNorm(Registered, kind="norm"):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * unit(x, self.eps).to(x.dtype)


class RegisteredGemma(GemmaRMSNorm):
    def __init_subclass__(cls, *, kind: str) -> None:
        REGISTRY[cls.__name__] = cls


class OfGemma(RegisteredGemma, kind="norm"):
    pass


@pytest.mark.parametrize("owner", [RegisteredRMSNorm, OfGemma])
def test_no_class_hears_of_those_that_replace_it(owner: Any) -> None:
    module, x = owner(N).to(BF16), rows()
    own = module(x)
    assert patch(module).replaced == {owner.__name__: 1}
    assert REGISTRY[owner.__name__] is owner
    assert isinstance(module, owner)
    assert torch.equal(module(x), own)
    assert torch.equal(copy.deepcopy(module)(x), own)
    assert unpatch(module).restored == {owner.__name__: 1}
    assert type(module) is owner


# --- operands ---------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_broadcast_compiles_as_its_own_forward() -> None:
    module, x = transformers.models.llama.modeling_llama.LlamaRMSNorm(1), torch.randn(3, 32)
    own = module(x)
    patch(module)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), own)
