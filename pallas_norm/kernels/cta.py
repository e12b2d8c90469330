"""A row that the warps of a CTA share, or of several warpgroups, or of a cluster of CTAs: how their sums meet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..plans.hardware import WARPS
from . import layouts, mosaic
from .block import Block


@dataclasses.dataclass(frozen=True)
class WarpgroupRow(Block):
    """One row in the four warps of one warpgroup; the sum crosses warps through Mosaic's own scratch."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.plan.span,)

    @property
    def layout(self) -> Any:
        return layouts.row_across_warps(self.plan.vec, split=False)

    def begin_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
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
        return layouts.row_across_warps(self.plan.vec, split=True)

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

    def _stage_starts(self) -> list[jax.Array]:
        if self.plan.cluster == 1:
            return self._starts()
        return [(j * self.plan.warpgroups + self._warpgroup()) * self.plan.span for j in range(self.plan.chunks)]

    def _repeated(self) -> jax.Array:
        nominal = ((self.plan.chunks - 1) * self.plan.workers + self._worker()) * self.plan.span
        return jnp.maximum(nominal - (self.plan.n - self.plan.span), 0)

    def _position(self) -> jax.Array:
        sub_row, column = (self._cast(lax.broadcasted_iota(jnp.int32, self.shape, axis)) for axis in (0, 1))
        return sub_row * self.shape[1] + column

    def begin_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        partials, slot = self.exchange.partials, self.slot
        partials[slot, self._warpgroup()] = jnp.sum(self._added_up(chunks), axis=1)
        mosaic.arrive_and_wait(self.exchange.barrier)
        of_warps = [partials[slot, g, w] for g in range(self.plan.warpgroups) for w in range(WARPS)]
        total = functools.reduce(jnp.add, of_warps)
        if self.plan.cluster > 1:
            self.exchange.total[slot] = total
            mosaic.cluster_arrive()
        return total

    def end_sum(self, begun: jax.Array) -> jax.Array:
        if self.plan.cluster == 1:
            return begun
        mosaic.cluster_wait()
        ctas = range(self.plan.cluster)
        return functools.reduce(
            jnp.add, (mosaic.from_cta(self.exchange.total, "cluster", cta)[self.slot] for cta in ctas)
        )

    def store_rows(self, ref: Any, per_row: jax.Array) -> None:
        @pl.when(self._worker() == 0)
        def _() -> None:
            ref[self.row] = per_row
