"""Calls whose dtypes are mixed, of the operands and options that tests/mixed_dtypes.py draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pallas_norm_torch import add_rms_norm, rms_norm
from tests import oracle
from tests.mixed_dtypes import EPS, Mix

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
Tensors = dict[str, torch.Tensor]


def tensors(given: dict[str, Any]) -> Tensors:
    def tensor(value: Any) -> torch.Tensor:
        if value.dtype == oracle.BF16:
            return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(value.copy())

    return {name: tensor(value) for name, value in given.items()}


def options(mix: Mix) -> dict[str, Any]:
    named = {"unit_dtype": mix.unit_dtype, "out_dtype": mix.out_dtype, "s_dtype": mix.s_dtype}
    found: dict[str, Any] = {name: TORCH[dtype] for name, dtype in named.items() if dtype is not None}
    return found | {"round_weight": mix.round_weight, "weight_offset": mix.weight_offset, "eps": EPS}


def call(mix: Mix, given: Tensors, norm: Any = rms_norm, add: Any = add_rms_norm) -> Tensors:
    """Everything of a call and its gradients, by name; rstd as the operators give it."""
    names = [name for name in ("x", "residual", "weight") if name in given]
    leaves = [given[name].clone().requires_grad_() for name in names]
    named = dict(zip(names, leaves, strict=True))
    results = [norm(**named, **options(mix))] if mix.residual is None else add(**named, **options(mix))
    cotangents = [given["dy"], *([given["ds"]] if mix.residual is not None else [])]
    gradients = torch.autograd.grad(results, leaves, cotangents)
    found = dict(zip(("y", "s"), (one.detach() for one in results), strict=False))
    found |= {f"d{name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    wide = found.get("s", given["x"]).float()
    return found | {"rstd": torch.rsqrt(wide.pow(2).mean(-1) + EPS)}
