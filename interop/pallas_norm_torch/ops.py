"""The public functions for torch: a short way for plain tensors, the registered operators for everything else."""

# pyright: reportOptionalMemberAccess=false, reportPrivateUsage=false, reportUnknownVariableType=false
# (type(weight) in TENSORS tells no checker that it is not None; operators of torch.ops have no types)

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from pallas_norm._spec import Spec
from pallas_norm.kernels.launch_arguments import COUNT
from pallas_norm.plans.plan import Source

from . import _library, _options, _torch_state, _validate, direct, launch
from .rows import ALIGNMENT

Tensor = torch.Tensor
TENSORS = _torch_state.TENSORS

# Looked up once: each name saves 0.05 us of a call.
_empty_like = torch.empty_like
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = _torch_state.dispatch_modes
_transformation = _torch_state.transformation
_tracing = _torch_state.tracing
_current_device = _torch_state.current_device
_stream = _torch_state.stream
_takes_y = _validate.takes_y

_threads = launch.threads

# What decides how a call that was checked is launched -> (kernel, dtype of y unless that of x, rows of a
# block, may y be x).
_ready: dict[Any, Any] = {}


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
        _validate.flag("cast_before_scale", cast_before_scale)
        if out is not None:
            differentiates = torch.is_grad_enabled() and _requires_grad(x, weight)
            _validate.out_form(out, x, direct.result_dtype(x, weight), differentiates=differentiates)
        y, _ = torch.ops.pallas_norm.rms_norm(x, weight, eps, cast_before_scale, weight_offset)
        return y if out is None else out.copy_(y)
    # The short way, for a call like one that was checked before. The allocation and the launch take 5 us, so this is
    # flat, looks nothing up twice, and leaves whatever is unusual to what follows.
    try:
        usual = (
            type(x) in TENSORS
            and type(weight) in TENSORS
            and type(eps) is type(weight_offset) is float
            and type(cast_before_scale) is bool
            and not _dispatch_modes()
            and _transformation() is None
            and _tracing() is None
            and forward_ad._current_level < 0
            and x.is_contiguous()
            and weight.is_contiguous()
        )
    except RuntimeError:  # a compressed sparse tensor has no is_contiguous
        usual = False
    if usual:
        n, device = weight.numel(), x.get_device()
        found = _ready.get((x.dtype, n, weight.dtype, eps, cast_before_scale, weight_offset, device, False))
        if (
            found is not None
            and weight.dim() == 1
            and x.dim()
            and x.shape[-1] == n
            and weight.get_device() == device
            and device == _current_device()
            and not (_grad_enabled() and (x.requires_grad or weight.requires_grad))
        ):
            (run, pack), y_dtype, block, may_alias = found
            x_at, weight_at, rows = x.data_ptr(), weight.data_ptr(), x.numel() // n
            if out is None:
                y = _empty_like(x) if y_dtype is None else _empty_like(x, dtype=y_dtype)
            elif (out is x and y_dtype is None and may_alias and not rows % block) or _takes_y(
                out, x, weight, y_dtype or x.dtype
            ):
                y = out
            else:
                y = None
            # An address is 0 for autograd's zero tensors, which have no memory.
            if y is not None and rows and x_at and weight_at and not (x_at | weight_at) % ALIGNMENT:
                if not hasattr(_threads, "ready"):
                    launch.current_context()
                blocks = rows // block * COUNT
                programs = blocks + rows % block * COUNT
                run(_stream(device), pack(x_at, weight_at, blocks, blocks, programs, y.data_ptr()))
                if out is not None:
                    torch.autograd.graph.increment_version(out)
                return y
    spec = _options.spec(x, None, weight, eps, cast_before_scale, weight_offset, with_residual=False)
    differentiates = torch.is_grad_enabled() and _requires_grad(x, weight)
    if out is not None:
        _validate.out_form(out, x, direct.result_dtype(x, weight), differentiates=differentiates)
        if type(out) in TENSORS and out.device.type != "meta":
            _validate.out_memory(out, x, weight)
    if not _plain(x, weight, out):
        y, _ = _operator(x, None, weight, spec)
        return y if out is None else out.copy_(y)
    if differentiates:
        return _library.EagerNorm.apply(x, None, weight, spec)
    y, _, _ = _library.forward(x, None, weight, spec, with_rstd=False, out=out)
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

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32, on a CPU or a CUDA device.
        residual: `[..., n]`, of the dtype and device of x.
        weight, eps, cast_before_scale, weight_offset: as for `rms_norm`.

    Returns: (y, s). s has the dtype of x and is rounded before it is normalised, so the bits are those of
        `s = x + residual; y = rms_norm(s, weight)`; in float32 the compiler fuses the last product of the backward pass
        with the addition of the gradient of s.

    Raises: as `rms_norm`.

    Source: `LlamaDecoderLayer` in Hugging Face's transformers, where the addition and the norm are two steps.
    """
    if torch.compiler.is_compiling():
        _validate.flag("cast_before_scale", cast_before_scale)
        y, s, _ = torch.ops.pallas_norm.add_rms_norm(x, residual, weight, eps, cast_before_scale, weight_offset)
        return y, s
    if (results := _short_add(x, residual, weight, eps, cast_before_scale, weight_offset)) is not None:
        return results
    spec = _options.spec(x, residual, weight, eps, cast_before_scale, weight_offset, with_residual=True)
    if not _plain(x, residual, weight):
        y, s, _ = _operator(x, residual, weight, spec)
        return y, s
    if torch.is_grad_enabled() and _requires_grad(x, residual, weight):
        return _library.EagerNorm.apply(x, residual, weight, spec)
    y, s, _ = _library.forward(x, residual, weight, spec, with_rstd=False)
    assert s is not None
    _remember(x, residual, weight, spec)
    return y, s


def _requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _plain(*tensors: Tensor | None) -> bool:
    """No subclass, mode, transformation or device that must see an operator instead of a launch."""
    return (
        all(tensor is None or (type(tensor) in TENSORS and tensor.device.type != "meta") for tensor in tensors)
        and not _dispatch_modes()
        and _transformation() is None
        and _tracing() is None
    )


def _operator(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> Any:
    options = spec.eps, spec.cast_before_scale, spec.weight_offset
    if _transformation() is not None:  # torch.func differentiates no operators of a library
        return _library.Norm.apply(x, residual, weight, *options)
    if residual is None:
        return torch.ops.pallas_norm.rms_norm(x, weight, *options)
    return torch.ops.pallas_norm.add_rms_norm(x, residual, weight, *options)


# --- the short way ----------------------------------------------------------------------------------------------------


def _short_add(x: Any, residual: Any, weight: Any, eps: Any, cast_before_scale: Any, weight_offset: Any) -> Any:
    """(y, s) of a call like one that was checked before, as in rms_norm; None where more must be looked at."""
    operands = x, residual, weight
    try:
        contiguous = all(type(tensor) in TENSORS and tensor.is_contiguous() for tensor in operands)
    except RuntimeError:  # a compressed sparse tensor has no is_contiguous
        contiguous = False
    if (
        not contiguous
        or not (type(eps) is type(weight_offset) is float and type(cast_before_scale) is bool)
        or _dispatch_modes()
        or _transformation() is not None
        or _tracing() is not None
        or forward_ad._current_level >= 0
    ):
        return None
    n, device = weight.numel(), x.get_device()
    found = _ready.get((x.dtype, n, weight.dtype, eps, cast_before_scale, weight_offset, device, True))
    if (
        found is None
        or weight.dim() != 1
        or x.shape[-1:] != (n,)
        or residual.shape != x.shape
        or residual.dtype != x.dtype
        or weight.get_device() != device
        or residual.get_device() != device
        or device != _current_device()
        or (_grad_enabled() and (x.requires_grad or weight.requires_grad or residual.requires_grad))
    ):
        return None
    (run, pack), y_dtype, block, _ = found
    at, rows = [tensor.data_ptr() for tensor in operands], x.numel() // n
    if (at[0] | at[1] | at[2]) % ALIGNMENT or not rows or not all(at):
        return None
    launch.current_context()
    y, s = _empty_like(x) if y_dtype is None else _empty_like(x, dtype=y_dtype), _empty_like(x)
    blocks = rows // block * COUNT
    run(_stream(device), pack(*at, blocks, blocks, blocks + rows % block * COUNT, y.data_ptr(), s.data_ptr()))
    return y, s


def _remember(x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> None:
    """The next call like this one takes the short way."""
    if weight is None or not x.numel() or _library.path(x) is not direct:
        return
    if not x.is_contiguous() or x.data_ptr() % ALIGNMENT:  # the kernel of the short way is another one then
        return
    n, device, weight_dtype = x.shape[-1], x.get_device(), weight.dtype
    program = direct.program_of(direct.Forward(n, x.dtype, weight_dtype, spec, residual is not None, with_rstd=False))
    options = spec.eps, spec.cast_before_scale, spec.weight_offset
    key = x.dtype, n, weight_dtype, *options, device, residual is not None
    dtype = direct.result_dtype(x, weight)
    plan, y_dtype = program.plan, None if dtype == x.dtype else dtype
    assert plan is not None
    run, pack = launch.kernel(program, device)
    if plan.programs is not None:
        pack = launch.clamped(pack, program.inputs.index("programs"), plan.programs * COUNT)
    _ready[key] = (run, pack), y_dtype, plan.block, plan.source is not Source.MEMORY
