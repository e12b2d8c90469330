"""Norms whose forward is more than one formula of x: it has effects, state, branches or chance, takes or returns more,
calls other modules, or cuts gradients.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.interop.zoo_entries import Base, Tensor, refused


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


@refused("uses random")
class Random(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + random.choice([1e-5, 1e-6]))).to(
            x.dtype
        )


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


@refused("computes something else for (1, 2, 2, 64)")
class AnotherInFourAxes(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * h).to(x.dtype) if x.dim() == 4 else self.weight * h.to(x.dtype)


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


@refused("raises NotImplementedError when it is traced")
class Unfinished(Base):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@refused("has no gradients")
class NoGrad(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


@refused("needs more than one input: gate")
class GatedRMSNorm(Base):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * F.silu(gate)


@refused("returns a tuple")
class ReturnsTwo(Base):
    def forward(self, x: Tensor) -> Any:
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype), x


@refused("partial")
class PartialForward(Base):
    def compute(self, scale: float, x: Tensor) -> Tensor:
        return scale * x

    forward = functools.partial(compute, 2.0)
