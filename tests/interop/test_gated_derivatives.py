"""Second derivatives of rms_norm_gated are those of the formula; only the gradients that are asked for are given."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pallas_norm_torch import rms_norm, rms_norm_gated
from tests.interop.cases import assert_same
from tests.interop.gated_cases import operands

Tensor = torch.Tensor


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_second_derivatives_are_those_of_the_formula(activation: str, before: bool) -> None:  # noqa: FBT001
    rng = np.random.default_rng(0)
    given = [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((5, 96), (5, 96), 96)]

    def plain(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        a = torch.nn.functional.silu(gate) if activation == "silu" else torch.sigmoid(gate)
        h = (x if before else x * a).view(5, 3, 32)
        unit = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).view(5, 96)
        return unit * weight * a if before else unit * weight

    def ours(*operands: Tensor) -> Tensor:
        return rms_norm_gated(*operands, activation=activation, norm_before_gate=before, group_size=32)

    found: list[tuple[Tensor, ...]] = []
    for function in (ours, plain):
        leaves = [tensor.clone().requires_grad_() for tensor in given]
        first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        total = sum((gradient * gradient).sum() for gradient in first)
        assert isinstance(total, Tensor)
        found.append((*first, *torch.autograd.grad(total, leaves)))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()


def test_only_the_gradients_that_are_asked_for_are_given() -> None:
    x, gate, weight = operands(torch.float32, 64)
    for wanted in range(3):
        leaves = [tensor.clone().requires_grad_(i == wanted) for i, tensor in enumerate((x, gate, weight))]
        rms_norm_gated(*leaves).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == wanted for i in range(3)]
    y = rms_norm_gated(x, gate.fill_(100), weight, activation="sigmoid")
    assert_same(y, rms_norm(x, weight))
