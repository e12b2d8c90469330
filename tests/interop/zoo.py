"""Norm modules as people write them, labelled by what they compute, and others that are wrong by one step.

Each class takes the row length. `computes` says which of LABELS it is; `refused` a part of the reason why it is left.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

Tensor = torch.Tensor
EPS = 1e-5
ZOO: dict[str, tuple[Callable[[int], nn.Module], str]] = {}
WRONG: dict[str, tuple[Callable[[int], nn.Module], str]] = {}


def promoted(y: Tensor, x: torch.dtype, w: Tensor) -> Tensor:
    return y.to(torch.promote_types(x, w.dtype))


# y of unit = x * rstd in float32, x's dtype and the parameters, by label.
LABELS: dict[str, Callable[..., Tensor]] = {
    "llama": lambda unit, x, w, b: promoted(unit.to(x).float() * w.float(), x, w),
    "llama to x": lambda unit, x, w, b: promoted(unit.to(x).float() * w.float(), x, w).to(x),
    "olmo2": lambda unit, x, w, b: (unit * w.float()).to(x),
    "wide": lambda unit, x, w, b: unit * w.float(),
    "gemma": lambda unit, x, w, b: (unit * (1.0 + w.float())).to(x),
    "centered": lambda unit, x, w, b: (unit * (1.0 + w).float()).to(x),
    "llama centered": lambda unit, x, w, b: promoted(unit.to(x).float() * (1.0 + w).float(), x, w),
    "weight in x": lambda unit, x, w, b: (unit.to(x).float() * w.to(x).float()).to(x),
    "weightless": lambda unit, x, w, b: unit.to(x),
    "weightless wide": lambda unit, x, w, b: unit,
    "biased": lambda unit, x, w, b: promoted(unit.to(x).float() * w.float(), x, w) + b,
}


def computes(label: str) -> Callable[[Any], Any]:
    def add(owner: Any) -> Any:
        ZOO[owner.__name__] = owner, label
        return owner

    return add


def refused(reason: str) -> Callable[[Any], Any]:
    def add(owner: Any) -> Any:
        WRONG[owner.__name__] = owner, reason
        return owner

    return add


class Base(nn.Module):
    def __init__(self, n: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps


# --- Llama's, in many hands -------------------------------------------------------------------------------------------


@computes("llama")
class OtherNamesRMSNorm(Base):
    def forward(self, tokens: Tensor) -> Tensor:
        kind = tokens.dtype
        wide = tokens.to(torch.float32)
        power = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(power + self.eps)
        return self.weight * wide.to(kind)


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
class GammaScaled(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.epsilon = 1e-6

    def forward(self, inputs: Tensor) -> Tensor:
        scale = torch.rsqrt(self.epsilon + torch.mean(inputs.float() ** 2, dim=-1, keepdim=True))
        return (inputs.float() * scale).to(inputs.dtype).mul(self.gamma)


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
class Flattened(Base):
    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        rows = x.reshape(-1, shape[-1]).float()
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + self.eps)
        return (rows.to(x.dtype) * self.weight).view(shape)


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


@computes("llama")
class InTheFloatCopy(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32, copy=True)
        h.mul_(torch.rsqrt(h.pow(2).mean(-1, keepdim=True).add_(self.eps)))
        return self.weight * h.to(x.dtype)


@computes("llama")
class ShapeChecked(Base):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.weight.shape[0]:
            raise ValueError("wrong width")
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


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
class OptionalScale(nn.Module):
    def __init__(self, n: int, *, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps, self.elementwise_affine = EPS, elementwise_affine
        self.weight = nn.Parameter(torch.ones(n)) if elementwise_affine else None

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        y = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return y if self.weight is None else self.weight * y


@computes("llama")
class Inherited(MetaRMSNorm):
    """Its helper is that of its base, and it calls it through super."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


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


# --- one rounding -----------------------------------------------------------------------------------------------------


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


# --- wrong by one step ------------------------------------------------------------------------------------------------


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


@refused("regroups its columns")
class GroupedRMSNorm(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float().view(*x.shape[:-1], 4, -1)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.flatten(-2).to(x.dtype)


@refused("clamp")
class Clamped(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True).clamp(min=self.eps))).to(x.dtype)


@refused("may call other modules")
class WithDropout(Base):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.dropout(self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype))


@refused("uses dropout")
class FunctionalDropout(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        y = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return F.dropout(y, 0.1, self.training)


@refused("sets the attribute calls")
class Counting(Base):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("uses print")
class Printing(Base):
    def forward(self, x: Tensor) -> Tensor:
        print(x.shape)  # noqa: T201
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


SEEN: list[Any] = []


@refused("uses SEEN")
class Appending(Base):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.shape)
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("reads its attribute log")
class Logging(Base):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.log: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        self.log.append(None)
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("uses random")
class Random(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + random.choice([1e-5, 1e-6]))).to(
            x.dtype
        )


@refused("calls torch's")
class BranchesOnData(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        if h.abs().max() > 1e4:
            h = h / 2
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("branches on its input's shape")
class BranchesOnRows(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        y = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
        return y * 2 if x.shape[0] > 1000 else y


@refused("on CUDA")
class BranchesOnTheDevice(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(x.dtype) if x.is_cuda else self.weight * h.to(x.dtype)


@refused("in training")
class AnotherInTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(x.dtype) if self.training else self.weight * h.to(x.dtype)


@refused("writes to its input")
class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h.mul_(torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps))
        return self.weight * h.to(x.dtype)


@refused("detach")
class DetachedStatistics(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.detach().pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("gradients")
class StatisticsWithoutGrad(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        with torch.no_grad():
            rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (h * rstd).to(x.dtype)


@refused("has no gradients")
class NoGrad(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("returns a tuple")
class ReturnsTwo(Base):
    def forward(self, x: Tensor) -> Any:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype), x


@refused("needs more than one input: gate")
class GatedRMSNorm(Base):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * F.silu(gate)


@refused("rounds to bfloat16 and again to float32")
class ProductRoundedThenWide(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)).float()


@refused("of its weight")
class ExponentialWeight(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (self.weight * 2.0) * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("rounds the normalised x to bfloat16")
class AlwaysBfloat16(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(torch.bfloat16)


@refused("not in float32")
class DoubleStatistics(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.double()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("over other axes")
class WholeTensor(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean() + self.eps)).to(x.dtype)


@refused("where one dimension")
class ScalarScaleNorm(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.scalar * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@refused("neither its input nor a parameter")
class EpsBuffer(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = torch.tensor(1e-6)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("reads its attribute function, a function")
class FunctionAttribute(Base):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.function = lambda h: SEEN.append(h) or h

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(x.float())
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("computes something else for (1, 2, 2, 64)")
class AnotherInFourAxes(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(x.dtype) if x.dim() == 4 else self.weight * h.to(x.dtype)


@refused("partial")
class PartialForward(Base):
    def compute(self, scale: float, x: Tensor) -> Tensor:
        return scale * x

    forward = functools.partial(compute, 2.0)
