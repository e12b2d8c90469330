"""What the tests of rotated heads share: operands as a projection gives them, and the steps that give the same bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pallas_norm_torch import rms_norm, rms_norm_rope
from tests.interop.cases import assert_same, draw

Tensor = torch.Tensor
HEADS = (5, 3)


def rotated(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """apply_rotary_pos_emb and rotate_half of transformers, of heads before elements."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first, second = y[..., : y.shape[-1] // 2], y[..., y.shape[-1] // 2 :]
    return (y * cos) + (torch.cat((-second, first), dim=-1) * sin)


def operands(n: int, dtype: torch.dtype, *, tokens: Sequence[int] = (2, 7), device: str = "cpu") -> tuple[Tensor, ...]:
    """q and k inside one projection, cos, sin, and two weights."""
    qkv = draw(*tokens, 2 + sum(HEADS), n, dtype=dtype, seed=0).to(device)
    cos, sin = (draw(tokens[-1], n, dtype=dtype, seed=seed).to(device) for seed in (1, 2))
    weights = (draw(n, dtype=dtype, seed=seed).to(device) for seed in (3, 4))
    return qkv[..., :5, :], qkv[..., 5:8, :], cos, sin, *weights


def check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor | None) -> None:
    found = rms_norm_rope(q, k, cos, sin, *weights)
    for one, x, weight in zip(found, (q, k), weights or (None, None), strict=True):
        assert one.is_contiguous()
        assert_same(one, rotated(rms_norm(x, weight), cos, sin))
