"""The public functions for torch: a short way for plain tensors, the registered operators for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from pallas_norm._spec import Spec

from . import _library, _validate, direct, launch
from .launch import NUMBER
from .rows import ALIGNMENT

Tensor = torch.Tensor
TENSORS = (torch.Tensor, torch.nn.Parameter)

_ready: dict[Any, Any] = {}  # what _key gives, of calls that were checked -> (launch, dtype of y unless that of x, n)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: Tensor | None = None,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
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

    Returns: y, `[..., n]`, contiguous, of dtype promote_types(x, weight), as in Hugging Face; under autocast too.

    Where it runs: a CUDA tensor's kernel is launched on torch's current stream of its device, without a
        synchronisation; it may be captured into a CUDA graph after one call outside. Where the kernel cannot be
        launched (see `explain`), and for CPU tensors, JAX computes the same through DLPack.

    Differentiation: reverse mode, twice; through torch.compile, torch.export and torch.func.vjp and vmap. Forward mode
        raises NotImplementedError.

    Raises:
        TypeError: an operand is no dense tensor, or of another dtype; eps or weight_offset is no real number.
        ValueError: a shape, a device or a value does not fit, or out overlaps an operand.
        NotImplementedError: another device type, or forward-mode differentiation.

    Source: `LlamaRMSNorm` in Hugging Face's transformers.
    """
    if torch.compiler.is_compiling():
        y, _ = torch.ops.pallas_norm.rms_norm(x, weight, eps, cast_before_scale, weight_offset)
        return y if out is None else out.copy_(y)
    if (results := _short(x, None, weight, eps, out, cast_before_scale, weight_offset)) is not None:
        return results[0]
    spec = _spec(x, None, weight, eps, cast_before_scale, weight_offset, with_residual=False)
    differentiates = torch.is_grad_enabled() and _requires_grad(x, weight)
    if out is not None:
        _validate.out(out, x, weight, direct.result_dtype(x, weight), differentiates=differentiates)
    if not _plain(x, weight, out):
        y, _ = _operator(x, None, weight, spec)
        return y if out is None else out.copy_(y)
    if differentiates:
        return _library.EagerNorm.apply(x, None, weight, spec)
    y, _, _ = _library.path(x).forward(x, None, weight, spec, with_rstd=False, out=out)
    _remember(x, None, weight, spec)
    return y


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """s = round(x + residual); y = rms_norm(s): the residual form of every decoder layer, in one kernel.

    Arguments: as for `rms_norm`; `residual` has the shape, dtype and device of x.

    Returns: (y, s). s has the dtype of x and is rounded before it is normalised, so the bits are those of
        `s = x + residual; y = rms_norm(s, weight)`; in float32 the compiler fuses the last product of the backward pass
        with the addition of the gradient of s.

    Raises: as `rms_norm`.
    """
    if torch.compiler.is_compiling():
        y, s, _ = torch.ops.pallas_norm.add_rms_norm(x, residual, weight, eps, cast_before_scale, weight_offset)
        return y, s
    if (results := _short(x, residual, weight, eps, None, cast_before_scale, weight_offset)) is not None:
        return results
    spec = _spec(x, residual, weight, eps, cast_before_scale, weight_offset, with_residual=True)
    if not _plain(x, residual, weight):
        y, s, _ = _operator(x, residual, weight, spec)
        return y, s
    if torch.is_grad_enabled() and _requires_grad(x, residual, weight):
        return _library.EagerNorm.apply(x, residual, weight, spec)
    y, s, _ = _library.path(x).forward(x, residual, weight, spec, with_rstd=False)
    assert s is not None
    _remember(x, residual, weight, spec)
    return y, s


