"""What the tests of gated norms share: the forms that models have, operands of them, results with their gradients."""

from __future__ import annotations

from typing import Any

import torch

from pallas_norm_torch import rms_norm_gated
from tests.interop.cases import draw

Tensor = torch.Tensor
FORMS: dict[str, dict[str, Any]] = {
    "mamba2": {"norm_before_gate": False},
    "falcon-h1": {"cast_before_scale": False},
    "qwen3-next": {},
    "kimi": {"activation": "sigmoid", "cast_before_scale": False},
}


def operands(dtype: torch.dtype, n: int, *, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """x, gate and weight."""
    x, gate = (draw(5, 3, n, dtype=dtype, seed=seed).to(device) for seed in (0, 1))
    return x, 3 * gate, draw(n, dtype=dtype, seed=2).to(device)


def trained(*given: Tensor, **options: Any) -> list[Tensor]:
    """[y, and the gradients of x, gate and weight]."""
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = rms_norm_gated(*leaves, **options)
    dy = draw(*y.shape, dtype=y.dtype, seed=3).to(y.device)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
