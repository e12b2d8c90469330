"""The formula of a form in torch, given rstd, and inputs on which every other rounding shows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

from ._forms import Form

Tensor = torch.Tensor
F32 = torch.float32


def weight_of(form: Form, weight: Tensor) -> Tensor:
    """What `rms_norm` gets for the weight, but for an offset that it adds itself: the class's own statements."""
    if form.weight_dtype is not None:
        weight = weight.to(form.weight_dtype)
    if form.offset and not form.wide_offset:
        weight = weight + form.offset
    return weight


def formula(form: Form, x: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y of `rms_norm` with this form's options, given rstd, and what is done to y."""
    unit = x.float() * rstd
    if weight is None:
        y = unit if form.wide else unit.to(x.dtype)
    else:
        if form.cast_before_scale:
            unit = unit.to(x.dtype).float()
        given = weight_of(form, weight)
        factor = given.float() + form.offset if form.wide_offset else given.float()
        y = (unit * factor).to(form.out_dtype or torch.promote_types(x.dtype, given.dtype))
    return (y if bias is None else y + bias).to(form.result)


def rows(n: int, dtype: torch.dtype, eps: float) -> Iterator[Tensor]:
    """Of several shapes: ordinary rows, rows so small that eps is most of the mean, large ones, one element of many."""
    generator = torch.Generator().manual_seed(0)
    count = max(4, min(64, (1 << 16) // n))
    x = torch.randn(count, n, generator=generator)
    scale = torch.ones(count, 1)
    scale[::4] = max(eps, 1e-12) ** 0.5  # float16 has no smaller normal numbers than 6e-5, and rounds them
    scale[1::4] = 30.0
    x = (x * scale).to(dtype)
    x[2, 1:] = 0.0
    yield x[None]
    yield x
    yield x[:4].view(2, 2, n)
    yield x[:3].view(1, 3, n)
    yield x[3:4].view(1, 1, n)
    yield x[:4].view(1, 2, 2, n)
    yield x[:4].view(2, 1, 2, 1, n)
    yield x[3]


def with_axes_of_one(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Rows in every rank from 2 with every choice of axes of one element, of which symbols of sizes know nothing."""
    for rank in range(2, 6):
        for sizes in itertools.product((1, 2), repeat=rank - 1):
            yield x[: math.prod(sizes)].view(*sizes, x.shape[-1])


def weights(n: int, dtype: torch.dtype) -> Tensor:
    """Of both signs, hardly two alike, none near one."""
    generator = torch.Generator().manual_seed(1)
    return ((torch.rand(n, generator=generator) + 0.3) * torch.tensor([1.0, -3.0]).repeat(n)[:n]).to(dtype)


def rstd_is_wrong(x: Tensor, rstd: Tensor, eps: float) -> bool:
    """Whether it is not 1 / sqrt(mean(x^2) + eps) up to float32's rounding of a sum of n terms."""
    exact = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    return bool(((rstd.double() - exact).abs() > (x.shape[-1] / 2 + 8) * 2.0**-24 * exact).any())
