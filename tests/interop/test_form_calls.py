"""The prepared calls of other forms than the norm's own, and what becomes of a form that has no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm.gated_reference import Form
from pallas_norm.plans.fitting import Misfit
from pallas_norm_torch import (
    _form_calls,
    direct,
    explain,
    launch,
    rms_norm,
    rms_norm_gated,
    rms_norm_quantized,
    rms_norm_rope,
)
from pallas_norm_torch._kernels import Gated
from pallas_norm_torch.prepared_gated import GatedCall
from pallas_norm_torch.programs import Program
from tests.interop.cases import assert_same, draw
from tests.interop.fake_kernels import FakeKernel, made  # noqa: F401  a fixture

BF16 = torch.bfloat16
X, WEIGHT = draw(5, 1024, dtype=BF16), draw(1024, dtype=BF16, seed=1)
HEADS, ANGLES = draw(5, 2, 128, dtype=BF16), draw(5, 128, dtype=BF16, seed=2)
CALLS: dict[str, tuple[int, str, Callable[[], Any]]] = {  # by kind of program: row length, what explain calls it
    "quantized": (1024, "results of 8 bits", lambda: rms_norm_quantized(X, WEIGHT)),
    "gated": (1024, "gated norms", lambda: (rms_norm_gated(X, X, WEIGHT),)),
    "rope": (128, "rotated heads", lambda: rms_norm_rope(HEADS, HEADS, ANGLES, ANGLES)),
}


@pytest.mark.parametrize("error", [launch.Unavailable, Misfit])
@pytest.mark.parametrize("kind", CALLS)
def test_a_form_without_a_kernel_is_asked_for_once_told_and_alone(
    kind: str,
    error: type[Exception],
    made: dict[Program, FakeKernel],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each form had a way of its own: one forgot the reason, one told nobody, and one took the kernels of every norm of
    that length with it, which have other bits than torch's statements."""
    n, form, call = CALLS[kind]
    own, asked = launch.kernel, list[str]()

    def refused(program: Program, device: int) -> Any:
        asked.append(program.kind)
        if program.kind == kind:
            raise error("planted")
        return own(program, device)

    monkeypatch.setattr(launch, "kernel", refused)
    of_norms = dict(direct._refused)
    found = call()
    for one, other in zip(found, call(), strict=True):
        assert_same(one.float(), other.float())
    assert asked.count(kind) == 1
    assert not any(program.kind == kind for program in made)
    assert direct._refused == of_norms

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(direct, "unavailable", lambda n, device, dtype: None)
    monkeypatch.setattr(_form_calls, "_refused", {(*key[:2], 0): why for key, why in _form_calls._refused.items()})
    assert explain(n, BF16, "cuda:0").endswith(f"; {form} in steps, because planted")
    assert "because" not in explain(n + 128, BF16, "cuda:0")
    assert "because" not in explain(n, torch.float32, "cuda:0")

    before = len(made)
    rms_norm(draw(5, n, dtype=BF16), draw(n, dtype=BF16))  # with fewer rows two kernels
    assert len(made) in (before, before + 1)  # of rotated heads the steps have it already
    assert any(program.kind == "forward" and program.n == n for program in made)


def planted(monkeypatch: pytest.MonkeyPatch, *kernels: Any) -> dict[Any, Any]:
    found = {(GatedCall, kernel, 0): (Misfit, "planted") for kernel in kernels}
    monkeypatch.setattr(_form_calls, "_refused", found)
    return found


def gated(group: int = 1024, **changes: Any) -> Gated:
    kernel = Gated(1024, BF16, BF16, BF16, Spec(), Form("silu", norm_before_gate=True, group=group), with_rstd=False)
    return kernel._replace(**changes)


def test_each_refusal_is_told_once_and_with_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is one for each eps, too, of which a reader sees nothing."""
    planted(monkeypatch, gated(), gated(spec=Spec(1e-5)), gated(128), gated(128, with_rstd=True))
    assert _form_calls.refusals(1024, BF16, 0) == [
        ("gated norms", "planted"),
        ("gated norms in groups of 128", "planted"),
    ]
    assert _form_calls.refusals(1024, BF16, 1) == _form_calls.refusals(1024, torch.float32, 0) == []


def test_refusals_of_another_thread_while_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    known = planted(monkeypatch, gated(), gated(128))
    monkeypatch.setattr(GatedCall, "FORM", Naming(lambda: known.update({(GatedCall, gated(512), 0): (Misfit, "late")})))
    assert len(_form_calls.refusals(1024, BF16, 0)) == 2
    assert len(_form_calls.refusals(1024, BF16, 0)) == 3


class Naming:
    """The name of a form; while it is read another thread refuses."""

    def __init__(self, refuse: Callable[[], None]) -> None:
        self.refuse = refuse

    def __get__(self, *owner: object) -> str:
        self.refuse()
        return "gated norms"


class One(NamedTuple):
    n: int


class Other(NamedTuple):
    n: int


def test_kernels_of_two_forms_that_are_equal_tuples_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_form_calls, "_calls", {})
    assert One(128) == Other(128)
    makes = [lambda kernel, device: ("one", device), lambda kernel, device: ("other", device)]
    found = [_form_calls.call_of(make, kernel(128), 0) for make, kernel in zip(makes, (One, Other), strict=True)]
    assert found == [("one", 0), ("other", 0)]
    assert _form_calls.call_of(makes[0], One(128), 1) == ("one", 1)
    assert _form_calls.call_of(makes[0], One(128), 0) is found[0]
