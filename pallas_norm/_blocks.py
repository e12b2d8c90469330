"""How a CTA owns its part of a row: what it reads, how its sums meet, where it writes. One class for each way.

Kernel bodies are written against `Block` and know nothing of lanes, warps or clusters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import _compat, _strided
from .regimes import WARPS, Plan

F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Meeting:
    """Shared memory in which the rows of a block meet, to be added up column by column."""

    rows: Any  # SMEM f32 (plan.block, plan.span)
    barrier: Any


@dataclasses.dataclass(frozen=True)
class Block:
    """One row, or plan.block rows, as a list of chunks of one shape and layout."""

    plan: Plan
    row: Any  # index of the (first) row
    interpret: bool

    def columns(self, ref: Any) -> list[jax.Array]:
        """The chunks of a (n,) reference: a weight."""
        return [self._load(ref.at[pl.ds(start, self.plan.span)]) for start in self._starts()]

    def load(self, ref: Any) -> list[jax.Array]:
        """The chunks of this block's rows of a (rows, n) reference."""
        if isinstance(ref, _strided.StridedRows):
            return [
                ref.load(self._first_row(), start, self.layout, shape=self.shape, one_row=self.one_row)
                for start in self._starts()
            ]
        return [self._load(ref.at[self.row, pl.ds(start, self.plan.span)]) for start in self._starts()]

    def load_stage(self, ref: Any) -> list[jax.Array]:
        """The chunks of one row that was copied to shared memory."""
        return [
            _compat.load_flat(ref, start, self.layout, shape=self.shape, interpret=self.interpret)
            for start in self._starts()
        ]

    def zeros(self) -> list[jax.Array]:
        return [self._cast(jnp.zeros(self.shape, F32)) for _ in range(self.plan.chunks)]

    def store(self, ref: Any, chunks: Sequence[jax.Array]) -> None:
        """The inverse of load."""
        for start, chunk in zip(self._starts(), chunks, strict=True):
            if isinstance(ref, _strided.StridedRows):
                ref.store(self._first_row(), start, chunk, self.layout, one_row=self.one_row)
                continue
            _compat.store(ref.at[self.row, pl.ds(start, self.plan.span)], chunk, interpret=self.interpret)

    def row_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        """The sum over each row, every element of the row counted once."""
        raise NotImplementedError

    def spread(self, per_row: jax.Array) -> jax.Array:
        """Per-row values in the shape of a chunk; a scalar broadcasts by itself."""
        return per_row

    def load_rows(self, ref: Any) -> jax.Array:
        """Per-row values of a (rows,) reference, in the form that row_sum gives."""
        return ref[self.row]

    def store_rows(self, ref: Any, per_row: jax.Array) -> None:
        """The inverse of load_rows."""
        ref[self.row] = per_row

    def store_columns(self, ref: Any, chunks: Sequence[jax.Array], meeting: Meeting | None) -> None:
        """Per-column values to a (n,) reference: the chunks, where they have several rows added up."""
        del meeting
        for start, chunk in zip(self._starts(), chunks, strict=True):
            _compat.store(ref.at[pl.ds(start, self.plan.span)], chunk, interpret=self.interpret)

    # What the classes below give: the shape and layout of a chunk, and where the chunks of this worker start.

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def layout(self) -> Any:
        raise NotImplementedError

    @property
    def one_row(self) -> bool:
        return True

    def _first_row(self) -> Any:
        return self.row

    def _starts(self) -> list[Any]:
        return [min(j * self.plan.span, self.plan.n - self.plan.span) for j in range(self.plan.chunks)]

    def _repeated(self) -> Any:
        """Leading elements of the last chunk that another chunk holds too."""
        return self.plan.overlap

    def _load(self, ref: Any) -> jax.Array:
        return _compat.load(ref, self.layout, shape=self.shape, interpret=self.interpret)

    def _cast(self, value: jax.Array) -> jax.Array:
        return _compat.layout_cast(value, self.layout, interpret=self.interpret)

    def _position(self) -> jax.Array:
        """Where in the chunk each element is."""
        return self._cast(lax.broadcasted_iota(jnp.int32, self.shape, len(self.shape) - 1))

    def _added_up(self, chunks: Sequence[jax.Array]) -> jax.Array:
        """The chunks added up element by element, what the last chunk repeats left out."""
        *rest, last = chunks
        if self.plan.overlap:
            last = jnp.where(self._position() >= self._repeated(), last, 0.0)
        return functools.reduce(jnp.add, rest, last)


