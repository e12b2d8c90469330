"""The public function of heads that are normalised and rotated: a kernel for plain tensors, the registered operator for
everything else."""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function

from pallas_norm._spec import Spec

from . import _dtensor, _rope_library, _torch_state, _validate, ops

Tensor = torch.Tensor


def rms_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """rotate(rms_norm(q, q_weight)), rotate(rms_norm(k, k_weight)): as pallas_norm.rms_norm_rope, in one kernel.

    The rotation is `apply_rotary_pos_emb` of transformers: y * cos + rotate_half(y) * sin, each operation rounded to
    the dtype of y, as in its eager models.

    Arguments:
        q, k: `[..., heads, n]`, of one dtype, with the same leading axes; n is even. On CUDA they are read where they
            lie, such as inside a fused projection: `qkv.view(..., heads, n)[..., :q_heads, :]`. Tensors whose tokens
            lie at more than one stride, or whose rows are not aligned to the kernel's vectors, are copied first.
        cos, sin: `[..., n]`, of the dtype of y = rms_norm(q, q_weight): a row for each token. Their leading axes are
            those of q before its heads, or the last ones of them, after any axes of size 1, as transformers has them:
            `[1, positions, n]` fits a q of `[batch, positions, heads, n]`.
        q_weight, k_weight: `[n]`, of one dtype, or both None.
        eps, cast_before_scale, weight_offset: as for `rms_norm`, of both norms.

    Returns: q and k, contiguous, in the dtype of y. transformers has heads before positions: `.transpose(1, 2)`.

    Where it runs: as `rms_norm`; heads that no kernel rotates in registers, such as those of 80 elements, are
        normalised by the norm's kernel and rotated by torch's own statements. A DTensor's tokens and heads stay where
        they lie.

    Differentiation: reverse mode, twice, of q, k and the weights. The backward pass is one kernel and the sums of
        dweight, where there is one, or else the steps one by one (docs/rope.md). NotImplementedError where cos or sin
        requires grad, and in forward mode.

    Raises:
        TypeError: an operand is no dense tensor, or of another dtype.
        ValueError: a shape or a device does not fit, one weight is given without the other, or n is odd.
        NotImplementedError: another device type, or a derivative that there is none of.

    Example:
        q_out, k_out = rms_norm_rope(q, k, cos, sin, q_weight, k_weight)

    Source: `Qwen3Attention.forward` and `apply_rotary_pos_emb` in Hugging Face's transformers.
    """
    operands: tuple[Any, ...] = q, k, cos, sin, q_weight, k_weight
    compiling = torch.compiler.is_compiling()
    if not compiling and _torch_state.is_stand_in(*operands):
        named: Any = {"cast_before_scale": cast_before_scale, "weight_offset": weight_offset}
        function: Any = rms_norm_rope
        return handle_torch_function(function, operands, *operands, eps, **named)
    cast_before_scale = _validate.flag("cast_before_scale", cast_before_scale)
    if not compiling:
        _validate.no_tangents(*operands)
        eps, weight_offset = _validate.eps(eps), _validate.weight_offset(weight_offset, q_weight)
        spec = Spec(eps, cast_before_scale, weight_offset)
        _rope_library.check(operands, spec)
        _rope_library.constant(torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad))
        differentiates = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in operands)
        if not differentiates and ops._plain(*operands):
            return _rope_library.forward(q, k, *_rope_library.angles(cos, sin), (q_weight, k_weight), spec)
    return _operator(operands, (eps, cast_before_scale, weight_offset), compiling=compiling)


def _operator(operands: tuple[Any, ...], options: tuple[Any, ...], *, compiling: bool) -> tuple[Tensor, Tensor]:
    """As that of `gated`: torch.func differentiates no operators of a library, and functionalize no
    autograd.Function."""
    if not compiling:
        _dtensor.register()
    transformed = not compiling and _torch_state.transformation() is not None
    if transformed and not _torch_state.functionalized():
        return _rope_library.differentiable(*operands, *options)
    if transformed and not _torch_state.alone():
        return _rope_library.in_steps(*operands, *options)
    return torch.ops.pallas_norm.rms_norm_rope(*operands, *options)
