"""Norms wrong by one step of the formula: another mean, root, eps, dtype, rounding or weight."""

from __future__ import annotations

import torch
import torch.nn as nn

from tests.interop.zoo_entries import Base, Tensor, refused


@refused("adds its eps outside the root")
class EpsOutside(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * (1.0 / (torch.sqrt(h.pow(2).mean(-1, keepdim=True)) + self.eps))).to(x.dtype)


@refused("adds its eps outside the root")
class EpsAfterRsqrt(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * (torch.rsqrt(h.pow(2).mean(-1, keepdim=True)) + self.eps)).to(x.dtype)


@refused("divides by the root")
class DividesByTheRoot(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("divides the sum of squares by 63")
class MeanOverNMinusOne(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        mean = h.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)
        return self.weight * (h * torch.rsqrt(mean + self.eps)).to(x.dtype)


@refused("not of a mean of squares")
class SumWithoutMean(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("subtracts")
class Centres(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h - h.mean(-1, keepdim=True)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("calls torch's abs")
class MeanOfAbsoluteValues(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.abs().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("raises to the power 3")
class Cubes(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(3).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("clamp")
class Clamped(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True).clamp(min=self.eps))).to(x.dtype)


@refused("over other axes")
class OtherAxisRMSNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-2, keepdim=True) + self.eps)).to(x.dtype)


@refused("over other axes")
class TwoAxes(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean((-1, -2), keepdim=True) + self.eps)).to(x.dtype)


@refused("over other axes")
class WholeTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean() + self.eps)).to(x.dtype)


@refused("regroups its columns")
class GroupedRMSNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float().view(*x.shape[:-1], 4, -1)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.flatten(-2).to(x.dtype)


@refused("in bfloat16, not in float32")
class LowStatistics(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


@refused("squares and averages in bfloat16")
class LowSquares(Base):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True, dtype=torch.float32)
        return self.weight * (x.float() * torch.rsqrt(mean + self.eps)).to(x.dtype)


@refused("rounds the reciprocal root itself")
class LowRstd(Base):
    def forward(self, x: Tensor) -> Tensor:
        rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (x * rstd.to(x.dtype))


@refused("not in float32")
class DoubleStatistics(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.double()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("normalises")
class WeightFirst(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return ((self.weight * h) * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("multipl")
class WeightTimesRstd(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * (self.weight * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps))).to(x.dtype)


@refused("of its weight")
class ExponentialWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (self.weight * 2.0) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("where one dimension")
class ScalarScaleNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.scalar * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@refused("rounds to bfloat16 and again to float32")
class ProductRoundedThenWide(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)).float()


@refused("rounds the normalised x to bfloat16")
class AlwaysBfloat16(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(torch.bfloat16)
