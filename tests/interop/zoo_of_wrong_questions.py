"""Norms whose forward asks for more than values, shapes, dtypes and devices, or has another eps or effects by a way of
its own: each is right for the inputs that a proof would take, and another norm for others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn

from tests.interop.zoo_entries import Base, Tensor, refused


def unit(x: Tensor, eps: float) -> Tensor:
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)


class Asking(Base):
    """Rounds once where the question says so, and twice otherwise."""

    def once(self, x: Tensor) -> bool:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = unit(x, self.eps)
        return (self.weight * h).to(x.dtype) if self.once(x) else self.weight * h.to(x.dtype)


# --- eps --------------------------------------------------------------------------------------------------------------


@refused("has an eps of 0.000976562 in float16, where it is 0.0078125 in bfloat16")
class EpsOfTheDtype(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * unit(x, torch.finfo(x.dtype).eps).to(x.dtype)


@refused("in training")
class EpsInTraining(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * unit(x, 1e-3 if self.training else self.eps).to(x.dtype)


@refused("on CUDA")
class EpsOnCuda(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * unit(x, 1e-3 if x.is_cuda else 1e-6).to(x.dtype)


# --- shapes -----------------------------------------------------------------------------------------------------------


@refused("computes something else for (1, 64)")
class OneRow(Asking):
    def once(self, x: Tensor) -> bool:
        return x.dim() == 2 and x.shape[0] == 1


@refused("branches on its input's shape")
class ManyHeads(Asking):
    def once(self, x: Tensor) -> bool:
        return x.dim() == 4 and x.shape[1] > 8


# --- what a tensor or torch is beside ---------------------------------------------------------------------------------


@refused("uses requires_grad")
class Frozen(Asking):
    def once(self, x: Tensor) -> bool:
        return not self.weight.requires_grad


@refused("uses is_leaf")
class Leaf(Asking):
    def once(self, x: Tensor) -> bool:
        return x.is_leaf


@refused("uses is_contiguous")
class Contiguous(Asking):
    def once(self, x: Tensor) -> bool:
        return not getattr(x, "is_contiguous")()  # noqa: B009


@refused("uses is_inference_mode_enabled")
class Inference(Asking):
    def once(self, x: Tensor) -> bool:
        return torch.is_inference_mode_enabled()


@refused("uses are_deterministic_algorithms_enabled")
class Deterministic(Asking):
    def once(self, x: Tensor) -> bool:
        return torch.are_deterministic_algorithms_enabled()


@refused("reads zero_centered of a tensor")
class Marked(Asking):
    def once(self, x: Tensor) -> bool:
        return getattr(self.weight, "zero_centered", False)


@refused("uses is_initialized")
class TensorParallel(Asking):
    def once(self, x: Tensor) -> bool:
        return dist.is_initialized()


@refused("uses torch.distributed")
class InAWorld(Asking):
    def once(self, x: Tensor) -> bool:
        return bool(dist)


# --- effects ----------------------------------------------------------------------------------------------------------


@refused("uses __setattr__")
class SetsByObject(Base):
    def forward(self, x: Tensor) -> Tensor:
        object.__setattr__(self, "last", x)
        return self.weight * unit(x, self.eps).to(x.dtype)


@refused("uses __setattr__")
class SetsBySuper(Base):
    def forward(self, x: Tensor) -> Tensor:
        super().__setattr__("last", x)
        return self.weight * unit(x, self.eps).to(x.dtype)


@refused("has a list as a default of forward")
class DefaultLog(Base):
    def forward(self, x: Tensor, log: Any = []) -> Tensor:  # noqa: B006
        log.append(1)
        return self.weight * unit(x, self.eps).to(x.dtype)


@refused("may read log of its class, a list")
class ClassLog(Base):
    log: Any = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        ClassLog.log.append(1)
        return self.weight * unit(x, self.eps).to(x.dtype)


class Reporting(Base):
    def report(self) -> None:
        print("called")  # noqa: T201


@refused("uses print")
class CallsByAText(Reporting):
    def forward(self, x: Tensor) -> Tensor:
        getattr(self, "re" + "port")()
        return self.weight * unit(x, self.eps).to(x.dtype)


@refused("calls getattr with a name that is no constant")
class CallsByAName(Reporting):
    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.which = "report"

    def forward(self, x: Tensor) -> Tensor:
        getattr(self, self.which)()
        return self.weight * unit(x, self.eps).to(x.dtype)


@refused("calls eval, which its code does not name")
class CallsWhatEveryModuleHas(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.eval()
        return self.weight * unit(x, self.eps).to(x.dtype)


@refused("uses requires_grad_")
class Freezes(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.requires_grad_(False)  # noqa: FBT003
        return self.weight * unit(x, 1e-6).to(x.dtype)


@refused("reads attributes by a __getattribute__ of its own")
class ReadsByItself(Base):
    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        return value + 1 if isinstance(value, float) else value

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * unit(x, self.eps).to(x.dtype)


@refused("uses print")
class CountsWhatIsMissing(Base):
    def __getattr__(self, name: str) -> Any:
        print(name)  # noqa: T201
        return super().__getattr__("weight" if name == "scale" else name)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * unit(x, self.eps).to(x.dtype)