def _spec(
    x: Any,
    residual: Any,
    weight: Any,
    eps: Any,
    cast_before_scale: Any,
    weight_offset: Any,
    *,
    with_residual: bool,
) -> Spec:
    """The call's options, everything checked."""
    _validate.operands(x, residual, weight, with_residual=with_residual)
    _validate.no_tangents(x, residual, weight)
    return Spec(
        eps=_validate.eps(eps),
        cast_before_scale=_validate.flag("cast_before_scale", cast_before_scale),
        weight_offset=_validate.weight_offset(weight_offset, weight),
    )


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _plain(*tensors: Tensor | None) -> bool:
    """No subclass, mode, transformation or device that must see an operator instead of a launch."""
    return (
        all(tensor is None or (type(tensor) in TENSORS and tensor.device.type != "meta") for tensor in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _operator(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> Any:
    options = spec.eps, spec.cast_before_scale, spec.weight_offset
    if torch._C._functorch.peek_interpreter_stack() is not None:  # torch.func differentiates no operators of a library
        return _library.Norm.apply(x, residual, weight, *options)
    if residual is None:
        return torch.ops.pallas_norm.rms_norm(x, weight, *options)
    return torch.ops.pallas_norm.add_rms_norm(x, residual, weight, *options)


# --- the short way: calls like one that was checked before ------------------------------------------------------------


def _short(x: Any, residual: Any, weight: Any, eps: Any, out: Any, cast_before_scale: Any, weight_offset: Any) -> Any:
    """(y,), or (y, s) with a residual; None where more must be looked at.

    A call may take 8 us, of which the allocation and the launch are 5: so this is flat, asks for nothing twice, and has
    few calls of its own.
    """
    if (
        type(x) not in TENSORS
        or type(eps) is not float
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or not x.is_contiguous()
    ):
        return None
    device, dtype, shape, weight_dtype = x.get_device(), x.dtype, x.shape, None
    if weight is not None:
        if type(weight) not in TENSORS or not weight.is_contiguous() or weight.get_device() != device:
            return None
        weight_dtype = weight.dtype
    key = dtype, shape[-1:], weight_dtype, eps, cast_before_scale, weight_offset, device, residual is not None
    found = _ready.get(key)
    if found is None:
        return None
    run, n, y_dtype, may_alias = found
    x_at = x.data_ptr()
    weight_at = 0 if weight is None else weight.data_ptr()
    rows = x.numel() // n
    if (x_at | weight_at) % ALIGNMENT or not rows or device != torch._C._cuda_getDevice():
        return None
    if weight is not None and (weight.dim() != 1 or weight.numel() != n):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        return None
    if residual is not None and (
        type(residual) not in TENSORS
        or residual.shape != shape
        or residual.dtype != dtype
        or residual.get_device() != device
        or not residual.is_contiguous()
        or residual.data_ptr() % ALIGNMENT
        or (residual.requires_grad and torch.is_grad_enabled())
    ):
        return None
    if out is None:
        y = torch.empty_like(x) if y_dtype is None else torch.empty_like(x, dtype=y_dtype)
    elif (out is x and y_dtype is None and may_alias) or _apart(out, x, weight, y_dtype or dtype):
        y = out
        torch.autograd.graph.increment_version(out)
    else:
        return None
    launch.current_context()
    stream = torch._C._cuda_getCurrentRawStream(device)
    if residual is not None:
        s = torch.empty_like(x)
        addresses = (x_at, residual.data_ptr(), *((weight_at,) if weight is not None else ()))
        run(stream, *addresses, rows * NUMBER, y.data_ptr(), s.data_ptr())
        return y, s
    if weight is None:
        run(stream, x_at, rows * NUMBER, y.data_ptr())
    else:
        run(stream, x_at, weight_at, rows * NUMBER, y.data_ptr())
    return (y,)


def _apart(out: Any, x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether y can be written to `out` directly: contiguous, aligned, and nowhere in the memory of an operand."""
    if (
        type(out) not in TENSORS
        or out.dtype != dtype
        or out.shape != x.shape
        or out.get_device() != x.get_device()
        or not out.is_contiguous()
        or out.requires_grad
    ):
        return False
    start, end = out.data_ptr(), out.data_ptr() + out.nbytes
    return not start % ALIGNMENT and all(
        operand is None or operand.data_ptr() >= end or operand.data_ptr() + operand.nbytes <= start
        for operand in (x, weight)
    )


def _remember(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> None:
    """The next call like this one takes the short way."""
    if _library.path(x) is not direct or not x.numel():
        return
    n, device, weight_dtype = x.shape[-1], x.get_device(), None if weight is None else weight.dtype
    program = direct.forward_program(
        n, x.dtype, weight_dtype, spec, residual=residual is not None, with_rstd=False, strided=False
    )
    assert program.plan is not None
    options = spec.eps, spec.cast_before_scale, spec.weight_offset
    key = x.dtype, x.shape[-1:], weight_dtype, *options, device, residual is not None
    dtype = direct.result_dtype(x, weight)
    _ready[key] = launch.kernel(program, device), n, None if dtype == x.dtype else dtype, not program.plan.rereads
