"""Where a call rounds: the one rule that makes dtypes of those of the operands and of the options.

The specification, the kernels and torch's statements all ask here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from typing import Any, TypeAlias

    import numpy as np
    from jax.typing import DTypeLike

    DType: TypeAlias = np.dtype[Any]

F32 = jnp.dtype("float32")


class GradientDtypes(NamedTuple):
    """In which the gradient of s reaches x and the residual; None: in that of s, and for the residual as x's."""

    dx: str | None = None
    dresidual: str | None = None


AS_S = GradientDtypes()


@dataclasses.dataclass(frozen=True)
class Dtypes:
    """What each step of a call rounds to. All arithmetic between them is float32.

    s = round(x + residual), or x itself;   unit = round(s * rstd);   y = round(unit * (round(weight) + weight_offset))
    """

    s: DType
    unit: DType
    weight: DType | None  # in which it multiplies: its own, unless round_weight narrows it
    y: DType

    @staticmethod
    def of(
        x: DTypeLike,
        residual: DTypeLike | None = None,
        weight: DTypeLike | None = None,
        *,
        cast_before_scale: bool = True,
        unit_dtype: DTypeLike | None = None,
        round_weight: bool = False,
        out_dtype: DTypeLike | None = None,
        s_dtype: DTypeLike | None = None,
    ) -> Dtypes:
        """Of operands of these dtypes: s as the residual, unit as s, and y as both s and the weight would have it."""
        s = jnp.dtype(x if residual is None else residual if s_dtype is None else s_dtype)
        unit = s if unit_dtype is None else jnp.dtype(unit_dtype)
        unit = unit if cast_before_scale else F32
        factor = None if weight is None else jnp.dtype(weight)
        if factor is not None and round_weight and unit.itemsize <= factor.itemsize:  # float32 holds every weight
            factor = unit
        y = jnp.dtype(out_dtype) if out_dtype is not None else s if factor is None else promoted(s, factor)
        return Dtypes(s, unit, factor, y)


def promoted(one: DType, other: DType) -> DType:
    """promote_types: two different ones of bfloat16, float16 and float32 meet in float32."""
    return one if one == other else F32
