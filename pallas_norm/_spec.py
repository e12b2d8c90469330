"""What a call computes, beside its operands: static, hashable, the same on every path."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

Implementation = Literal["mosaic_gpu", "xla", "interpret"]


@dataclasses.dataclass(frozen=True)
class Spec:
    eps: float = 1e-6
    cast_before_scale: bool = True
    weight_offset: float = 0.0
    implementation: Implementation | None = None

    @property
    def rounding(self) -> dict[str, Any]:
        """The options of reference.backward, and with eps those of reference.forward."""
        return {"cast_before_scale": self.cast_before_scale, "weight_offset": self.weight_offset}

    def scale(self, weight: jax.Array) -> jax.Array:
        """The float32 factor of each column. Adding an offset of 0.0 would turn a weight of -0.0 into 0.0."""
        wide = weight.astype(jnp.float32)
        return wide + jnp.float32(self.weight_offset) if self.weight_offset else wide
