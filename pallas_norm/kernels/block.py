"""How a CTA owns its part of a row: what it reads, how its sums meet, where it writes. One class for each way: warp.py
and cta.py.

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

from .._row_sum import neighbours_added
from ..plans.plan import Plan
from . import conversions, groups, ieee, launch_arguments, layouts

F32 = jnp.float32
Chunks = list[jax.Array]  # the parts of a row that a CTA has, all of one shape


@dataclasses.dataclass(frozen=True)
class ColumnReduction:
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
        """The chunks of a (n,) reference, a weight; of a (groups, n) one, of which row r has the (r mod groups)-th."""
        group = () if len(ref.shape) == 1 else (lax.rem(jnp.int32(self.row), jnp.int32(ref.shape[0])),)
        return [self._load(ref.at[(*group, pl.ds(start, self.plan.span))]) for start in self._starts()]

    def load(self, ref: Any) -> list[jax.Array]:
        """The chunks of this block's rows of a (rows, n) reference."""
        if isinstance(ref, launch_arguments.StridedRows):
            return [
                ref.load(self._first_row(), start, self.layout, shape=self.shape, one_row=self.one_row)
                for start in self._starts()
            ]
        return [self._load(ref.at[self.row, pl.ds(start, self.plan.span)]) for start in self._starts()]

    def load_stage(self, ref: Any) -> list[jax.Array]:
        """The chunks of one row that was copied to shared memory, of which a CTA of a cluster has its own only."""
        return [
            layouts.load_flat(ref, start, self.layout, shape=self.shape, interpret=self.interpret)
            for start in self._stage_starts()
        ]

    def zeros(self) -> list[jax.Array]:
        return [self._cast(jnp.zeros(self.shape, F32)) for _ in range(self.plan.chunks)]

    def store(self, ref: Any, chunks: Sequence[jax.Array]) -> None:
        """The inverse of load."""
        for start, chunk in zip(self._starts(), chunks, strict=True):
            if isinstance(ref, launch_arguments.StridedRows):
                ref.store(self._first_row(), start, chunk, self.layout, one_row=self.one_row)
                continue
            layouts.store(ref.at[self.row, pl.ds(start, self.plan.span)], chunk, interpret=self.interpret)

    def widened(self, chunk: jax.Array) -> jax.Array:
        """A chunk as float32."""
        return conversions.widened(chunk, self.layout, vec=self.plan.vec, interpret=self.interpret)

    def narrowed(self, chunk: jax.Array, dtype: Any) -> jax.Array:
        """A float32 chunk rounded to `dtype`."""
        return conversions.narrowed(chunk, dtype, interpret=self.interpret)

    def rounded(self, chunk: jax.Array, dtype: Any) -> jax.Array:
        """The same as float32."""
        return conversions.rounded(chunk, dtype, self.layout, interpret=self.interpret)

    def product(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a * b in float32, rounded before anything is added. a: a chunk; b: one too, or one value."""
        return ieee.product(a, b, self.layout, interpret=self.interpret)

    def inverse_root(self, total: jax.Array, eps: float) -> jax.Array:
        """rstd of the sum of a row's squares."""
        return ieee.inverse_root(total, self.plan.n, eps, self._per_row_layout(), interpret=self.interpret)

    def begin_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        """First half of the sum over each row, in plan.order; in it the warps that share a row meet."""
        raise NotImplementedError

    def end_sum(self, begun: jax.Array) -> jax.Array:
        """Second half: waits for other CTAs, where they have parts of the row."""
        return begun

    def row_max(self, magnitudes: jax.Array, exchange: Any) -> jax.Array:
        """The largest of each row of a chunk of magnitudes, NaN where one is; `exchange` is one of its own, where
        workers share a row.

        As integers, which have the order of magnitudes, NaN above all: in an interpreter a maximum loses NaN, and on a
        GPU a warp's is one instruction.
        """
        largest = self._row_max(lax.bitcast_convert_type(magnitudes, jnp.int32), exchange)
        return lax.bitcast_convert_type(largest, F32)

    def _row_max(self, bits: jax.Array, exchange: Any) -> jax.Array:
        del exchange
        return jnp.max(bits)

    def broadcast(self, per_row: jax.Array) -> jax.Array:
        """Per-row values in the shape of a chunk; a scalar broadcasts by itself."""
        return per_row

    def filled(self, per_row: jax.Array) -> jax.Array:
        """As broadcast, a scalar too."""
        return self._cast(lax.broadcast_in_dim(per_row, self.shape, tuple(range(per_row.ndim))))

    def load_rows(self, ref: Any) -> jax.Array:
        """Per-row values of a (rows,) reference, in the form that the sum has."""
        return ref[self.row]

    def store_rows(self, ref: Any, per_row: jax.Array) -> None:
        """The inverse of load_rows."""
        ref[self.row] = per_row

    def store_groups(self, ref: Any, chunks: Sequence[jax.Array], group: int) -> None:
        """To a (rows, n // group) reference, the value that each group of neighbouring elements has in common."""
        for start, chunk in zip(self._starts(), chunks, strict=True):
            rows = self.row if self.interpret else self._first_row()
            groups.store(
                ref, rows, start, chunk, self.layout, group, self.plan, one_row=self.one_row, interpret=self.interpret
            )

    def store_columns(self, ref: Any, chunks: Sequence[jax.Array], reduction: ColumnReduction | None) -> None:
        """Per-column values to a (n,) reference: the chunks, where they have several rows added up."""
        del reduction
        for start, chunk in zip(self._starts(), chunks, strict=True):
            layouts.store(ref.at[pl.ds(start, self.plan.span)], chunk, interpret=self.interpret)

    # What the classes below give: the shape and layout of a chunk, and where the chunks of this worker start.

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _layout(self, vec: int) -> Any:
        raise NotImplementedError

    @property
    def layout(self) -> Any:
        return self._layout(self.plan.vec)

    @property
    def row_layout(self) -> Any:
        """Of per-row values."""
        return layouts.scalar()

    @property
    def one_row(self) -> bool:
        return True

    def _first_row(self) -> Any:
        return self.row

    def _offsets(self) -> list[Any]:
        """Where in a block of columns each part of this worker begins."""
        return [0]

    def _starts(self) -> list[Any]:
        """Where each chunk begins: the parts of a block one after the other; the last block ends at n."""
        plan = self.plan
        blocks = (min(block * plan.width, plan.n - plan.width) for block in range(plan.blocks))
        return [block + offset for block in blocks for offset in self._offsets()]

    def _stage_starts(self) -> list[Any]:
        return self._starts()

    def _load(self, ref: Any) -> jax.Array:
        return layouts.load(ref, self.layout, shape=self.shape, interpret=self.interpret)

    def _cast(self, value: jax.Array) -> jax.Array:
        return layouts.layout_cast(value, self.layout, interpret=self.interpret)

    def _position(self) -> jax.Array:
        """Where in the chunk each element is."""
        return self._cast(lax.broadcasted_iota(jnp.int32, self.shape, len(self.shape) - 1))

    def _columns(self, chunks: Sequence[jax.Array]) -> list[jax.Array]:
        """The elements of each column added up, from the first block to the last, for each part of this worker; those
        that the last block repeats left out."""
        parts = [chunks[part :: self.plan.parts] for part in range(self.plan.parts)]
        return [self._column(of_part, offset) for of_part, offset in zip(parts, self._offsets(), strict=True)]

    def _column(self, chunks: Sequence[jax.Array], offset: Any) -> jax.Array:
        *rest, last = chunks
        if self.plan.overlap:
            # The zero that changes no sum, not even one of -0.0.
            last = jnp.where(self._position() >= self.plan.overlap - offset, last, -0.0)
        return functools.reduce(jnp.add, [*rest, last])

    def _lanes(self, columns: jax.Array) -> jax.Array:
        """Neighbouring columns added up: those of a lane, or in the interpreter, which has no lanes, all of them."""
        if self.interpret:
            return neighbours_added(columns)
        *rows, width = self.shape
        lanes = (*rows, width // self.plan.vec)
        return ieee.lanes_added(columns, self.layout, self._layout(1), lanes=lanes)

    def _per_row_layout(self) -> Any:
        """Of per-row values that are no scalar."""
        return None
