"""What a call computes, beside its operands: static, hashable, the same on every path."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Implementation = Literal["mosaic_gpu", "xla", "interpret"]


@dataclasses.dataclass(frozen=True)
class Spec:
    eps: float = 1e-6
    cast_before_scale: bool = True
    weight_offset: float = 0.0
    implementation: Implementation | None = None
    axis_name: tuple[str, ...] = ()  # the mesh axes over which the rows themselves are split
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None  # of these, as lax.psum takes them

    @property
    def rounding(self) -> dict[str, Any]:
        """The options of reference.backward, and with eps those of reference.forward."""
        return {"cast_before_scale": self.cast_before_scale, "weight_offset": self.weight_offset}

    @property
    def split(self) -> dict[str, Any]:
        """The options of reference.forward and reference.input_gradient that add up the parts of a split row."""
        return {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}