@dataclasses.dataclass(frozen=True)
class WarpRows(Block):
    """plan.block rows in one warpgroup, each in plan.lanes lanes of one warp."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.block, self.plan.span

    @property
    def layout(self) -> Any:
        return _compat.rows_in_warps(self.plan.lanes, self.plan.vec)

    @property
    def one_row(self) -> bool:
        return False

    def _first_row(self) -> Any:
        return self.row.start

    def columns(self, ref: Any) -> list[jax.Array]:
        def spread(start: int) -> jax.Array:
            column = _compat.load(
                ref.at[pl.ds(start, self.plan.span)],
                self.layout.reduce(0),
                shape=(self.plan.span,),
                interpret=self.interpret,
            )
            return self._cast(lax.broadcast_in_dim(column, self.shape, (1,)))

        return [spread(start) for start in self._starts()]

    def row_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        return jnp.sum(self._added_up(chunks), axis=1)

    def spread(self, per_row: jax.Array) -> jax.Array:
        return self._cast(lax.broadcast_in_dim(per_row, self.shape, (0,)))

    def load_rows(self, ref: Any) -> jax.Array:
        return _compat.load(ref.at[self.row], self.layout.reduce(1), shape=(self.plan.block,), interpret=self.interpret)

    def store_rows(self, ref: Any, per_row: jax.Array) -> None:
        _compat.store(ref.at[self.row], per_row, interpret=self.interpret)

    def store_columns(self, ref: Any, chunks: Sequence[jax.Array], meeting: Meeting | None) -> None:
        assert meeting is not None
        one_row = OneRow(self.plan, None, self.interpret)
        for start, chunk in zip(self._starts(), chunks, strict=True):
            _compat.arrive_and_wait(meeting.barrier)  # all have read the chunk before
            _compat.store(meeting.rows, chunk, interpret=self.interpret)
            _compat.arrive_and_wait(meeting.barrier)
            rows = [one_row._load(meeting.rows.at[row]) for row in range(self.plan.block)]
            _compat.store(
                ref.at[pl.ds(start, self.plan.span)], functools.reduce(jnp.add, rows), interpret=self.interpret
            )


@dataclasses.dataclass(frozen=True)
class OneRow(Block):
    """One row, held by every group of plan.lanes lanes alike: the rows that do not fill a block of WarpRows.

    Lanes and vectors are those of WarpRows, so the sum adds the same numbers in the same order and the bits are the
    same.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.plan.span,)

    @property
    def layout(self) -> Any:
        return _compat.row_in_every_warp(self.plan.lanes, self.plan.vec)

    def row_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        return jnp.sum(self._added_up(chunks))


@dataclasses.dataclass(frozen=True)
class WarpgroupRow(Block):
    """One row in the four warps of one warpgroup; the sum crosses warps through Mosaic's own scratch."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.plan.span,)

    @property
    def layout(self) -> Any:
        return _compat.row_across_warps(self.plan.vec, split=False)

    def row_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        return jnp.sum(self._added_up(chunks))


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Where the warps of several warpgroups, and of several CTAs, meet to add up a row."""

    partials: Any  # SMEM f32 (slots, warpgroups, WARPS)
    barrier: Any
    total: Any  # SMEM f32 (slots,): this CTA's, for the others of the cluster


@dataclasses.dataclass(frozen=True)
class SharedRow(Block):
    """One row in the warps of several warpgroups, in one CTA or in a cluster of CTAs.

    jnp.sum across warps is not to be used with several warpgroups: all of them would use one scratch (77 % of the
    outputs of a draft were wrong, silently). So each warp adds up its own part, publishes one partial in shared
    memory, and after one barrier every thread adds the partials in one fixed order.
    """

    exchange: Exchange
    slot: Any  # of the exchange; neighbouring rows of a CTA take different ones

    @property
    def shape(self) -> tuple[int, ...]:
        return WARPS, 32 * self.plan.vec

    @property
    def layout(self) -> Any:
        return _compat.row_across_warps(self.plan.vec, split=True)

    def _warpgroup(self) -> jax.Array:
        return lax.axis_index("warpgroup") if self.plan.warpgroups > 1 else jnp.int32(0)

    def _worker(self) -> jax.Array:
        worker = self._warpgroup()
        if self.plan.cluster > 1:
            worker = worker + lax.axis_index("cluster") * self.plan.warpgroups
        return worker

    def _starts(self) -> list[jax.Array]:
        plan, worker = self.plan, self._worker()
        nominal = [(j * plan.workers + worker) * plan.span for j in range(plan.chunks)]
        return [lax.min(start, jnp.int32(plan.n - plan.span)) for start in nominal] if plan.overlap else nominal

    def _repeated(self) -> jax.Array:
        nominal = ((self.plan.chunks - 1) * self.plan.workers + self._worker()) * self.plan.span
        return jnp.maximum(nominal - (self.plan.n - self.plan.span), 0)

    def _position(self) -> jax.Array:
        sub_row, column = (self._cast(lax.broadcasted_iota(jnp.int32, self.shape, axis)) for axis in (0, 1))
        return sub_row * self.shape[1] + column

    def row_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        partials, slot = self.exchange.partials, self.slot
        partials[slot, self._warpgroup()] = jnp.sum(self._added_up(chunks), axis=1)
        _compat.arrive_and_wait(self.exchange.barrier)
        of_warps = [partials[slot, g, w] for g in range(self.plan.warpgroups) for w in range(WARPS)]
        total = functools.reduce(jnp.add, of_warps)
        return total if self.plan.cluster == 1 else self._across_cluster(total)

    def store_rows(self, ref: Any, per_row: jax.Array) -> None:
        @pl.when(self._worker() == 0)
        def _() -> None:
            ref[self.row] = per_row

    def _across_cluster(self, total: jax.Array) -> jax.Array:
        self.exchange.total[self.slot] = total
        _compat.cluster_arrive()
        _compat.cluster_wait()
        ctas = range(self.plan.cluster)
        return functools.reduce(
            jnp.add, (_compat.from_cta(self.exchange.total, "cluster", cta)[self.slot] for cta in ctas)
        )
