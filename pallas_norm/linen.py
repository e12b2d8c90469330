"""Flax Linen: RMSNorm with the attributes, the parameters and the dtypes of flax.linen.RMSNorm. Needs flax."""

# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUntypedBaseClass=false, reportUntypedFunctionDecorator=false
# (flax is optional, and has few types.)

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import dtypes

from . import _flax
from ._api import rms_norm
from ._spec import Implementation
from ._validate import DTYPES


class RMSNorm(nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + epsilon) * scale over the last axis, with the kernels of `pallas_norm.rms_norm`.

    Attributes: those of flax.linen.RMSNorm, of which `reduction_axes` and `feature_axes` have to be the last axis, and
        cast_before_scale: False, as Flax computes, multiplies in float32 and rounds once. True rounds before the scale,
            as Hugging Face's models do.
        implementation: as for `rms_norm`.

    Rounding: the result has Flax's dtype. The sum, rstd and the products are float32. Flax multiplies rstd by the scale
        first, so a last bit may differ from Flax's.

    Raises:
        NotImplementedError: statistics over other axes than the last, with a mask, with axis_index_groups, or not in
            float32.

    Example:
        norm = RMSNorm()
        variables = norm.init(jax.random.key(0), x)
        y = norm.apply(variables, x)
    """

    cast_before_scale: bool = False
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: Any, *, mask: Any = None) -> Any:
        _flax.check(self)
        _flax.no_mask(mask)
        x = jnp.asarray(x)
        scale = self.param("scale", self.scale_init, (x.shape[-1],), self.param_dtype) if self.use_scale else None
        given = [x] if scale is None else [x, scale]
        with jax.numpy_dtype_promotion("standard"):  # this promotion is Flax's, whatever the program around allows
            dtype = dtypes.canonicalize_dtype(*given, dtype=self.dtype)
            if x.dtype.name not in DTYPES:  # such as integers, which Flax computes in float32
                x = x.astype(dtype)
        y = rms_norm(
            x,
            scale,
            eps=self.epsilon,
            out_dtype=dtype if jnp.dtype(dtype).name in DTYPES else None,  # one rounding; float64 has no kernel
            cast_before_scale=self.cast_before_scale,
            implementation=self.implementation,
            axis_name=self.axis_name,
        )
        return y.astype(dtype)
