"""What each class of the zoo says of itself: which of LABELS it computes, or a part of the reason why it is left.

Each class takes the row length. ZOO and WRONG fill as the files of the zoo are imported: take them from zoo.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

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
        assert owner.__name__ not in ZOO | WRONG, f"{owner.__name__} is in the zoo twice"
        ZOO[owner.__name__] = owner, label
        return owner

    return add


def refused(reason: str) -> Callable[[Any], Any]:
    def add(owner: Any) -> Any:
        assert owner.__name__ not in ZOO | WRONG, f"{owner.__name__} is in the zoo twice"
        WRONG[owner.__name__] = owner, reason
        return owner

    return add


class Base(nn.Module):
    def __init__(self, n: int, eps: float = EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))
        self.eps = eps
