"""The plans for heads that are normalised and rotated: those of the forward pass, whose bits they have, with more
rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .fitting import Misfit, forward_plan_on
from .plan import Plan, Regime

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from .hardware import Gpu

# Rows that lanes with one vector of 16 bits have at a time: their loads are in flight together. H200, bf16, cold L2;
# 16384 tokens of 32 + 8 heads of 128: 85.2 us, one row 93.1, four 89.3, copy 85.6; of 16 + 8 heads of 64: 27.9, 29.9,
# 31.0; 8192 tokens of 16 + 4 heads of 256: 47.7, 49.3, 51.5. Heads of 96, three vectors: 40.1, 40.2, 47.9.
ROWS = 2
ONE_VECTOR = 8


def rope_plan_on(gpu: Gpu, n: int, dtype: DTypeLike) -> Plan:
    """For heads of n elements of `dtype`. Raises Misfit where an element and the one n / 2 columns away, which it
    meets, are not at the same place of a vector: in one lane, or in two that are half a row's lanes apart."""
    plan = forward_plan_on(gpu, n, dtype)
    vectors, rest = divmod(n, 2 * plan.vec)
    meet = not rest and vectors % plan.lanes in (0, plan.lanes // 2)
    if plan.regime is not Regime.WARP or plan.overlap or not meet:
        raise Misfit(
            f"heads of {n} elements have no kernel that rotates them: an element and the one {n // 2} columns away "
            "are not at the same place of two lanes of a warp"
        )
    one_vector = plan.vec * plan.chunks == ONE_VECTOR
    return dataclasses.replace(plan, block=plan.block * ROWS) if one_vector else plan
