"""Operands whose results are known before anything is computed, on any device.

Each row of x is a row of signs times a power of two, so unit is the signs: eps moves it by less than 1e-5, and bfloat16
rounds that away. So y is weight * sign, and dweight a sum of integers. dx is rounded from numbers that eps moved.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pallas_norm_torch import add_rms_norm, rms_norm
from tests.interop.cases import assert_same

Tensor = torch.Tensor
BF16 = torch.bfloat16
# |dy| <= 3, |weight| <= 2, so |dy * weight| and its mean with unit are at most 6; a power of two of at least 1 leaves
# eps a relative 1e-6 of each, twice (rstd, unit): 2.4e-5, and bfloat16 rounds once.
DX_ABSOLUTE, DX_RELATIVE = 2.4e-5, 2.0**-8


@dataclasses.dataclass(frozen=True)
class Known:
    x: Tensor
    weight: Tensor
    y: Tensor
    dy: Tensor
    dx: Tensor  # in float64, not rounded
    dweight: Tensor

    def check_forward(self, y: Tensor) -> None:
        assert y.device == self.y.device
        assert_same(y, self.y)

    def check_gradients(self, dx: Tensor | None, dweight: Tensor | None) -> None:
        assert dx is not None
        assert dweight is not None
        assert dx.device == dweight.device == self.x.device
        assert_same(dweight, self.dweight)
        off = (dx.double() - self.dx).abs()
        worst = (off - DX_RELATIVE * self.dx.abs()).max().item()
        assert worst <= DX_ABSOLUTE, f"dx is off by {worst} more than a rounding"

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.x.detach().clone().requires_grad_(), self.weight.detach().clone().requires_grad_()


def of(device: Any, n: int = 4096, rows: int = 96, seed: int = 0) -> Known:
    draw = torch.Generator().manual_seed(1000 * n + seed)

    def pick(*shape: int, among: list[float]) -> Tensor:
        return torch.tensor(among)[torch.randint(len(among), shape, generator=draw)]

    sign = pick(rows, n, among=[-1.0, 1.0])
    power = pick(rows, 1, among=[1.0, 2.0, 4.0])
    weight = pick(n, among=[-1.0, 0.5, 1.0, 2.0])
    dy = pick(rows, n, among=[-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])
    g = dy.double() * weight
    dx = (g - sign * (g * sign).mean(-1, keepdim=True)) / power
    x, y, dweight = sign * power, weight * sign, (dy * sign).sum(0)
    x, weight, y, dy, dweight = (value.to(BF16).to(device) for value in (x, weight, y, dy, dweight))
    return Known(x, weight, y, dy, dx.to(device), dweight)


def check_all(case: Known) -> None:
    """Forward, with a residual, in place, into a tensor, strided, backward."""
    case.check_forward(rms_norm(case.x, case.weight))
    y, s = add_rms_norm(case.x, torch.zeros_like(case.x), case.weight)
    case.check_forward(y)
    assert_same(s, case.x)
    out = torch.full_like(case.x, float("nan"))
    case.check_forward(rms_norm(case.x, case.weight, out=out))
    x = case.x.clone()
    assert rms_norm(x, case.weight, out=x) is x
    case.check_forward(x)
    fused = torch.full((len(x), 3, x.shape[-1]), float("nan"), dtype=BF16, device=x.device)
    fused[:, 1] = case.x
    case.check_forward(rms_norm(fused[:, 1], case.weight))
    check_backward(case)


def check_backward(case: Known) -> None:
    x, weight = case.leaves()
    y = rms_norm(x, weight)
    case.check_forward(y.detach())
    y.backward(case.dy)
    case.check_gradients(x.grad, weight.grad)
