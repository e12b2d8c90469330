"""The rotation of heads in torch's own statements, as Hugging Face's eager models have it: for CPU tensors, and where
no kernel rotates."""

from __future__ import annotations

import torch

from . import _torch_state

Tensor = torch.Tensor


def half_rotated(y: Tensor) -> Tensor:
    """(-y2, y1) of the halves (y1, y2) of each row."""
    first, second = y.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@_torch_state.never_compiled
def rotated(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """y (..., heads, n) by the angles of each token, (..., n): apply_rotary_pos_emb of transformers."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return (y * cos) + (half_rotated(y) * sin)


@_torch_state.never_compiled
def rotated_back(dr: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of y, as autograd gives it for rotated: it adds to zeros, so no zero of it is negative."""
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return (dr * cos - half_rotated(dr * sin)) + 0.0
