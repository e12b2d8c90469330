"""torch with another rstd: what a row may differ by when only the order of a float32 sum, or the rsqrt, is another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional


def bits(y: torch.Tensor) -> torch.Tensor:
    return y.view(torch.int32 if y.element_size() == 4 else torch.int16)


@contextlib.contextmanager
def rstd_moved(ulps: int) -> Iterator[None]:
    """torch.rsqrt, pow with the exponent -0.5 and rms_norm, with rstd so many units in the last place larger."""
    rsqrt, power = torch.rsqrt, torch.pow

    def move(result: torch.Tensor) -> torch.Tensor:
        _, exponent = torch.frexp(result.detach())
        return result + torch.ldexp(torch.full_like(result, ulps), exponent - 24)  # differentiable, unlike a view

    def moved_power(x: Any, exponent: Any) -> torch.Tensor:
        result = power(x, exponent)
        return move(result) if isinstance(exponent, float) and exponent == -0.5 else result

    def rms_norm(x: torch.Tensor, shape: Any, weight: Any = None, eps: Any = None) -> torch.Tensor:
        wide = x.float()
        wide = wide * move(rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))
        return (wide if weight is None else wide * weight).to(x.dtype)

    with pytest.MonkeyPatch.context() as patch:
        if ulps:
            patch.setattr(torch, "rsqrt", lambda x: move(rsqrt(x)))
            patch.setattr(torch, "pow", moved_power)
            patch.setattr(functional, "rms_norm", rms_norm)
        yield
