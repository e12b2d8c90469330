"""SGLang's norms by the same names and signatures, those of 0.5.23: drop-ins without limits on the hidden size, and for
what its layer leaves to torch. docs/dtypes.md has the table of flags and bits."""

from __future__ import annotations

import operator
from typing import Any

import torch

from . import _torch_state
from .ops import add_rms_norm, rms_norm

Tensor = torch.Tensor


def is_supported_rmsnorm_hf_hidden_size(hidden_size: Any) -> bool:
    """Whether `rmsnorm_hf` takes rows of this length: every positive int (SGLang's own: multiples of 512, and below
    them of 32). Raises nothing.

    Source: sglang.kernels.ops.layernorm.rmsnorm_hf.
    """
    try:
        return not isinstance(hidden_size, bool) and operator.index(hidden_size) > 0
    except TypeError:  # no int, or an array: of several, > would be as many answers
        return False


def rmsnorm_hf(input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    """out = weight * round(input / sqrt(mean(input^2) + eps)), for inference.

    Arguments:
        input: `[rows, n]`, float16 or bfloat16.
        weight: `[n]`, of the dtype and device of input.
        eps: added to the mean of squares.
        out: `[rows, n]`, of the dtype and device of input; None makes one. It may be input.

    Returns: out. An input without elements is answered without a launch.

    Raises: RuntimeError for another dtype, as SGLang's; TypeError and ValueError as `rms_norm`, ValueError also for
        other than two axes.

    Example:
        y = rmsnorm_hf(x, weight, 1e-5)

    Source: sglang.kernels.ops.layernorm.rmsnorm_hf.
    """
    _check(input, weight)
    if out is None:
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
    if input.numel() == 0:
        return out
    with torch.no_grad():
        return rms_norm(input, weight, eps, out=out)


def fused_add_rmsnorm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, cast_x_before_out_mul: bool = False
) -> None:
    """residual = round(input + residual); input = rms_norm(residual): in place, for inference.

    The sum is rounded before it is normalised, as in Hugging Face's decoder layers. SGLang's own kernel stores the
    rounded sum and normalises the unrounded one, with either flag.

    Arguments:
        input, residual: `[..., n]`, written to; any of the dtypes that `add_rms_norm` takes, for each its own.
        weight: `[n]`.
        eps: added to the mean of squares.
        cast_x_before_out_mul: True rounds to the dtype of input before the weight multiplies, as Hugging Face does.

    Raises: as `add_rms_norm` with out=input and s_out=residual.

    Example:
        fused_add_rmsnorm(x, residual, weight, cast_x_before_out_mul=True)

    Source: sglang.kernels.ops.layernorm.norm.fused_add_rmsnorm.
    """
    if not _torch_state.is_stand_in(input):
        _check_tensors(input=input)
    unit = input.dtype if cast_x_before_out_mul else torch.float32
    with torch.no_grad():
        places: Any = {"out": input, "s_out": residual}
        add_rms_norm(input, residual, weight, eps, unit_dtype=unit, out_dtype=input.dtype, **places)


def forward_cuda(
    self: Any,
    x: Tensor,
    residual: Tensor | None = None,
    post_residual_addition: Tensor | None = None,
    quant_linear: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """SGLang's RMSNorm layer as one kernel for whatever its flags say, in batch-invariant mode too:

        sglang.srt.layers.layernorm.RMSNorm.forward_cuda = pallas_norm_torch.sglang.forward_cuda

    Its own takes kernels only for some flags and sizes, and torch's statements, six launches, where there is a residual
    or a cast in batch-invariant mode, or a float32 weight beside a cast. Its kernels are not told of `fp32_residual`
    and `override_orig_dtype`, which are followed here everywhere, so s or y may have another dtype than there. Where
    a kernel is launched, a row's bits do not depend on the batch.

    Arguments, and what it returns: those of the layer's forward. x and residual are not written to.
        post_residual_addition: added to the residual first, as in the layer's own way with kernels.
        quant_linear: not taken: y is what its quantisation expects, not yet quantised.

    Rounding: as the layer's forward_native, to the bit for the same reciprocal root, where s is float32
        (`fp32_residual`) or there is no residual. Else the sum is rounded before it is normalised, as in Hugging Face's
        decoder layers; forward_native normalises the unrounded one.

    Raises: what the layer raises for another hidden size; as `add_rms_norm`. A layer with variance_size_override, which
        normalises part of a row, is left to its forward_native.

    Source: sglang.srt.layers.layernorm.RMSNorm.
    """
    if self.variance_size_override is not None:
        return self.forward_native(x, residual, post_residual_addition)
    if x.shape[-1] != self.hidden_size:
        raise ValueError(f"Expected hidden_size to be {self.hidden_size}, but found: {x.shape[-1]}")
    if residual is not None and post_residual_addition is not None:
        residual = residual + post_residual_addition
    if x.numel() == 0:
        return x if residual is None else (x, residual)
    weight, eps = self.weight, self.variance_epsilon
    dtype = self.override_orig_dtype or x.dtype
    options: Any = {"unit_dtype": torch.float32, "out_dtype": dtype}
    if self.cast_x_before_out_mul:
        options = {"unit_dtype": dtype, "out_dtype": torch.promote_types(weight.dtype, dtype)}
    if residual is None:
        return rms_norm(x, weight, eps, **options)
    s_dtype = torch.float32 if self.fp32_residual else dtype
    return add_rms_norm(x, residual, weight, eps, s_dtype=s_dtype, **options)


def _check_tensors(**named: Any) -> None:
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; needed a torch.Tensor: wrap it with torch.as_tensor")


def _check(input: Any, weight: Any) -> None:
    _check_tensors(input=input, weight=weight)
    if input.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"rmsnorm_hf: input must be fp16 or bf16, got {input.dtype}; for float32 call rms_norm")
    if weight.dtype != input.dtype:
        raise RuntimeError(
            f"rmsnorm_hf: weight must have the dtype of input, got {weight.dtype} and {input.dtype}; "
            "for mixed dtypes call rms_norm"
        )
    if input.ndim != 2:
        raise ValueError(
            f"input has shape {tuple(input.shape)}; needed (rows, n): pass input.reshape(-1, input.shape[-1])"
        )
