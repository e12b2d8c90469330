"""The same functions as torch's own statements, with Hugging Face's rounding in Hugging Face's order: for CPU tensors,
and where no kernel can be launched. They run on torch's current stream, also into a CUDA graph, and start nothing.

They are also what the operators decompose into."""

from __future__ import annotations

import torch

from pallas_norm._spec import Spec  # pyright: ignore[reportPrivateUsage]

from . import _torch_state
from ._options import dtypes_of

Tensor = torch.Tensor


@_torch_state.never_compiled
def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    spec: Spec,
    *,
    with_rstd: bool,
    out: Tensor | None = None,
    s_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, s, rstd), as direct.forward; of contiguous rows, the bits of LlamaRMSNorm.forward.

    The order in which torch adds depends on strides, so other rows are copied first.
    """
    to = dtypes_of(spec, x, residual, weight)
    s = None if residual is None else _sum(x, residual, to.s).contiguous()
    x = x.contiguous() if s is None else s
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + spec.eps)
    unit = torch.mul(wide, rstd, out=None if wide is x else _reused(wide))
    unit = unit.to(to.unit)  # Hugging Face rounds here, before the weight
    if weight is None:
        y = unit.to(to.y)
    elif not spec.weight_offset and torch.promote_types(to.weight, to.unit) == to.y:
        y = weight.to(to.weight) * unit
    else:
        y = (unit.float() * _scale(weight, spec, to.weight)).to(to.y)
    y = y if out is None else out.copy_(y)
    s = s if s is None or s_out is None else s_out.copy_(s)
    return y, s, rstd.squeeze(-1) if with_rstd else None


@_torch_state.never_compiled
def backward(
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    spec: Spec,
    *,
    with_dweight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight), as direct.backward: input_gradient and weight_gradient of pallas_norm.reference."""
    to = dtypes_of(spec, x, None, weight)
    x, dy, rstd = x.contiguous(), dy.contiguous(), rstd.unsqueeze(-1)
    unit = x.float() * rstd
    if weight is None:
        g = dy.to(to.unit).float()
    elif not spec.weight_offset and dy.dtype == to.weight == to.unit:
        g = (dy * weight.to(to.weight)).float()
    else:
        g = (dy.float() * _scale(weight, spec, to.weight)).to(to.unit).float()
    product = g * unit
    mean, space = product.mean(-1, keepdim=True), _reused(product)
    dx = torch.mul(torch.sub(g, torch.mul(unit, mean, out=space), out=space), rstd, out=space).to(x.dtype)
    dx = dx if ds is None else dx + ds
    if weight is None or not with_dweight:
        return dx, None
    factor = unit.to(to.unit)
    return dx, torch.mul(dy.float(), factor, out=_reused(unit)).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)


def _reused(buffer: Tensor) -> Tensor | None:
    """As out=: of a plain call's own intermediate results, each new buffer costs as much as what is computed. A program
    that torch makes of the statements writes nothing in place."""
    return buffer if _torch_state.is_plain(buffer) else None


def _sum(x: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded once, whatever torch would promote the operands to."""
    return x + residual if x.dtype == residual.dtype == dtype else (x.float() + residual.float()).to(dtype)


def _scale(weight: Tensor, spec: Spec, dtype: torch.dtype) -> Tensor:
    """The float32 factor of each column. Adding an offset of 0.0 would turn a weight of -0.0 into 0.0."""
    wide = weight.to(dtype).float()
    return wide + spec.weight_offset if spec.weight_offset else wide
