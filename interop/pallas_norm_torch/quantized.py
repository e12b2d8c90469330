"""The public functions with a result of 8 bits: kernels for plain tensors, the registered operator for everything
else."""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function

from pallas_norm import _api_quantized
from pallas_norm._spec import Spec

from . import _dtensor, _options, _quantized_library, _torch_state, _validate, ops

Tensor = torch.Tensor


def rms_norm_quantized(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | float | None = None,
    group_size: int | None = None,
    return_y: bool = False,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, ...]:
    """q = cast(y / scale), y = rms_norm(x, weight): as pallas_norm.rms_norm_quantized, in one kernel.

    Arguments:
        x, weight, eps, cast_before_scale, weight_offset: as for `rms_norm`.
        dtype: of q, torch.float8_e4m3fn or torch.int8.
        scale: None computes it. One positive number quantises with it (per tensor, static): a float, or a float32
            tensor of one element on the device of x, which is read there and not checked.
        group_size: of a scale that is computed: None, one for each row (per token); 128, one for each 128 neighbouring
            elements (per block of 1 x 128), which has to divide n.
        return_y: also return y.

    Returns: (q, scale), with return_y (q, scale, y). q is `[..., n]`, scale float32: `[..., 1]`, with group_size
        `[..., n / 128]`, of one that was given `[]`.

    Where it runs: as `rms_norm`; rows that lie at strides are copied first. Not of a DTensor: pass its to_local().

    Differentiation: none; NotImplementedError where an operand, the scale too, requires grad.

    Raises: as `rms_norm`; TypeError, ValueError also of dtype, scale and group_size.

    Example:
        q, scale = rms_norm_quantized(x, weight)              # per token
        q, scale = rms_norm_quantized(x, weight, scale=0.02)  # static

    Source: vLLM's `dynamic_per_token_scaled_fp8_quant` and compressed-tensors' `calculate_qparams`; docs/quantized.md
        tells where they differ.
    """
    return _norm(
        x, None, weight, eps, dtype, scale, group_size, return_y, cast_before_scale, weight_offset, with_residual=False
    )


def add_rms_norm_quantized(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale: Tensor | float | None = None,
    group_size: int | None = None,
    return_y: bool = False,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, ...]:
    """s = round(x + residual); q = cast(y / scale), y = rms_norm(s): the residual form of `rms_norm_quantized`.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32.
        residual: `[..., n]`, on the device of x; its dtype, which s has, may be another.
        weight, eps, dtype, scale, group_size, return_y, cast_before_scale, weight_offset: as for `rms_norm_quantized`.

    Returns: (q, scale, s), with return_y (q, scale, s, y).

    Raises: as `rms_norm_quantized`.

    Example:
        q, scale, s = add_rms_norm_quantized(x, residual, weight)

    Source: as `rms_norm_quantized`; `LlamaDecoderLayer` in Hugging Face's transformers for the addition.
    """
    return _norm(
        x,
        residual,
        weight,
        eps,
        dtype,
        scale,
        group_size,
        return_y,
        cast_before_scale,
        weight_offset,
        with_residual=True,
    )


def _norm(
    x: Any,
    residual: Any,
    weight: Any,
    eps: Any,
    dtype: Any,
    scale: Any,
    group_size: Any,
    return_y: Any,
    cast_before_scale: Any,
    weight_offset: Any,
    *,
    with_residual: bool,
) -> tuple[Tensor, ...]:
    if not torch.compiler.is_compiling() and _torch_state.is_stand_in(x, residual, weight, scale):
        function: Any = add_rms_norm_quantized if with_residual else rms_norm_quantized
        given = (x, residual, weight) if with_residual else (x, weight)
        named: Any = {"dtype": dtype, "scale": scale, "group_size": group_size, "return_y": return_y}
        named |= {"cast_before_scale": cast_before_scale, "weight_offset": weight_offset}
        return handle_torch_function(function, (*given, scale), *given, eps, **named)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        _quantized_library.no_gradient(x, residual, weight, scale)
        spec = _options.spec(x, residual, weight, eps, cast_before_scale, weight_offset, with_residual=with_residual)
        eps, cast_before_scale, weight_offset = spec.eps, spec.cast_before_scale, spec.weight_offset
    _quantized_library.check_dtype(dtype)
    group = _api_quantized.group_of(x.shape[-1], group_size, given=scale is not None)
    scale = None if scale is None else _quantized_library.one_scale(scale, x)
    with_y = _validate.flag("return_y", return_y)
    if not compiling and ops._plain(x, residual, weight, scale):
        spec = Spec(eps, cast_before_scale, weight_offset)
        found: Any = _quantized_library.forward(x, residual, weight, scale, spec, dtype, group, with_y=with_y)
    else:
        if not compiling:
            _dtensor.refuse(x=x, residual=residual, weight=weight, scale=scale)
        options = dtype, group_size or 0, with_y, eps, cast_before_scale, weight_offset
        found = torch.ops.pallas_norm.rms_norm_quantized(x, residual, weight, scale, *options)
    q, scales, s, y = found
    scales = scales if scale is None else scale
    return (q, scales, *((s,) if with_residual else ()), *((y,) if with_y else ()))
