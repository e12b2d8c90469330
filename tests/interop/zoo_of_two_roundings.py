"""Llama's norm, which rounds before and after its weight: its formula as different hands write it, in one forward."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn

from tests.interop.zoo_entries import Base, Tensor, computes


@computes("llama")
class OtherNamesRMSNorm(Base):
    def forward(self, tokens: Tensor) -> Tensor:
        kind = tokens.dtype
        wide = tokens.to(torch.float32)
        power = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(power + self.eps)
        return self.weight * wide.to(kind)


@computes("llama")
class SquareByProduct(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * (h * h).mean(dim=-1, keepdim=True).add(self.eps).rsqrt()).to(x.dtype) * self.weight


@computes("llama")
class SumOverN(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float)
        ms = h.square().sum(-1, keepdim=True) / h.shape[-1]
        return self.weight * (h * torch.rsqrt(ms + self.eps)).type(x.dtype)


@computes("llama")
class WithBareAssertion(Base):
    """Which raises an error without a word for a row alone: of that, the report took the first line."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() > 1
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@computes("llama")
class UnsqueezedMean(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        r = torch.rsqrt((h**2).mean(-1) + self.eps)
        return (h * r.unsqueeze(-1)).to(x.dtype) * self.weight


@computes("llama")
class IndexedNone(Base):
    def forward(self, x: Tensor) -> Tensor:
        r = torch.rsqrt(torch.mean(torch.square(x.float()), -1) + self.eps)[..., None]
        return (x * r).to(x.dtype) * self.weight


@computes("llama")
class OneOverSqrt(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        inverse = 1.0 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (h * inverse).to(x.dtype)


@computes("llama")
class PowerOfMinusHalf(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * (h.pow(2).mean(-1, keepdim=True) + self.eps) ** -0.5).to(x.dtype)


@computes("llama")
class InTheFloatCopy(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32, copy=True)
        h.mul_(torch.rsqrt(h.pow(2).mean(-1, keepdim=True).add_(self.eps)))
        return self.weight * h.to(x.dtype)


@computes("llama")
class MeanByProduct(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) * (1.0 / x.size(-1)) + self.eps)).to(
            x.dtype
        )


@computes("llama")
class MathInside(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + math.pow(10.0, -5))).to(x.dtype)


@computes("llama")
class GammaScaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.epsilon = 1e-6

    def forward(self, inputs: Tensor) -> Tensor:
        scale = torch.rsqrt(self.epsilon + torch.mean(inputs.float() ** 2, dim=-1, keepdim=True))
        return (inputs.float() * scale).to(inputs.dtype).mul(self.gamma)


@computes("llama")
class Flattened(Base):
    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        rows = x.reshape(-1, shape[-1]).float()
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps)
        return (rows.to(x.dtype) * self.weight).view(shape)


@computes("llama")
class ViewedWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return h * self.weight.unsqueeze(0)


@computes("llama")
class ThreeAxes(Base):
    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        h = x.reshape(batch * time, width).float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h.to(x.dtype) * self.weight).view(batch, time, width)


@computes("llama")
class LowPrecisionOnly(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@computes("llama")
class AutocastOff(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(device_type="cpu", enabled=False):
            h = x.float()
            return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@computes("llama")
class ShapeChecked(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.weight.shape[0]:
            raise ValueError("wrong width")
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@computes("llama")
class VllmStyle(Base):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is not None:
            x = x + residual
            residual = x
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        y = h.to(x.dtype) * self.weight
        return y if residual is None else (y, residual)
