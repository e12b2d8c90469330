"""What a call computes, beside its operands: static, hashable, the same on every path."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from ._dtypes import Dtypes

if TYPE_CHECKING:
    from jax.typing import DTypeLike

Implementation = Literal["mosaic_gpu", "xla", "interpret"]


@dataclasses.dataclass(frozen=True)
class Spec:
    """As the public functions are given it; what the dtypes come to with operands, `dtypes` tells."""

    eps: float = 1e-6
    cast_before_scale: bool = True
    weight_offset: float = 0.0
    implementation: Implementation | None = None
    axis_name: tuple[str, ...] = ()  # the mesh axes over which the rows themselves are split
    axis_index_groups: tuple[tuple[int, ...], ...] | None = None  # of these, as lax.psum takes them
    unit_dtype: str | None = None
    round_weight: bool = False
    out_dtype: str | None = None
    s_dtype: str | None = None
    in_place: bool = False  # a kernel's y takes the memory of x, and s that of residual, of the same dtypes

    @property
    def rounding(self) -> dict[str, Any]:
        """The options of reference.backward, and with eps those of reference.forward."""
        return {
            "cast_before_scale": self.cast_before_scale,
            "weight_offset": self.weight_offset,
            "unit_dtype": self.unit_dtype,
            "round_weight": self.round_weight,
            "out_dtype": self.out_dtype,
        }

    @property
    def unit(self) -> dict[str, Any]:
        """The options of reference.weight_gradient."""
        return {"cast_before_scale": self.cast_before_scale, "unit_dtype": self.unit_dtype}

    @property
    def split(self) -> dict[str, Any]:
        """The options of reference.forward and reference.input_gradient that add up the parts of a split row."""
        return {"axis_name": self.axis_name, "axis_index_groups": self.axis_index_groups}

    def dtypes(self, x: DTypeLike, residual: DTypeLike | None = None, weight: DTypeLike | None = None) -> Dtypes:
        """Of operands of these dtypes; in the backward pass x is s."""
        return Dtypes.of(
            x,
            residual,
            weight,
            cast_before_scale=self.cast_before_scale,
            unit_dtype=self.unit_dtype,
            round_weight=self.round_weight,
            out_dtype=self.out_dtype,
            s_dtype=self.s_dtype,
        )
