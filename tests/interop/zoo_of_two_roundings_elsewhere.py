"""Llama's norm, of which a part stands elsewhere than in its forward: its eps, its weight or a helper."""

from __future__ import annotations

import dataclasses
import types

import torch
import torch.nn as nn

from tests.interop.zoo_entries import EPS, Base, Tensor, computes


@computes("llama")
class MetaRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


@computes("llama")
class Inherited(MetaRMSNorm):
    """Its helper is that of its base, and it calls it through super."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@dataclasses.dataclass
class Config:
    dim: int
    norm_eps: float = 2e-5
    use_scale: bool = True


@computes("llama")
class FromDataclass(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.config = Config(n)
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.config.norm_eps)
        h = h.to(x.dtype)
        return h * self.weight if self.config.use_scale else h


@computes("llama")
class FromNamespace(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.cfg = types.SimpleNamespace(hidden=n, rms_norm_eps=3e-6)
        self.g = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        x = x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + self.cfg.rms_norm_eps)
        return self.g * x.to(dtype)


@computes("llama")
class ConstantEps(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@computes("llama")
class PropertyEps(Base):
    @property
    def variance_epsilon(self) -> float:
        return self.eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


@computes("llama")
class ClassEps(nn.Module):
    eps = 4e-6

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@computes("llama")
class OptionalScale(nn.Module):
    def __init__(self, n: int, *, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps, self.elementwise_affine = EPS, elementwise_affine
        self.weight = nn.Parameter(torch.ones(n)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        y = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return y if self.weight is None else self.weight * y


def rms(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


@computes("llama")
class ByFunction(Base):
    def forward(self, x: Tensor) -> Tensor:
        return rms(x.float(), self.eps).to(x.dtype) * self.weight


def whole_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * rms(x.float(), eps).type_as(x)


@computes("llama")
class Functional(Base):
    def forward(self, x: Tensor) -> Tensor:
        return whole_norm(x, self.weight, eps=self.eps)


@computes("llama")
class StaticHelper(Base):
    @staticmethod
    def statistics(h: Tensor, eps: float) -> Tensor:
        return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * self.statistics(h, self.eps)).to(x.dtype)
