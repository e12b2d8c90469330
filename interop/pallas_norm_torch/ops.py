"""The public functions for torch: prepared calls for plain tensors, the registered operators for everything else."""

# pyright: reportOptionalMemberAccess=false, reportPrivateUsage=false, reportUnknownVariableType=false
# (type(weight) in TENSORS tells no checker that it is not None; operators of torch.ops have no types)

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function

from pallas_norm._spec import Spec

from . import _asked, _dtensor, _eager, _library, _options, _out, _torch_state, _validate, launch
from ._lookup import prepare, prepared_for, refuse
from .prepared import ForwardCall

Tensor = torch.Tensor
TENSORS = _torch_state.TENSORS

# Looked up once: each name saves 0.05 us of a call.
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_dispatch_modes = _torch_state.dispatch_modes
_transformation = _torch_state.transformation
_tracing = _torch_state.tracing
_takes_y = _out.takes_y


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: Tensor | None = None,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    unit_dtype: torch.dtype | None = None,
    round_weight: bool = False,
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
        out_dtype: that of y, to which the product is rounded, once: so a float32 weight leaves y in bfloat16.
        unit_dtype: what the normalised x is rounded to before the weight multiplies it, by default the dtype of x.
            torch.float32 is cast_before_scale=False by another name.
        round_weight: rounds the weight to unit_dtype in the kernel, before weight_offset is added: a float32 weight
            that is trained, in a model that computes in bfloat16. The bits are those of a weight that was cast, but
            its gradient is that of the float32 weight, and was never rounded to bfloat16.
        implementation: None, or "jax": through DLPack and the jitted JAX function on the same device, with first
            derivatives, in eager code on plain tensors only. Each row count compiles, and JAX starts its backends.

    Returns: y, `[..., n]`, contiguous, of dtype out_dtype, by default promote_types(x, weight), as in Hugging Face, of
        the weight as round_weight leaves it; under autocast too.

    Where it runs: a CUDA tensor's kernel is launched on torch's current stream of its device, without a
        synchronisation; it may be captured into a CUDA graph after one call outside. Where the kernel cannot be
        launched (see `explain`), and for CPU tensors, torch's own statements compute it, as in LlamaRMSNorm.forward.
        A DTensor's rows are normalised where they lie, y is sharded as x; a sharded last axis is gathered first.

    Differentiation: reverse mode, twice; through torch.compile, torch.export and torch.func.vjp and vmap. Forward mode
        raises NotImplementedError.

    Raises:
        TypeError: an operand is no dense tensor, or of another dtype, as an option is that names one; eps or
            weight_offset is no real number.
        ValueError: a shape, a device or a value does not fit, out overlaps an operand, or cast_before_scale=False and a
            unit_dtype contradict each other.
        NotImplementedError: another device type, forward-mode differentiation, or implementation="jax" where it cannot
            run.

    Example:
        y = rms_norm(x, weight, 1e-5)
        rms_norm(x, weight, 1e-5, out=x)  # in place

    Source: `LlamaRMSNorm` in Hugging Face's transformers.
    """
    rounding = unit_dtype, round_weight, out_dtype, None
    if implementation is not None:
        options = eps, cast_before_scale, weight_offset, rounding
        return _asked.rms_norm(implementation, x, weight, options, out, plain=_plain)
    if _is_compiling():
        cast_before_scale, rounding = _validate.rounding(cast_before_scale, rounding, weight)
        options = eps, cast_before_scale, weight_offset, *_options.shortest(rounding)
        y, _ = torch.ops.pallas_norm.rms_norm(x, weight, *options)
        if out is None:
            return y
        _out.form("out", out, x, y.dtype, differentiates=torch.is_grad_enabled() and _requires_grad(x, weight))
        _out.check_program(out, None, x, None, weight)
        return out.copy_(y)
    call = prepared_for(x, None, weight, eps, cast_before_scale, weight_offset, rounding)
    if call is not None:
        try:
            if _grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
                if out is None:
                    return _eager.norm(x, None, weight, call)
            elif out is None and weight is not None:
                return call.plain(x, weight)
            elif (
                out is None
                or (out is x and call.y_dtype is None and _out.takes_x(x, weight))
                or _takes_y(out, x, weight, call.to.y)
            ):
                return call(x, None, weight, out)[0]
        except launch.Unavailable as reason:  # of the form with rstd, or for strides
            refuse(x, reason)
    if _torch_state.is_stand_in(x, weight, out):
        named: Any = {"out": out, "cast_before_scale": cast_before_scale, "weight_offset": weight_offset}
        named |= {"out_dtype": out_dtype, "unit_dtype": unit_dtype, "round_weight": round_weight}
        return handle_torch_function(rms_norm, (x, weight, out), x, weight, eps, **named)
    spec = _options.spec(x, None, weight, eps, cast_before_scale, weight_offset, rounding, with_residual=False)
    differentiates = torch.is_grad_enabled() and _requires_grad(x, weight)
    if out is not None:
        _out.form("out", out, x, _options.dtypes_of(spec, x, None, weight).y, differentiates=differentiates)
        if type(out) in TENSORS and out.device.type != "meta":
            _out.memory({"out": out}, {"x": x}, weight)
    if not _plain(x, weight, out):
        y, _ = _operator(x, None, weight, spec)
        return y if out is None else out.copy_(y)
    try:
        if (call := prepare(x, None, weight, spec, (cast_before_scale, rounding))) is not None:
            return _eager.norm(x, None, weight, call) if differentiates else call(x, None, weight, out)[0]
    except launch.Unavailable as reason:
        refuse(x, reason)
    if differentiates:
        return _eager.Norm.apply(x, None, weight, spec)
    return _library.forward(x, None, weight, spec, with_rstd=False, out=out)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    out: Tensor | None = None,
    s_out: Tensor | None = None,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
    unit_dtype: torch.dtype | None = None,
    round_weight: bool = False,
    s_dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """s = round(x + residual); y = rms_norm(s): the residual form of every decoder layer, in one kernel.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32, on a CPU or a CUDA device.
        residual: `[..., n]`, on the device of x. Its dtype may differ from that of x, as that of a float32 residual
            stream does.
        out, s_out: receive y and s, and are returned. Each may be x or residual itself, as serving engines have it
            (out=x, s_out=residual), and otherwise shares no memory with an operand or the other. Not differentiable.
        s_dtype: that of s, by default the residual's.
        weight, eps, cast_before_scale, weight_offset, out_dtype, unit_dtype, round_weight, implementation: as for
            `rms_norm`, of s in the place of x.

    Returns: (y, s). s is the float32 sum, rounded before it is normalised, so the bits are those of
        `s = x + residual; y = rms_norm(s, weight)`. The gradient of s is rounded to the dtype of s, and from there to
        that of x, and to that of residual, where these are others.

    Raises: as `rms_norm`.

    Example:
        y, s = add_rms_norm(x, residual, weight)
        add_rms_norm(x, residual, weight, out=x, s_out=residual)  # in place, as serving engines do

    Source: `LlamaDecoderLayer` in Hugging Face's transformers, where the addition and the norm are two steps.
    """
    rounding = unit_dtype, round_weight, out_dtype, s_dtype
    places = {name: place for name, place in (("out", out), ("s_out", s_out)) if place is not None}
    if implementation is not None:
        options = eps, cast_before_scale, weight_offset, rounding
        return _asked.add_rms_norm(implementation, x, residual, weight, options, places, plain=_plain)
    if _is_compiling():
        cast_before_scale, rounding = _validate.rounding(cast_before_scale, rounding, weight)
        options = eps, cast_before_scale, weight_offset, *_options.shortest(rounding)
        y, s, _ = torch.ops.pallas_norm.add_rms_norm(x, residual, weight, *options)
        _check_places(places, x, residual, weight, y.dtype, s.dtype)
        if out is not None and out is s_out:
            raise ValueError(_out.TWICE)
        if places:
            _out.check_program(out, s_out, x, residual, weight)
        return y if out is None else out.copy_(y), s if s_out is None else s_out.copy_(s)
    call = prepared_for(x, residual, weight, eps, cast_before_scale, weight_offset, rounding)
    if call is not None:
        try:
            if not places:
                return _added(x, residual, weight, call)
            if not (_grad_enabled() and _requires_grad(x, residual, weight)) and _out.takes_both(
                out, s_out, x, residual, weight, call.to
            ):
                return call(x, residual, weight, out, s_out)[:2]  # pyright: ignore[reportReturnType]
        except launch.Unavailable as reason:
            refuse(x, reason)
    if _torch_state.is_stand_in(x, residual, weight, out, s_out):
        named: Any = {"cast_before_scale": cast_before_scale, "weight_offset": weight_offset, **places}
        named |= {"out_dtype": out_dtype, "unit_dtype": unit_dtype, "round_weight": round_weight, "s_dtype": s_dtype}
        given = x, residual, weight, out, s_out
        return handle_torch_function(add_rms_norm, given, x, residual, weight, eps, **named)
    spec = _options.spec(x, residual, weight, eps, cast_before_scale, weight_offset, rounding, with_residual=True)
    if places:
        to = _options.dtypes_of(spec, x, residual, weight)
        _check_places(places, x, residual, weight, to.y, to.s)
        if all(type(place) in TENSORS and place.device.type != "meta" for place in places.values()):
            _out.memory(places, {"x": x, "residual": residual}, weight)
    if not _plain(x, residual, weight, out, s_out):
        y, s, _ = _operator(x, residual, weight, spec)
        return y if out is None else out.copy_(y), s if s_out is None else s_out.copy_(s)
    try:
        if (call := prepare(x, residual, weight, spec, (cast_before_scale, rounding))) is not None:
            if places:
                return call(x, residual, weight, out, s_out)[:2]  # pyright: ignore[reportReturnType]
            return _added(x, residual, weight, call)
    except launch.Unavailable as reason:
        refuse(x, reason)
    if torch.is_grad_enabled() and _requires_grad(x, residual, weight):
        return _eager.Norm.apply(x, residual, weight, spec)
    y, s, _ = _library.forward(x, residual, weight, spec, with_rstd=False, out=out, s_out=s_out)
    assert s is not None
    return y, s


def _added(x: Tensor, residual: Tensor, weight: Tensor | None, call: ForwardCall) -> tuple[Tensor, Tensor]:
    if _grad_enabled() and (x.requires_grad or residual.requires_grad or (weight is not None and weight.requires_grad)):
        return _eager.norm(x, residual, weight, call)
    return call.added(x, residual, weight)


def _check_places(
    places: dict[str, Tensor], x: Tensor, residual: Tensor, weight: Tensor | None, y: torch.dtype, s: torch.dtype
) -> None:
    differentiates = torch.is_grad_enabled() and _requires_grad(x, residual, weight)
    for name, place in places.items():
        _out.form(name, place, x, y if name == "out" else s, differentiates=differentiates)


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
    _dtensor.register()
    options = _options.arguments(spec)
    if _transformation() is not None and _torch_state.functionalized():
        return _library.functional(x, residual, weight, spec)
    if _transformation() is not None:  # torch.func differentiates no operators of a library
        return _library.Norm.apply(x, residual, weight, *options)
    if residual is None:
        return torch.ops.pallas_norm.rms_norm(x, weight, *options)
    return torch.ops.pallas_norm.add_rms_norm(x, residual, weight, *options)
