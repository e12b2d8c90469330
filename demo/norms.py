"""The norms that are compared. Each takes torch tensors and gives a torch tensor on the same device."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import pallas_norm
from demo.activations import Case
from pallas_norm_torch import to_jax, to_torch


def _options(case: Case) -> dict[str, Any]:
    gemma = {"cast_before_scale": False, "weight_offset": 1.0} if case.gemma else {}
    return {"eps": case.eps, **gemma}


def _program(case: Case) -> Any:
    """(y, rstd). One program for both ways in: in another, XLA may add up a row in another order, which rstd shows."""
    return jax.jit(functools.partial(pallas_norm.rms_norm, return_rstd=True, **_options(case)))


def from_jax(case: Case, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, rstd) of JAX arrays that never were torch's: the elements are copied through the host."""
    device = next(iter(to_jax(x).devices()))
    y, rstd = _program(case)(*(jax.device_put(to_numpy(tensor), device) for tensor in (x, weight)))
    return to_torch(y), to_torch(rstd)


def from_torch(case: Case, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same on torch's own memory, through DLPack."""
    y, _ = _program(case)(to_jax(x), to_jax(weight))
    return to_torch(y)


def hugging_face(case: Case, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The class that the model itself uses, eager."""
    module = (Gemma2RMSNorm if case.gemma else LlamaRMSNorm)(case.n, case.eps)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module(x)


def single_rounding(case: Case, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch.nn.functional.rms_norm multiplies by the weight before it rounds. Gemma's 1 + weight needs float32."""
    if case.gemma:
        return torch.nn.functional.rms_norm(x.float(), (case.n,), 1 + weight.float(), case.eps).to(x.dtype)
    return torch.nn.functional.rms_norm(x, (case.n,), weight, case.eps)


def plain_jax(case: Case, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """What one would write in JAX, under jit. XLA may drop the rounding in the middle."""

    @jax.jit
    def program(x: jax.Array, weight: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        unit = wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + case.eps)
        if case.gemma:
            return (unit * (1 + weight.astype(jnp.float32))).astype(x.dtype)
        return weight * unit.astype(x.dtype)

    return to_torch(program(to_jax(x), to_jax(weight)))


def replay(case: Case, x: torch.Tensor, rstd: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The specified roundings on the host, with NumPy and ml_dtypes alone, from a given rstd."""
    wide, scale, dtype = to_numpy(x).astype(np.float32), to_numpy(weight).astype(np.float32), to_numpy(x).dtype
    unit = wide * rstd.cpu().numpy()[:, None]
    if case.gemma:
        return to_tensor((unit * (1 + scale)).astype(dtype))
    return to_tensor((unit.astype(dtype).astype(np.float32) * scale).astype(dtype))


def exact_rstd(case: Case, x: torch.Tensor) -> torch.Tensor:
    """rstd with the sum in float64, rounded to float32 once. eps is the float32 that every norm here adds."""
    mean = x.double().square().mean(-1).cpu().numpy()
    return torch.from_numpy((1 / np.sqrt(mean + np.float64(np.float32(case.eps)))).astype(np.float32))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """NumPy knows bfloat16 through ml_dtypes, but torch does not know that it does."""
    host = tensor.cpu()
    return host.view(torch.int16).numpy().view(jnp.bfloat16) if host.dtype is torch.bfloat16 else host.numpy()


def to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
