"""The plans for heads that are normalised and rotated: those of the forward pass, whose bits they have, with more
rows."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax.numpy as jnp

from .fitting import Misfit, backward_plan_on, forward_plan_on
from .hardware import SMS, WARPS
from .plan import BackwardPlan, Plan, Regime

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """What a CTA of the backward pass has, where a row gives a lane up to so many elements."""

    itemsize: int  # of x
    elements: int
    lanes: int = 1  # where so many or more have a row
    rows: int  # of a lane at a time
    per_sm: int  # programs for which an SM has registers
    of_wide_dy: int  # the same, where dy is float32 and x is not
    why: str


# H200, bf16, cold L2, beside a copy of the same bytes (bench/results/tuning_14.json); registers from the assembler
# (tests/aot_gpus.py). Two sums of dweight are in the times.
SHARES = (
    Share(
        itemsize=2, elements=8, lanes=32, rows=2, per_sm=4, of_wide_dy=3, why="256: 72.2 us, one row 77.5; copy 60.9"
    ),
    Share(itemsize=2, elements=8, rows=1, per_sm=6, of_wide_dy=5, why="128: 138.2 us, two rows 138.8; copy 118.5"),
    Share(itemsize=2, elements=12, rows=2, per_sm=3, of_wide_dy=2, why="192: 62.0 us, one row 65.3; copy 46.5"),
    Share(itemsize=2, elements=16, rows=1, per_sm=4, of_wide_dy=3, why="512: 86.0 us, two rows 107.3; copy 72.6"),
    Share(itemsize=2, elements=20, rows=1, per_sm=3, of_wide_dy=2, why="registers"),
    Share(itemsize=4, elements=4, rows=1, per_sm=7, of_wide_dy=7, why="128: 129.6 us, two rows 137.0; copy 118.3"),
    Share(itemsize=4, elements=8, rows=1, per_sm=5, of_wide_dy=5, why="256: 128.7 us, two rows 145.3; copy 119.1"),
    Share(itemsize=4, elements=12, rows=1, per_sm=4, of_wide_dy=4, why="registers"),
    Share(itemsize=4, elements=16, rows=1, per_sm=3, of_wide_dy=3, why="registers"),
    Share(itemsize=4, elements=20, rows=1, per_sm=2, of_wide_dy=2, why="registers"),
)
# Of more elements a lane takes vectors of half the width, and half of them: twice as many lanes have the same columns.
# 192: 62.0 us, without 65.0.
MOST_ELEMENTS = {2: 16, 4: 20}


def rope_backward_plan_on(gpu: Gpu, n: int, dtype: DTypeLike, *, dy_dtype: DTypeLike) -> BackwardPlan:
    """As rope_plan_on, of the gradients. Their rows are added up in the order of the norm's backward pass, or Misfit is
    raised."""
    plan, itemsize = rope_plan_on(gpu, n, dtype), jnp.dtype(dtype).itemsize
    vec, lanes, chunks = plan.vec, plan.lanes, plan.chunks
    if vec * chunks > MOST_ELEMENTS[itemsize] and lanes < 32:
        vec, lanes = vec // 2, lanes * 2
    fits = (one for one in SHARES if one.itemsize == itemsize and one.lanes <= lanes and vec * chunks <= one.elements)
    share = next(fits, None)
    alone = backward_plan_on(gpu, n, dtype, dy_dtype=dy_dtype, residual=False, with_dweight=True)
    if share is None or alone.width != plan.width:
        raise Misfit(
            f"the gradients of heads of {n} elements have no kernel of their own: they are added up in another order "
            "than the heads, or are too long"
        )
    per_sm = share.per_sm if jnp.dtype(dy_dtype).itemsize <= itemsize else share.of_wide_dy
    return BackwardPlan(n, plan.regime, vec, lanes, WARPS * (32 // lanes) * share.rows, programs=per_sm * SMS)
