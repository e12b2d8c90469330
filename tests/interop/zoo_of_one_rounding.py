"""Norms that multiply by their weight in float32 and round once at the end, if at all."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.interop.zoo_entries import EPS, Base, Tensor, computes


@computes("olmo2")
class OneRoundingRMSNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).to(x.dtype)


@computes("olmo2")
class FunctionalRmsNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


@computes("olmo2")
class FunctionalWide(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


@computes("olmo2")
class LitGptLike(nn.Module):
    def __init__(self, size: int, dim: int = -1, eps: float = EPS, add_unit_offset: bool = False) -> None:  # noqa: FBT001, FBT002
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.dim, self.add_unit_offset = eps, dim, add_unit_offset

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        norm_x = torch.mean(x * x, dim=self.dim, keepdim=True)
        x_normed = x * torch.rsqrt(norm_x + self.eps)
        weight = (1 + self.weight) if self.add_unit_offset else self.weight
        return (x_normed * weight.float()).to(dtype=dtype)


@computes("centered")
class LitGptOffset(LitGptLike):
    def __init__(self, size: int) -> None:
        super().__init__(size, add_unit_offset=True)

    forward = LitGptLike.forward


@computes("olmo2")
class TorchtuneLike(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.normalized_shape = (dim,)
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x_fp32 = x.float()
        x_normed = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x_normed * self.scale).type_as(x)


@computes("wide")
class StaysWide(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight.float()


@computes("gemma")
class GemmaLike(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return ((1.0 + self.weight.float()) * h).to(x.dtype)


@computes("gemma")
class GemmaByScale(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(n))

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.float32)
        wide = wide * torch.rsqrt(torch.mean(torch.square(wide), dim=-1, keepdim=True) + 1e-6)
        return (wide * self.scale.to(torch.float32).add(1)).type_as(hidden)


@computes("centered")
class RoundedOffset(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps) * (1.0 + self.weight).float()).to(x.dtype)
