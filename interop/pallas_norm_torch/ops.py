"""The public functions for torch: prepared calls for plain tensors, the registered operators for everything else."""

# pyright: reportOptionalMemberAccess=false, reportPrivateUsage=false, reportUnknownVariableType=false
# (type(weight) in TENSORS tells no checker that it is not None; operators of torch.ops have no types)

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function

from pallas_norm._spec import Spec

from . import _asked, _eager, _library, _options, _torch_state, _validate, direct, launch
from .prepared import ForwardCall

Tensor = torch.Tensor
TENSORS = _torch_state.TENSORS

# Looked up once: each name saves 0.05 us of a call.
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = _torch_state.dispatch_modes
_transformation = _torch_state.transformation
_tracing = _torch_state.tracing
_takes_y = _validate.takes_y

_prepared = direct.calls


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: Tensor | None = None,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    implementation: str | None = None,
) -> Tensor:
    """y = weight * round(x / sqrt(mean(x^2) + eps)): RMSNorm with Hugging Face's rounding, as pallas_norm.rms_norm.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32, on a CPU or a CUDA device; n >= 1, any number of rows. On CUDA,
            rows that lie at strides, such as heads inside a fused projection, are read where they are, if their
            addresses are multiples of the kernel's vectors (16 bytes, less where n is odd); other layouts are copied
            first.
        weight: `[n]`, or None. Its dtype may differ from that of x.
        eps: added to the mean of squares, as a float32.
        out: receives y, and is returned. It may be x itself, and otherwise shares no memory with an operand. Not
            differentiable.
        cast_before_scale: True rounds the normalised x to its dtype before the weight multiplies it (Llama and most
            models of Hugging Face). False multiplies in float32 and rounds once (Gemma, Olmo2, GptOss,
            torch.nn.functional.rms_norm).
        weight_offset: added to the weight in float32 (Gemma: 1.0).
        implementation: None, or "jax": through DLPack and the jitted JAX function on the same device, with first
            derivatives, in eager code on plain tensors only. Each row count compiles, and JAX starts its backends.

    Returns: y, `[..., n]`, contiguous, of dtype promote_types(x, weight), as in Hugging Face; under autocast too.

    Where it runs: a CUDA tensor's kernel is launched on torch's current stream of its device, without a
        synchronisation; it may be captured into a CUDA graph after one call outside. Where the kernel cannot be
        launched (see `explain`), and for CPU tensors, torch's own statements compute it, as in LlamaRMSNorm.forward.
        A DTensor's rows are normalised where they lie, y is sharded as x; a sharded last axis is gathered first.

    Differentiation: reverse mode, twice; through torch.compile, torch.export and torch.func.vjp and vmap. Forward mode
        raises NotImplementedError.

    Raises:
        TypeError: an operand is no dense tensor, or of another dtype; eps or weight_offset is no real number.
        ValueError: a shape, a device or a value does not fit, or out overlaps an operand.
        NotImplementedError: another device type, forward-mode differentiation, or implementation="jax" where it cannot
            run.

    Source: `LlamaRMSNorm` in Hugging Face's transformers.
    """
    if implementation is not None:
        options = eps, cast_before_scale, weight_offset
        return _asked.rms_norm(implementation, x, weight, options, out, plain=_plain)
    if _is_compiling():
        _validate.flag("cast_before_scale", cast_before_scale)
        if out is not None:
            differentiates = torch.is_grad_enabled() and _requires_grad(x, weight)
            _validate.out_form(out, x, direct.result_dtype(x, weight), differentiates=differentiates)
        y, _ = torch.ops.pallas_norm.rms_norm(x, weight, eps, cast_before_scale, weight_offset)
        return y if out is None else out.copy_(y)
    call = _prepared_for(x, None, weight, eps, cast_before_scale, weight_offset)
    if call is not None:
        try:
            if _grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
                if out is None:
                    return _eager.norm(x, None, weight, call)
            elif out is None and weight is not None:
                return call.plain(x, weight)
            elif (
                out is None
                or (out is x and call.y_dtype is None and not x.is_inference())
                or _takes_y(out, x, weight, call.y_dtype or x.dtype)
            ):
                return call(x, None, weight, out)[0]
        except launch.Unavailable as reason:  # of the form with rstd, or for strides
            _refuse(x, reason)
    if _torch_state.is_stand_in(x, weight, out):
        named: Any = {"out": out, "cast_before_scale": cast_before_scale, "weight_offset": weight_offset}
        return handle_torch_function(rms_norm, (x, weight, out), x, weight, eps, **named)
    spec = _options.spec(x, None, weight, eps, cast_before_scale, weight_offset, with_residual=False)
    differentiates = torch.is_grad_enabled() and _requires_grad(x, weight)
    if out is not None:
        _validate.out_form(out, x, direct.result_dtype(x, weight), differentiates=differentiates)
        if type(out) in TENSORS and out.device.type != "meta":
            _validate.out_memory(out, x, weight)
    if not _plain(x, weight, out):
        y, _ = _operator(x, None, weight, spec)
        return y if out is None else out.copy_(y)
    try:
        if (call := _prepare(x, None, weight, spec)) is not None:
            return _eager.norm(x, None, weight, call) if differentiates else call(x, None, weight, out)[0]
    except launch.Unavailable as reason:
        _refuse(x, reason)
    if differentiates:
        return _library.EagerNorm.apply(x, None, weight, spec)
    return _library.forward(x, None, weight, spec, with_rstd=False, out=out)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """s = round(x + residual); y = rms_norm(s): the residual form of every decoder layer, in one kernel.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32, on a CPU or a CUDA device.
        residual: `[..., n]`, of the dtype and device of x.
        weight, eps, cast_before_scale, weight_offset, implementation: as for `rms_norm`.

    Returns: (y, s). s has the dtype of x and is rounded before it is normalised, so the bits are those of
        `s = x + residual; y = rms_norm(s, weight)`; in float32 the compiler fuses the last product of the backward pass
        with the addition of the gradient of s.

    Raises: as `rms_norm`.

    Source: `LlamaDecoderLayer` in Hugging Face's transformers, where the addition and the norm are two steps.
    """
    if implementation is not None:
        options = eps, cast_before_scale, weight_offset
        return _asked.add_rms_norm(implementation, x, residual, weight, options, plain=_plain)
    if _is_compiling():
        _validate.flag("cast_before_scale", cast_before_scale)
        y, s, _ = torch.ops.pallas_norm.add_rms_norm(x, residual, weight, eps, cast_before_scale, weight_offset)
        return y, s
    call = _prepared_for(x, residual, weight, eps, cast_before_scale, weight_offset)
    if call is not None and call.kernel.residual:
        try:
            return _added(x, residual, weight, call)
        except launch.Unavailable as reason:
            _refuse(x, reason)
    if _torch_state.is_stand_in(x, residual, weight):
        named: Any = {"cast_before_scale": cast_before_scale, "weight_offset": weight_offset}
        return handle_torch_function(add_rms_norm, (x, residual, weight), x, residual, weight, eps, **named)
    spec = _options.spec(x, residual, weight, eps, cast_before_scale, weight_offset, with_residual=True)
    if not _plain(x, residual, weight):
        y, s, _ = _operator(x, residual, weight, spec)
        return y, s
    try:
        if (call := _prepare(x, residual, weight, spec)) is not None:
            return _added(x, residual, weight, call)
    except launch.Unavailable as reason:
        _refuse(x, reason)
    if torch.is_grad_enabled() and _requires_grad(x, residual, weight):
        return _library.EagerNorm.apply(x, residual, weight, spec)
    y, s, _ = _library.forward(x, residual, weight, spec, with_rstd=False)
    assert s is not None
    return y, s


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _plain(*tensors: Tensor | None) -> bool:
    """No subclass, mode, transformation or device that must see an operator instead of a launch."""
    return (
        all(tensor is None or (type(tensor) in TENSORS and not tensor.is_meta) for tensor in tensors)
        and not _dispatch_modes()
        and _transformation() is None
        and _tracing() is None
    )


