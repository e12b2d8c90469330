"""Tensors whose memory holds other values than they have, or none, or may not be saved: seen by every way in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pallas_norm_torch import _library, add_rms_norm, rms_norm
from pallas_norm_torch.programs import Program
from tests.interop.cases import assert_same, draw
from tests.interop.fake_kernels import FakeKernel, made  # noqa: F401 (a fixture)

BF16 = torch.bfloat16
N = 64


def x() -> torch.Tensor:
    return draw(3, N, dtype=BF16)


def weight() -> torch.Tensor:
    return draw(N, dtype=BF16, seed=1)


def negated(tensor: torch.Tensor) -> torch.Tensor:
    return torch._neg_view(tensor)


def imaginary(tensor: torch.Tensor) -> torch.Tensor:
    return torch.complex(torch.zeros_like(tensor.float()), tensor.float()).conj().imag.to(BF16)


def no_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


@pytest.fixture
def prepared_calls(made: dict[Program, FakeKernel]) -> None:  # noqa: F811
    """Plain calls like those below were made before, and are launched from now on."""
    for _ in range(2):
        rms_norm(x(), weight())
        rms_norm(x(), weight(), out=x())
        add_rms_norm(x(), x(), weight())
    assert sum(len(kernel.launches) for kernel in made.values()) == 6


@pytest.mark.usefixtures("prepared_calls")
@pytest.mark.parametrize(("lazily", "said"), [(negated, "negated lazily"), (no_memory, "a zero tensor")])
@pytest.mark.parametrize("name", ["x", "residual", "weight", "out"])
def test_a_call_like_one_before_sees_what_the_first_would(name: str, lazily: Any, said: str) -> None:
    """A launch on the raw memory of a negated view gave other values, every one of them."""
    operands = {"x": x(), "weight": weight(), name: lazily(weight() if name == "weight" else x())}
    norm: Any = add_rms_norm if name == "residual" else rms_norm
    with pytest.raises(TypeError, match=f"^{name} is {said}"):
        norm(**operands)
    if name not in ("residual", "out"):
        with pytest.raises(TypeError, match=f"^{name} is {said}"):
            add_rms_norm(**operands, residual=x())


@pytest.mark.parametrize("lazily", [negated, no_memory])
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_that_are_lazy_reach_no_launch(which: int, lazily: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    right = _library.backward

    def backward(*operands: Any, **options: Any) -> Any:
        seen.extend(t.is_neg() or t._is_zerotensor() for t in operands if isinstance(t, torch.Tensor))
        return right(*operands, **options)

    monkeypatch.setattr(_library, "backward", backward)
    leaves = [tensor.requires_grad_() for tensor in (x(), x(), weight())]
    results = add_rms_norm(*leaves)
    gradients = [draw(3, N, dtype=BF16, seed=seed) for seed in (5, 6)]
    gradients[which] = lazily(gradients[which])
    plain = [torch.zeros_like(x()) if g._is_zerotensor() else g.resolve_neg().clone() for g in gradients]
    found = torch.autograd.grad(results, leaves, gradients, retain_graph=True)
    for gradient, expected in zip(found, torch.autograd.grad(results, leaves, plain), strict=True):
        assert_same(gradient, expected)
    assert seen
    assert not any(seen)


# --- inference mode ---------------------------------------------------------------------------------------------------


def of_inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("operator", [False, True])
@pytest.mark.parametrize("inference", [{"x"}, {"weight"}, {"x", "residual"}, {"residual"}])
def test_operands_made_in_inference_mode_train(inference: set[str], *, operator: bool) -> None:
    """Hugging Face's modules save a float copy of x, so features of a frozen encoder train the norm behind it."""
    values = {"x": x(), "residual": x().flip(0), "weight": weight()}

    def gradients(values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        given = [v if v.is_inference() else v.clone().requires_grad_() for v in values.values()]
        if operator:
            y, s, _ = torch.ops.pallas_norm.add_rms_norm(*given, 1e-6, True, 0.0)  # noqa: FBT003
            z, _ = torch.ops.pallas_norm.rms_norm(given[0], given[2], 1e-6, True, 0.0)  # noqa: FBT003
        else:
            (y, s), z = add_rms_norm(*given), rms_norm(given[0], given[2])
        total = y.float().square().sum() + s.float().sum() + z.float().square().sum()
        return list(torch.autograd.grad(total, [v for v in given if v.requires_grad], create_graph=True))

    found = gradients({name: of_inference(v) if name in inference else v for name, v in values.items()})
    expected = [g for g, name in zip(gradients(values), values, strict=True) if name not in inference]
    assert len(found) == 3 - len(inference)
    for gradient, right in zip(found, expected, strict=True):
        assert_same(gradient.detach(), right.detach())


def test_a_gradient_made_in_inference_mode_is_differentiated() -> None:
    leaf = x().float().requires_grad_()
    dy = of_inference(torch.ones(3, N))
    (first,) = torch.autograd.grad(rms_norm(leaf), leaf, dy, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    (again,) = torch.autograd.grad(rms_norm(leaf), leaf, torch.ones(3, N), create_graph=True)
    assert_same(second, torch.autograd.grad(again.square().sum(), leaf)[0])
