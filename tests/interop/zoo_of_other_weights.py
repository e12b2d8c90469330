"""Norms that are neither Llama's nor of one rounding: another weight after the cast, none, or a bias beside it."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.interop.zoo_entries import EPS, Base, Tensor, computes


@computes("llama centered")
class OffsetAfterTheCast(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * (1.0 + self.weight)


@computes("weight in x")
class WeightCastToX(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


@computes("llama to x")
class BackToX(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)).to(x.dtype)


@computes("weightless")
class NoWeightRMSNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.eps = EPS

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@computes("weightless")
class QKNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.n,), eps=1e-6)


@computes("weightless wide")
class NoWeightWideNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


@computes("biased")
class BiasedRMSNorm(Base):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) + self.bias
