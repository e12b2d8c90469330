"""Gated norms in torch's own statements, in Hugging Face's order: for CPU tensors, and where no kernel can be
launched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional

from pallas_norm._spec import Spec  # pyright: ignore[reportPrivateUsage]
from pallas_norm.gated_reference import Form

from . import _torch_state
from ._options import dtypes_of

Tensor = torch.Tensor


def activated(gate: Tensor, name: str) -> Tensor:
    """Of float32."""
    return functional.silu(gate) if name == "silu" else torch.sigmoid(gate)


def _grouped(wide: Tensor, form: Form) -> Tensor:
    return wide.reshape(*wide.shape[:-1], wide.shape[-1] // form.group, form.group)


def _gated_input(x: Tensor, gate: Tensor, form: Form) -> Tensor:
    """h, in groups."""
    wide = x.contiguous().float()
    h = wide if form.norm_before_gate else wide * activated(gate.contiguous().float(), form.activation)
    return _grouped(h, form)


@_torch_state.never_compiled
def rstd_of(x: Tensor, gate: Tensor, spec: Spec, form: Form) -> Tensor:
    return torch.rsqrt(_gated_input(x, gate, form).pow(2).mean(-1, keepdim=True) + spec.eps).squeeze(-1)


@_torch_state.never_compiled
def forward(x: Tensor, gate: Tensor, weight: Tensor | None, spec: Spec, form: Form) -> tuple[Tensor, Tensor]:
    """(y, rstd); the bits of the bodies that docs/gated.md lists."""
    rstd = rstd_of(x, gate, spec, form)
    return of_rstd(x, gate, weight, rstd, spec, form), rstd


def of_rstd(x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, spec: Spec, form: Form) -> Tensor:
    """y, of that rstd."""
    to = dtypes_of(spec, x, None, weight)
    unit = (_gated_input(x, gate, form) * rstd.unsqueeze(-1)).to(to.unit).reshape(x.shape)  # Hugging Face rounds here
    if not form.norm_before_gate:
        return _times_weight(unit, weight, spec, to.y)
    v = _times_weight(unit, weight, spec, product_dtype(unit, weight))
    return (v * activated(gate.contiguous().float(), form.activation)).to(to.y)


def product_dtype(unit: Tensor, weight: Tensor | None) -> torch.dtype:
    """What torch rounds unit * weight to."""
    return unit.dtype if weight is None else torch.promote_types(unit.dtype, weight.dtype)


def _times_weight(unit: Tensor, weight: Tensor | None, spec: Spec, dtype: torch.dtype) -> Tensor:
    if weight is None:
        return unit.to(dtype)
    if not spec.weight_offset and product_dtype(unit, weight) == dtype:
        return weight * unit
    return (unit.float() * _factor(weight, spec)).to(dtype)


def _factor(weight: Tensor, spec: Spec) -> Tensor:
    """Adding an offset of 0.0 would turn a weight of -0.0 into 0.0."""
    return weight.float() + spec.weight_offset if spec.weight_offset else weight.float()


class _Terms(NamedTuple):
    """As pallas_norm.gated_reference.gradients names them, in float32."""

    u: Tensor
    unit: Tensor
    a: Tensor
    dv: Tensor
    da: Tensor  # with norm_before_gate


def _terms(x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, spec: Spec, form: Form) -> _Terms:
    dv, a = dy.contiguous().float(), activated(gate.contiguous().float(), form.activation)
    u = _gated_input(x, gate, form) * rstd.unsqueeze(-1)
    unit, da = u.to(dtypes_of(spec, x, None, weight).unit).reshape(x.shape), dv
    if form.norm_before_gate:
        dtype = product_dtype(unit, weight)
        da = dv * _times_weight(unit, weight, spec, dtype).float()
        dv = (dv * a).to(dtype).float()
    return _Terms(u, unit.float(), a, dv, da)


def dweight_terms(
    x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, spec: Spec, form: Form
) -> Tensor:
    """What dweight adds up over rows."""
    terms = _terms(x, gate, weight, rstd, dy, spec, form)
    return terms.dv * terms.unit


@_torch_state.never_compiled
def backward(
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    spec: Spec,
    form: Form,
    *,
    with_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dx, dgate, dweight): the statements of pallas_norm.gated_reference.gradients."""
    u, unit, a, dv, da = _terms(x, gate, weight, rstd, dy, spec, form)
    wide, g = x.contiguous().float(), gate.contiguous().float()
    s = torch.sigmoid(g)
    dunit = dv if weight is None else dv * _factor(weight, spec)
    dunit = _grouped(dunit.to(dtypes_of(spec, x, None, weight).unit).float(), form)
    dh = ((dunit - u * (dunit * u).mean(-1, keepdim=True)) * rstd.unsqueeze(-1)).reshape(x.shape)
    dx = dh if form.norm_before_gate else dh * a
    da = da if form.norm_before_gate else dh * wide
    slope = s * (g * (1 - s) + 1) if form.activation == "silu" else s * (1 - s)
    dweight = None
    if with_dweight and weight is not None:
        dweight = (dv * unit).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
    return dx.to(x.dtype), (da * slope).to(gate.dtype), dweight
