"""Rows that never leave a warp: their sums are shuffles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import layouts, mosaic
from .block import Block, ColumnReduction


@dataclasses.dataclass(frozen=True)
class WarpRows(Block):
    """plan.block rows in one warpgroup, each in plan.lanes lanes of one warp."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.plan.block, self.plan.span

    def _layout(self, vec: int) -> Any:
        return layouts.rows_in_warps(self.plan.lanes, vec)

    def _per_row_layout(self) -> Any:
        return self.layout.reduce(1)

    @property
    def row_layout(self) -> Any:
        return self.layout.reduce(1)

    @property
    def one_row(self) -> bool:
        return False

    def _first_row(self) -> Any:
        return self.row.start

    def columns(self, ref: Any) -> list[jax.Array]:
        def broadcast(start: int) -> jax.Array:
            column = layouts.load(
                ref.at[pl.ds(start, self.plan.span)],
                self.layout.reduce(0),
                shape=(self.plan.span,),
                interpret=self.interpret,
            )
            return self._cast(lax.broadcast_in_dim(column, self.shape, (1,)))

        return [broadcast(start) for start in self._starts()]

    def load_stage(self, ref: Any) -> list[jax.Array]:
        def load(start: int) -> jax.Array:
            return layouts.load_columns(ref, start, self.layout, shape=self.shape, interpret=self.interpret)

        return [load(start) for start in self._starts()]

    def begin_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        (columns,) = self._columns(chunks)
        return jnp.sum(self._lanes(columns), axis=1)

    def _row_max(self, bits: jax.Array, exchange: Any) -> jax.Array:
        del exchange
        return jnp.max(bits, axis=1)

    def broadcast(self, per_row: jax.Array) -> jax.Array:
        return self._cast(lax.broadcast_in_dim(per_row, self.shape, (0,)))

    def load_rows(self, ref: Any) -> jax.Array:
        return layouts.load(
            ref.at[self.row], self._per_row_layout(), shape=(self.plan.block,), interpret=self.interpret
        )

    def store_rows(self, ref: Any, per_row: jax.Array) -> None:
        layouts.store(ref.at[self.row], per_row, interpret=self.interpret)

    def store_columns(self, ref: Any, chunks: Sequence[jax.Array], reduction: ColumnReduction | None) -> None:
        assert reduction is not None
        one_row = OneRow(self.plan, None, self.interpret)
        for start, chunk in zip(self._starts(), chunks, strict=True):
            mosaic.arrive_and_wait(reduction.barrier)  # all have read the chunk before
            layouts.store(reduction.rows, chunk, interpret=self.interpret)
            mosaic.arrive_and_wait(reduction.barrier)
            rows = [one_row._load(reduction.rows.at[row]) for row in range(self.plan.block)]
            layouts.store(
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

    def _layout(self, vec: int) -> Any:
        return layouts.row_in_every_warp(self.plan.lanes, vec)

    def begin_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        (columns,) = self._columns(chunks)
        return jnp.sum(self._lanes(columns))
