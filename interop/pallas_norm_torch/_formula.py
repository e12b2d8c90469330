"""The backward formula as torch operations: what its own derivative is taken of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pallas_norm._spec import Spec

from ._options import dtypes_of

Tensor = torch.Tensor


def gradients(
    x: Tensor, weight: Tensor | None, dy: Tensor, ds: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight) with the roundings of the kernel, and its sums in float32."""
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + spec.eps)
    unit = wide * rstd
    to = dtypes_of(spec, x, None, weight)
    g = dy.float() if weight is None else dy.float() * (_rounded(weight.float(), to.weight) + spec.weight_offset)
    g = g.to(to.unit).float()
    dx = (rstd * (g - unit * (g * unit).mean(-1, keepdim=True))).to(x.dtype)
    if ds is not None:
        dx = dx + ds
    if weight is None:
        return dx, None
    factor = unit.to(to.unit).float()
    return dx, (dy.float() * factor).sum(tuple(range(x.ndim - 1))).to(weight.dtype)


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """With the derivative one: no gradient of a float32 weight is rounded on the way."""
    return weight + (weight.to(dtype).float() - weight).detach()


def second_order(
    operands: Sequence[Tensor | None], ddx: Tensor | None, ddweight: Tensor | None, spec: Spec
) -> tuple[Tensor | None, ...]:
    """The gradients with respect to x, weight, dy and ds of <ddx, dx> + <ddweight, dweight>; None stands for zeros,
    which for a DTensor would have to be one too."""
    if ddx is None and ddweight is None:
        return (None,) * len(operands)
    given = [tensor for tensor in operands if tensor is not None]

    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        left = iter(values)
        x, weight, dy, ds = (None if tensor is None else next(left) for tensor in operands)
        assert x is not None
        assert dy is not None
        found = zip(gradients(x, weight, dy, ds, spec), (ddx, ddweight), strict=True)
        return tuple(value for value, wanted in found if value is not None and wanted is not None)

    pullback = torch.func.vjp(outputs, *given)[1]
    found = iter(pullback(tuple(wanted for wanted in (ddx, ddweight) if wanted is not None)))
    return tuple(None if tensor is None else next(found) for tensor in operands)
