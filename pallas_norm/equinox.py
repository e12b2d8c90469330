"""Equinox: RMSNorm with the constructor, the fields and the dtypes of equinox.nn.RMSNorm. Needs equinox."""

# pyright: reportAttributeAccessIssue=false, reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUntypedBaseClass=false
# (equinox is optional.)

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from ._api import rms_norm
from ._validate import DTYPES

_NOTHING = object()


class RMSNorm(eqx.nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight + bias, with the kernels of `pallas_norm.rms_norm`.

    Arguments: those of equinox.nn.RMSNorm: shape, eps, use_weight, use_bias, dtype. As there, x is one member, of
        `shape`: `jax.vmap(norm)(x)` is one call on all of them.

    Rounding: as Equinox: float32 throughout, one rounding to the dtype of x at the end. Equinox lets JAX order the
        sum, so a last bit may differ. Of float64, complex numbers and integers Equinox's own statements compute.

    Raises:
        ValueError: x has another shape than the norm; and what `pallas_norm.rms_norm` raises.

    Example:
        norm = RMSNorm(1024, use_bias=False)
        y = jax.vmap(norm)(x)
    """

    def __call__(self, x: Any, state: Any = _NOTHING, *, key: Any = None) -> Any:
        if x.shape != self.shape:
            raise ValueError(
                f"x has shape {x.shape} but this norm has shape {self.shape}; pass one member, or jax.vmap(norm)(x)"
            )
        arrays = [one for one in (x, self.weight, self.bias) if one is not None]
        if any(one.dtype.name not in DTYPES for one in arrays):
            return super().__call__(x, *([] if state is _NOTHING else [state]), key=key)
        row = x.reshape(-1)
        weight = None if self.weight is None else self.weight.reshape(-1)
        out_dtype = x.dtype if self.bias is None else jnp.float32  # the bias is added before the rounding
        y = rms_norm(row, weight, eps=self.eps, cast_before_scale=False, out_dtype=out_dtype)
        if self.bias is not None:
            y = y + self.bias.reshape(-1).astype(jnp.float32)
        y = y.reshape(x.shape).astype(x.dtype)
        return y if state is _NOTHING else (y, state)
