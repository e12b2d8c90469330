"""The plans of the backward pass: a persistent grid of programs, each with its part of dweight."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax.numpy as jnp

from .. import _validate
from .backward_staged import pipeline
from .backward_warp import LONGEST_IN_WARPS, in_warps
from .hardware import RESIDENT_CLUSTERS
from .lengths import LARGEST_N, SMALLEST_N, checked
from .order import Order, without_kernel
from .plan import BackwardPlan, Choice, Regime, Source
from .vectors import NARROW, cta_vector

if TYPE_CHECKING:
    from jax.typing import DTypeLike

# --- rows of a CTA that are read twice --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reread:
    """Rows that bulk copies cannot move."""

    largest_n: int
    with_wide_columns: bool = True  # of a wider dy, or of ds too
    warpgroups: int
    cluster: int = 1
    per_sm: int = 1  # programs for which an SM has registers; more would run after the others
    why: str


REREAD = (
    Reread(largest_n=4096, warpgroups=1, per_sm=2, why="no bulk copy moves it; a lane has at most 32 elements"),
    Reread(
        largest_n=4352,
        with_wide_columns=False,
        warpgroups=2,
        per_sm=2,
        why="no bulk copy moves it; registers for two programs of up to 17 elements a lane",
    ),
    Reread(largest_n=8192, warpgroups=2, why="no bulk copy moves it; registers for one program"),
    *(
        Reread(
            largest_n=row.largest_n,
            warpgroups=row.warpgroups,
            cluster=row.cluster,
            why="no bulk copy moves it; at most 16 elements a lane, whose addresses fill the registers else",
        )
        for row in NARROW
    ),
)
LARGEST_REREAD_OVERLAP = 1 / 4


def _reread(n: int, itemsize: int, column_bytes: int) -> Choice:
    wide = column_bytes > 2 * itemsize
    row = next(row for row in REREAD if n <= row.largest_n and (row.with_wide_columns or not wide))
    vec = cta_vector(n, itemsize, row.warpgroups * row.cluster, largest_overlap=int(n * LARGEST_REREAD_OVERLAP))
    programs = RESIDENT_CLUSTERS[row.cluster] * row.per_sm
    plan = BackwardPlan(
        n,
        Regime.CTA,
        vec,
        warpgroups=row.warpgroups,
        cluster=row.cluster,
        source=Source.MEMORY,
        keeps_weight=False,
        programs=programs,
    )
    return Choice(plan, row.why, ())


# --- the choice -------------------------------------------------------------------------------------------------------


@functools.cache
def choice(n: int, itemsize: int, column_bytes: int, narrowest: int) -> Choice:
    """itemsize: of x, which is s in the residual form, and of ds. column_bytes: of x, dy and ds together; narrowest: of
    the narrower of x and dy."""
    if (piped := pipeline(n, itemsize, column_bytes, narrowest)) is not None:
        return piped
    return (in_warps if n <= LONGEST_IN_WARPS else _reread)(n, itemsize, column_bytes)


def backward_plan_for(
    n: int, dtype: DTypeLike, *, dy_dtype: DTypeLike | None = None, residual: bool = False
) -> BackwardPlan:
    """The backward plan for rows of `n` elements of `dtype`, on Hopper.

    dtype: that of x, in the residual form of s. dy_dtype: that of y, by default that of x. residual: the form that also
    adds a gradient ds.

    Raises: as `plan_for`.

    Example:
        print(backward_plan_for(4096, "bfloat16"))
    """
    n, itemsize = checked(n), jnp.dtype(_validate.dtype_name("dtype", dtype)).itemsize
    dy_itemsize = jnp.dtype(_validate.dtype_name("dy_dtype", dtype if dy_dtype is None else dy_dtype)).itemsize
    column_bytes = dy_itemsize + itemsize * (2 if residual else 1)
    return choice(n, itemsize, column_bytes, min(itemsize, dy_itemsize)).plan


def backward_order(n: int, dtype: DTypeLike, *, dy_dtype: DTypeLike | None = None, residual: bool = False) -> Order:
    """The order in which the products g * unit of a row are added up.

    That of the squares for most rows. Where the backward pass shares a row among more warps it has more columns, and
    how many warps depends on what a column of x, dy and ds takes of the shared memory.
    """
    if not SMALLEST_N <= n <= LARGEST_N:
        return without_kernel(n)
    return backward_plan_for(n, dtype, dy_dtype=dy_dtype, residual=residual).order