def _operator(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> Any:
    options = spec.eps, spec.cast_before_scale, spec.weight_offset
    if _transformation() is not None and _torch_state.functionalized():
        return _library.functional(x, residual, weight, spec)
    if _transformation() is not None:  # torch.func differentiates no operators of a library
        return _library.Norm.apply(x, residual, weight, *options)
    if residual is None:
        return torch.ops.pallas_norm.rms_norm(x, weight, *options)
    return torch.ops.pallas_norm.add_rms_norm(x, residual, weight, *options)


# --- calls that were prepared -----------------------------------------------------------------------------------------


def _prepared_for(
    x: Any, residual: Any, weight: Any, eps: Any, cast_before_scale: Any, weight_offset: Any
) -> ForwardCall | None:
    """The call for operands like some that were checked before; None where more must be looked at: another type, a
    mode, a transformation, memory that does not hold the values."""
    if not (
        type(x) in TENSORS
        and (weight is None or type(weight) in TENSORS)
        and (residual is None or type(residual) in TENSORS)
        and type(eps) is type(weight_offset) is float
        and type(cast_before_scale) is bool
        and not _dispatch_modes()
        and _transformation() is None
        and _tracing() is None
        and forward_ad._current_level < 0
    ):
        return None
    device = x.get_device()
    try:
        if weight is None:
            n, dtype = x.shape[-1], None
        else:
            n, dtype = weight.numel(), weight.dtype
            if weight.dim() != 1 or weight.get_device() != device or weight.is_neg() or x.shape[-1] != n:
                return None
        call = _prepared[x.dtype, n, dtype, eps, cast_before_scale, weight_offset, device, residual is not None]
    except (KeyError, IndexError, RuntimeError):  # like none before, without an axis, or sparse
        return None
    if x.is_neg() or (
        residual is not None
        and (
            residual.shape != x.shape
            or residual.dtype != x.dtype
            or residual.get_device() != device
            or residual.is_neg()
        )
    ):
        return None
    return call


def _added(x: Tensor, residual: Tensor, weight: Tensor | None, call: ForwardCall) -> tuple[Tensor, Tensor]:
    if _grad_enabled() and (x.requires_grad or residual.requires_grad or (weight is not None and weight.requires_grad)):
        return _eager.norm(x, residual, weight, call)
    return call.added(x, residual, weight)


def _refuse(x: Tensor, reason: launch.Unavailable) -> None:
    """Raised before anything is written; other rows of that length follow."""
    direct.refuse(x.shape[-1], x.get_device(), str(reason))


def _prepare(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> ForwardCall | None:
    """The call for these operands, which were checked, and from now on for others like them; None where no kernel can
    be launched, for which `explain` has the reason. Raises launch.Unavailable where that turns out only now."""
    if _library.path(x) is not direct:
        return None
    call = direct.call_of(x, residual, weight, spec)
    options = spec.eps, spec.cast_before_scale, spec.weight_offset
    dtype = None if weight is None else weight.dtype
    _prepared[x.dtype, x.shape[-1], dtype, *options, x.get_device(), residual is not None] = call
    return call
