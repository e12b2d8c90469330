"""What the tests of the torch functions share: bits, Hugging Face's formula, devices."""

from __future__ import annotations

import jax
import pytest
import torch

import pallas_norm
import pallas_norm_torch
from pallas_norm_torch import _library, direct

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPTIONS = (1e-6, True, 0.0)  # of the operators, by position: eps, cast_before_scale, weight_offset


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, dtype and shape too."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    differ = int((bits(found) != bits(expected)).sum())
    assert differ == 0, f"{differ} of {found.numel()} elements differ"


def draw(*shape: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return draw(*shape, dtype=dtype, device=device, seed=seed).requires_grad_()


def hugging_face(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """LlamaRMSNorm.forward."""
    wide = x.float()
    unit = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return unit if weight is None else weight * unit


def way_of_jax(x: torch.Tensor) -> dict[str, str]:
    """The options of a call that has the bits of JAX's: none where the kernel is launched."""
    return {} if _library.path(x) is direct else {"implementation": "jax"}


_jitted = jax.jit(pallas_norm.rms_norm, static_argnames=("eps", "cast_before_scale", "weight_offset"))
_jitted_add = jax.jit(pallas_norm.add_rms_norm)


def by_jax(x: torch.Tensor, weight: torch.Tensor | None = None, **options: float | bool) -> torch.Tensor:
    """The same norm by a jitted JAX program on the same device."""
    operands = [x] if weight is None else [x, weight]
    return pallas_norm_torch.call_jax(lambda *arrays: _jitted(*arrays, **options), *operands)


def add_by_jax(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return pallas_norm_torch.call_jax(_jitted_add, x, residual, weight)


@jax.jit
def _gradients(x: jax.Array, weight: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(pallas_norm.rms_norm, x, weight)[1](dy)


@jax.jit
def _add_gradients(
    x: jax.Array, residual: jax.Array, weight: jax.Array, dy: jax.Array, ds: jax.Array
) -> tuple[jax.Array, ...]:
    return jax.vjp(pallas_norm.add_rms_norm, x, residual, weight)[1]((dy, ds))


def gradients_by_jax(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(dx, dweight) of x, weight, dy; (dx, dresidual, dweight) of x, residual, weight, dy, ds."""
    return pallas_norm_torch.call_jax(_gradients if len(operands) == 3 else _add_gradients, *operands)


def assert_sums(found: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor) -> None:
    """Both are float32 sums of these over all axes but the last, each in an order of its own: every addition rounds a
    sum that is no larger than that of their magnitudes."""
    assert found.dtype == expected.dtype == torch.float32
    assert found.shape == expected.shape == terms.shape[-1:]
    additions = terms.numel() // terms.shape[-1]
    magnitudes = terms.double().abs().sum(tuple(range(terms.ndim - 1)))
    assert ((found.double() - expected.double()).abs() <= 2 * additions * 2**-24 * magnitudes).all()
