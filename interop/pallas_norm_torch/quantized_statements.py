"""Results of 8 bits in torch's own statements: for CPU tensors, and where no kernel can be launched."""

from __future__ import annotations

import torch

from pallas_norm import quantized_reference
from pallas_norm._spec import Spec  # pyright: ignore[reportPrivateUsage]

from . import _torch_state, _validate, statements

Tensor = torch.Tensor
Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor]  # q, scales, s, y


@_torch_state.never_compiled
def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
    group: int,
) -> Results:
    """The statements of pallas_norm.quantized_reference. group: elements that share a scale that is computed."""
    y, s, _ = statements.forward(x, residual, weight, spec, with_rstd=False)
    if scale is not None:
        return by_scale(y, scale.reshape(()), dtype), None, s, y
    scales = scale_of(y, dtype, group)
    return by_scale(y, scales, dtype), scales, s, y


def scale_of(y: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """Of each group of a row. A tensor is what the division is by: with a number torch on CUDA multiplies with its
    inverse."""
    largest = y.float().abs().reshape(*y.shape[:-1], y.shape[-1] // group, group).amax(-1)
    scales = largest / torch.full_like(largest, quantized_reference.LARGEST[_validate.dtype_name(dtype)])
    return torch.where(scales == 0, quantized_reference.SCALE_OF_ZEROS, scales)


def by_scale(y: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """q, of one scale, or of one for each of the equal parts of a row."""
    wide = y.float()
    if scales.ndim == 0:
        quotients = wide / scales.expand_as(wide)
    else:
        parts = wide.reshape(*scales.shape, y.shape[-1] // scales.shape[-1])
        quotients = (parts / scales.unsqueeze(-1)).reshape(y.shape)
    if dtype == torch.int8:
        whole = torch.clamp(torch.round(quotients), -128, 127)
        return torch.where(quotients.isnan(), 0.0, whole).to(torch.int8)
    largest = quantized_reference.LARGEST[_validate.dtype_name(dtype)]
    return torch.clamp(quotients, -largest, largest).to(dtype)
