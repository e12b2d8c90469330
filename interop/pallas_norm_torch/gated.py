"""The public function of a gated norm: kernels for plain tensors, the registered operator for everything else."""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function

from pallas_norm import _api_gated
from pallas_norm._spec import Spec
from pallas_norm.gated_reference import Form

from . import _dtensor, _gated_library, _options, _torch_state, _validate, gated_statements, ops

Tensor = torch.Tensor


def rms_norm_gated(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y = rms_norm(x, weight) * silu(gate), or rms_norm(x * silu(gate), weight): as pallas_norm.rms_norm_gated, in one
    kernel.

    Arguments:
        x, weight, eps, cast_before_scale, weight_offset, out_dtype: as for `rms_norm`.
        gate: `[..., n]`, of the device of x; its dtype may be another.
        activation: "silu" or "sigmoid", in float32.
        norm_before_gate: True multiplies the norm by the activated gate, False normalises the product of x with it.
        group_size: of neighbouring elements that are normalised together; it has to divide n. None: the whole row.

    Returns: y, `[..., n]`, contiguous.

    Rounding: that of the bodies in docs/gated.md. On a CPU, and where no kernel can be launched, their bits. A kernel's
        silu is within 4 units in the last place of float32 of the true value, and within 5 of torch's. For gates below
        about -87.34 it is -0, where torch's is a small normal number, of a magnitude of 1e-36 or less, down to about
        -88.7.

    Where it runs: as `rms_norm`, also rows at strides, such as a gate that is a part of a projection; in the backward
        pass these are copied first. Groups of fewer than 1024 elements whose
        weights differ have no kernel, nor have the gradients of a gate of another dtype than x: torch's statements
        compute them.

    Differentiation: as `rms_norm`.

    Raises: as `rms_norm`; TypeError, ValueError also of activation, norm_before_gate and group_size.

    Example:
        y = rms_norm_gated(x, gate, weight)                                          # Qwen3-Next
        y = rms_norm_gated(x, gate, weight, norm_before_gate=False, group_size=512)  # Mamba2, in groups

    Source: the bodies that docs/gated.md lists, of Hugging Face's transformers.
    """
    named: Any = {"activation": activation, "norm_before_gate": norm_before_gate, "group_size": group_size}
    compiling = torch.compiler.is_compiling()
    if not compiling and _torch_state.is_stand_in(x, gate, weight):
        rest: Any = {"cast_before_scale": cast_before_scale, "weight_offset": weight_offset, "out_dtype": out_dtype}
        return handle_torch_function(rms_norm_gated, (x, gate, weight), x, gate, weight, eps, **named, **rest)
    activation = _api_gated.activation_of(activation)
    before = _validate.flag("norm_before_gate", norm_before_gate)
    rounding = None, False, out_dtype, None
    if compiling:
        cast_before_scale, (*_, out_dtype, _) = _validate.rounding(cast_before_scale, rounding, weight)
        group = 0 if group_size is None else _api_gated.group_of(x.shape[-1], group_size)
        options = activation, before, group, eps, cast_before_scale, weight_offset, out_dtype
        y, _ = torch.ops.pallas_norm.rms_norm_gated(x, gate, weight, *options)
        return y
    given = x, gate, weight, eps, cast_before_scale, weight_offset, rounding
    spec = _options.spec(*given, with_residual=True, beside="gate")
    form = Form(activation, before, _api_gated.group_of(x.shape[-1], group_size))
    if not ops._plain(x, gate, weight):
        return _operator(x, gate, weight, spec, form)
    if torch.is_grad_enabled() and ops._requires_grad(x, gate, weight):
        return _gated_library.EagerNorm.apply(x, gate, weight, spec, form)
    return _gated_library.forward(x, gate, weight, spec, form, with_rstd=False)[0]


def _operator(x: Tensor, gate: Tensor, weight: Tensor | None, spec: Spec, form: Form) -> Tensor:
    """As that of `ops`: torch.func differentiates no operators of a library, and functionalize no autograd.Function."""
    _dtensor.register()
    options = _gated_library.Options.of(spec, form)
    transformed = _torch_state.transformation() is not None
    if transformed and not _torch_state.functionalized():
        return _gated_library.Norm.apply(x, gate, weight, *options)[0]
    if transformed and not _torch_state.alone():
        return gated_statements.forward(x, gate, weight, spec, form)[0]
    return torch.ops.pallas_norm.rms_norm_gated(x, gate, weight, *options)[0]
