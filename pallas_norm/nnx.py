"""Flax NNX: RMSNorm with the constructor, the parameters and the dtypes of flax.nnx.RMSNorm. Needs flax."""

# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUntypedBaseClass=false, reportUnknownParameterType=false
# (flax is optional, and has few types.)

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from . import _flax
from ._api import rms_norm
from ._spec import Implementation
from ._validate import DTYPES


class RMSNorm(nnx.RMSNorm):
    """y = x / sqrt(mean(x^2) + epsilon) * scale over the last axis, with the kernels of `pallas_norm.rms_norm`.

    Arguments: those of flax.nnx.RMSNorm, of which `reduction_axes` and `feature_axes` have to be the last axis, and
        cast_before_scale: False, as Flax computes, multiplies in float32 and rounds once. True rounds before the scale,
            as Hugging Face's models do; the scale is rounded to the dtype of x in the kernel then, so that a float32
            one gets a gradient that was never rounded to bfloat16. With dtype=None Flax promotes x first: beside a
            float32 scale it is float32 then, and nothing is rounded before the scale; pass dtype=x.dtype.
        implementation: as for `rms_norm`.

    Rounding: the dtypes are Flax's: x and scale are promoted to `dtype`, or to each other. The sum, rstd and the
        products are float32. Flax multiplies rstd by the scale first, so a last bit may differ from Flax's.

    Raises:
        NotImplementedError: statistics over other axes than the last, with a mask or with axis_index_groups.

    Example:
        norm = RMSNorm(1024, rngs=nnx.Rngs(0))
        y = norm(x)
    """

    def __init__(
        self,
        num_features: int,
        *,
        cast_before_scale: bool = False,
        implementation: Implementation | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        self.cast_before_scale = cast_before_scale
        self.implementation = implementation
        _flax.check(self)

    def __call__(self, x: Any, mask: Any = None) -> Any:
        patched = "cast_before_scale" not in vars(self)  # a module of Flax's, made without the arguments of this class
        if not patched:
            _flax.no_mask(mask)
        scale = None if self.scale is None else self.scale[...]
        with jax.numpy_dtype_promotion("standard"):  # this promotion is Flax's, whatever the program around allows
            x, rounded = self.promote_dtype((given := x, scale), dtype=self.dtype)
        if patched and (mask is not None or x.dtype.name not in DTYPES or not _flax.is_of_a_mesh(self.axis_name)):
            return super().__call__(given, mask=mask)
        cast_before_scale = getattr(self, "cast_before_scale", False)
        implementation = getattr(self, "implementation", None)
        return rms_norm(
            x,
            scale if cast_before_scale else rounded,
            eps=self.epsilon,
            cast_before_scale=cast_before_scale,
            round_weight=cast_before_scale and scale is not None,
            out_dtype=x.dtype,
            implementation=implementation,
            axis_name=self.axis_name,
        )
