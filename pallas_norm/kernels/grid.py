"""Which rows a program gets: of a grid of one program a block, or of a persistent one."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..plans.plan import Plan, Regime
from .block import Block
from .cta import Exchange, SharedRow, WarpgroupRow, slot_of
from .launch_arguments import COUNTS as COUNTS
from .launch_arguments import LaunchArguments, count
from .warp import OneRow, WarpRows


def units(plan: Plan, rows: int) -> tuple[int, int]:
    """(full blocks of plan.block rows, rows left over)."""
    return divmod(rows, plan.block)


@dataclasses.dataclass(frozen=True)
class GridExtent:
    """What a kernel knows of its rows: numbers of the program, or of the launch (see `launch_arguments.count`)."""

    blocks: Any  # full ones, of plan.block rows
    programs: Any  # that work on full blocks
    left: int | None  # rows left over, which have a program each behind those; None where the launch decides
    # As `programs`, from a parameter of its own. The compiler sees two conditions, not one and its inverse, and so does
    # not move the end of both branches behind the second one: that was one more line of instructions to fetch, from
    # memory, and cost 0.6 us of 10 at 65536 rows of 128.
    first_left: Any


def counts_of(plan: Plan, rows: int) -> tuple[int, int, int]:
    """The values of COUNTS: full blocks; the programs that work on them; these and one for each row left over."""
    blocks, left = units(plan, rows)
    programs = blocks if plan.programs is None else min(blocks, plan.programs)
    return blocks, programs, programs + left


def extent(plan: Plan, rows: int, given: LaunchArguments | None, *, interpret: bool) -> GridExtent:
    """Of `rows` rows, or of the row count of the launch."""
    if given is None:
        blocks, programs, with_left = counts_of(plan, rows)
        return GridExtent(blocks, programs, with_left - programs, programs)
    blocks, first_left = (count(ref, interpret=interpret) for ref in (given.blocks, given.first_left))
    programs = blocks if plan.programs is None else lax.min(blocks, jnp.int32(plan.programs))
    return GridExtent(blocks, programs, 0 if plan.block == 1 else None, first_left)


def block(plan: Plan, index: Any, exchange: Exchange | None, slot: Any, step: Any, *, interpret: bool) -> Block:
    """The index-th full block, the program's step-th."""
    if plan.regime is Regime.WARP:
        return WarpRows(plan, pl.ds(pl.multiple_of(index * plan.block, plan.block), plan.block), interpret)
    if exchange is None:
        return WarpgroupRow(plan, index, interpret)
    return SharedRow(plan, index, interpret, exchange, slot, step)


@dataclasses.dataclass(frozen=True)
class CtaBlocks:
    """The full blocks of one program: every programs-th of `count`, from `program` on; of a grid that is not persistent
    one alone."""

    plan: Plan
    exchange: Exchange | None
    program: Any
    programs: Any
    count: Any
    interpret: bool

    @property
    def steps(self) -> jax.Array:
        return lax.div(self.count - self.program + (self.programs - 1), jnp.int32(self.programs))

    def at(self, step: Any) -> Any:
        """The index of the block of a step."""
        return self.program + step * self.programs

    def block(self, step: Any) -> Block:
        slot = slot_of(step)
        return block(self.plan, self.at(step), self.exchange, slot, step, interpret=self.interpret)

    @functools.cached_property
    def first(self) -> Block:
        if self.plan.programs is None:
            return block(self.plan, self.program, self.exchange, 0, 0, interpret=self.interpret)
        return self.block(jnp.int32(0))


def run(
    plan: Plan,
    extent: GridExtent,
    exchange: Exchange | None,
    full: Callable[[CtaBlocks], None],
    left_over: Callable[[Block, Any], None],
    *,
    interpret: bool,
) -> None:
    """`full(blocks)` in the programs of the full blocks, then one program, `left_over(block, program)`, for each row
    that fills none.

    No row is written by two programs, so an output may be an input where there are no rows left over: those are held by
    every warp, which do not wait for each other. They have the lanes and vectors of the others.
    """
    program = lax.axis_index("program")

    blocks = functools.partial(full, CtaBlocks(plan, exchange, program, extent.programs, extent.blocks, interpret))

    def one_row() -> None:
        left_over(OneRow(plan, program - extent.first_left + extent.blocks * plan.block, interpret), program)

    if extent.left == 0:
        blocks()
    elif extent.left is not None and extent.blocks == 0:
        one_row()
    else:
        pl.when(program < extent.programs)(blocks)
        pl.when(program >= extent.first_left)(one_row)
