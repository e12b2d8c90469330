"""What a plan is: the block that one CTA covers, and where it gets the rows from. Which plan is taken: forward.py and
backward.py."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any, NamedTuple, TypeVar

from .hardware import SMEM_BYTES, SMS, WARPS
from .order import Order


class Regime(enum.Enum):
    WARP = "warp"  # a row never leaves a warp: its sum is shuffles only
    CTA = "cta"  # the warps of one CTA, or of a cluster of CTAs, share a row


class Source(enum.Enum):
    """Where the second pass over a row finds what the first one read: x, in the backward pass dy too."""

    REGISTERS = "registers"  # kept from the first pass; in the backward pass the next row's loads are in flight then
    PIPELINE = "pipeline"  # in shared memory, where bulk copies brought them several rows ahead
    MEMORY = "memory"  # read again: from L1 or L2, where the row fits


@dataclasses.dataclass(frozen=True)
class Plan:
    """The block that one CTA covers: rows, columns per chunk, vector width, and who owns what.

    A row is covered with blocks of `width` columns; the last one ends exactly at n and overlaps its predecessor, so no
    memory operation needs a mask. What overlaps is left out of the sum and written twice with the same values.
    """

    n: int
    regime: Regime
    vec: int  # neighbouring elements that a lane reads at once
    lanes: int = 32  # lanes that share a row
    block: int = 1  # rows of one warpgroup
    warpgroups: int = 1  # that share a row
    cluster: int = 1  # CTAs that share a row
    source: Source = Source.REGISTERS
    stages: int = 0  # rows in shared memory, of a PIPELINE
    rows_in_registers: bool = False  # of a PIPELINE, in registers for the second pass: the first one frees the stage
    programs: int | None = None  # of a persistent grid, at most; None: one a block
    parts: int = 1  # of the columns that are added up side by side, those of one worker

    @property
    def span(self) -> int:
        """Columns of one chunk: what one warpgroup (CTA) or one group of lanes (WARP) reads at once."""
        return (WARPS * 32 if self.regime is Regime.CTA else self.lanes) * self.vec

    @property
    def workers(self) -> int:
        """Warpgroups that share a row: worker k has the spans k * parts and following of each block of columns."""
        return self.warpgroups * self.cluster

    @property
    def width(self) -> int:
        """Columns that are added up side by side."""
        return self.span * self.workers * self.parts

    @property
    def blocks(self) -> int:
        """Of `width` columns, that cover a row."""
        return self.order.blocks

    @property
    def chunks(self) -> int:
        """Chunks that each worker reads: `parts` of each block."""
        return self.blocks * self.parts

    @property
    def overlap(self) -> int:
        """Elements that are read twice: the first ones of the last block."""
        return self.order.overlap

    @property
    def order(self) -> Order:
        """The order in which a row is added up: nothing of the plan but the width is part of it."""
        return Order(self.n, self.width)

    @property
    def depth(self) -> int:
        """Additions on the longest path of the row sum."""
        return self.order.depth


@dataclasses.dataclass(frozen=True)
class BackwardPlan(Plan):
    programs: int = 264  # pyright: ignore[reportIncompatibleVariableOverride]  the grid is persistent: each program adds up its part of dweight
    keeps_weight: bool = True  # in registers; else it is read again for every row


class Choice(NamedTuple):
    """A plan, and the row of a table that gave it."""

    plan: Any
    why: str
    figures: tuple[int, ...]


FEWEST_STAGES = 2  # the one that is read and the one that is filled


def stages_of(plan: Plan, column_bytes: int, *, per_sm: int, shared_bytes: int = SMEM_BYTES) -> int:
    """Rows, or parts of rows, that fit in the shared memory of a program.

    shared_bytes: of an SM, for all its programs.
    """
    # Every array takes whole KB: up to three are staged; then barriers, and sums that cross warps. Without them the
    # residual form of n = 12736 was refused by the compiler.
    others = 5 << 10 if plan.workers == 1 else 8 << 10
    if plan.regime is Regime.WARP:
        others += plan.block * plan.span * 4  # the rows of a block meet there for dweight
    return (shared_bytes // per_sm - others) // (plan.block * plan.n * column_bytes // plan.cluster)


def per_sm(plan: Plan) -> int:
    """CTAs of a persistent grid that an SM holds at a time, on Hopper."""
    return max(1, -(-(plan.programs or 0) * plan.cluster // SMS))


AnyPlan = TypeVar("AnyPlan", bound=Plan)


def pipelined(plan: AnyPlan, stages: int, column_bytes: int, *, shared_bytes: int = SMEM_BYTES) -> AnyPlan | None:
    """A plan of a PIPELINE with so many stages and programs, or with as many as fit; None where too few do. Where an SM
    cannot hold several CTAs with FEWEST_STAGES, half the programs are tried."""
    while True:
        fitting = min(stages, stages_of(plan, column_bytes, per_sm=per_sm(plan), shared_bytes=shared_bytes))
        if fitting >= FEWEST_STAGES:
            return dataclasses.replace(plan, stages=fitting)
        if per_sm(plan) == 1:
            return None
        plan = dataclasses.replace(plan, programs=(plan.programs or 0) // 2)


def from_memory(plan: AnyPlan) -> AnyPlan:
    """The plan for rows that no bulk copy can bring: the same chunks, and so the same bits."""
    if plan.source is not Source.PIPELINE:
        return plan
    grid = {} if isinstance(plan, BackwardPlan) else {"programs": None}
    return dataclasses.replace(plan, source=Source.MEMORY, stages=0, rows_in_registers=False, **grid)


def may_be_in_place(plan: Plan, rows: int) -> bool:
    """Whether no warp of a kernel reads a row of these that another one may have written.

    Rows that are read twice are such rows, and those that fill no block: every warp holds them, and one may have
    written before another has read. racecheck, which slows warps down, showed the norm of a norm.
    """
    return plan.source is not Source.MEMORY and not rows % plan.block


def staged_view(plan: Plan, itemsize: int) -> tuple[int, ...] | None:
    """The shape in which bulk copies see a row of a PIPELINE, or None if they can move none.

    In a cluster (chunks, CTAs, *part): a CTA copies [:, its own], which is what its warpgroups read.
    """
    if plan.cluster == 1:
        return pipeline_tile(plan.n, itemsize)
    part = plan.warpgroups * plan.span
    return None if plan.overlap or part % 256 else (plan.chunks, plan.cluster, part // 256, 256)


def pipeline_tile(n: int, itemsize: int) -> tuple[int, int] | None:
    """A row as (n // width, width), which one bulk copy can move, or None if none can.

    At most 256 a side, a width of whole 16 bytes, a row of whole 128 bytes: Mosaic splits the count of bytes over 128
    lanes.
    """
    if n * itemsize % 128:
        return None
    widths = (width for width in range(256, 0, -1) if n % width == 0 and width * itemsize % 16 == 0)
    width = next(widths, None)
    return None if width is None or n // width > 256 else (n // width, width)
