"""The same functions through DLPack and JAX: for CPU tensors, and where no kernel can be launched directly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import torch

from pallas_norm import _autodiff
from pallas_norm._spec import Spec

from .exchange import call_jax

Tensor = torch.Tensor


@functools.cache
def _forward(spec: Spec, *, with_rstd: bool) -> Callable[..., Any]:
    return jax.jit(functools.partial(_autodiff.norm, spec=spec, with_rstd=with_rstd))


@functools.cache
def _backward(spec: Spec) -> Callable[..., Any]:
    return jax.jit(functools.partial(_autodiff.gradient, spec=spec))


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    spec: Spec,
    *,
    with_rstd: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, s, rstd), as direct.forward."""
    given = {"x": x, "residual": residual, "weight": weight}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    results = call_jax(_forward(spec, with_rstd=with_rstd), tensors)
    y = results["y"] if out is None else out.copy_(results["y"])
    return y, results.get("s"), results.get("rstd")


def backward(
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    spec: Spec,
    *,
    with_dweight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight), as direct.backward."""
    del with_dweight  # XLA computes both, or neither is much
    given = {"x": x, "weight": weight, "rstd": rstd, "dy": dy, "ds": ds}
    results = call_jax(_backward(spec), {name: tensor for name, tensor in given.items() if tensor is not None})
    return results["dx"], results.get("dweight")
