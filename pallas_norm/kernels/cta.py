"""A row that the warps of a CTA share, or of several warpgroups, or of a cluster of CTAs: how their sums meet."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from ..plans.hardware import WARPS
from ..plans.plan import Plan
from . import layouts, mosaic
from .block import Block
from .cluster import Totals

SLOTS = 2  # of an exchange: while some warps still read one row's partial sums, others already write the next row's


def slot_of(step: jax.Array) -> jax.Array:
    """Of the exchange, for the step-th row of a CTA."""
    return lax.rem(step, jnp.int32(SLOTS))


@dataclasses.dataclass(frozen=True)
class WarpgroupRow(Block):
    """One row in the four warps of one warpgroup; the sum crosses warps through Mosaic's own scratch, as pairs of
    neighbours."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.plan.span,)

    def _layout(self, vec: int) -> Any:
        return layouts.row_across_warps(vec, split=False)

    def begin_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        (columns,) = self._columns(chunks)
        return jnp.sum(self._lanes(columns))


def _neighbours_added(values: Iterable[Any]) -> Any:
    """As `_row_sum.neighbours_added`, of scalars."""
    left = list(values)
    while len(left) > 1:
        left = [a + b for a, b in zip(left[::2], left[1::2], strict=True)]
    return left[0]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Where the warps of several warpgroups, and of several CTAs, meet to add up a row."""

    partials: Any  # SMEM (SLOTS, warpgroups * parts, WARPS)
    barrier: Any
    totals: Totals | None  # of the CTAs of a cluster

    @staticmethod
    def scratch(plan: Plan, dtype: Any, parts: int, prefix: str = "") -> dict[str, Any]:
        """By name, what an exchange of such values needs, `parts` of each warp; nothing where no workers share a
        row."""
        if plan.workers == 1:
            return {}
        needed = {"partials": mosaic.smem((SLOTS, plan.warpgroups * parts, WARPS), dtype)}
        needed |= {"barrier": mosaic.barrier(plan.warpgroups)}
        if plan.cluster > 1:
            needed |= Totals.scratch(SLOTS, plan.cluster, dtype)
        return {prefix + name: value for name, value in needed.items()}

    @staticmethod
    def opened(refs: dict[str, Any], prefix: str = "") -> Exchange | None:
        """Of the references by name, from which it takes them. In a cluster all CTAs have to meet before a row is added
        up."""
        if f"{prefix}partials" not in refs:
            return None
        partials, barrier = (refs.pop(prefix + name) for name in ("partials", "barrier"))
        if f"{prefix}values" not in refs:
            return Exchange(partials, barrier, None)
        totals = Totals(*(refs.pop(prefix + name) for name in ("values", "barriers")))
        totals.open()
        return Exchange(partials, barrier, totals)


@dataclasses.dataclass(frozen=True)
class SharedRow(Block):
    """One row in the warps of several warpgroups, in one CTA or in a cluster of CTAs.

    jnp.sum across warps is not to be used with several warpgroups: all of them would use one scratch (77 % of the
    outputs of a draft were wrong, silently). So each warp adds up its own part, publishes one partial in shared
    memory, and after one barrier every thread adds the partials in one fixed order.
    """

    exchange: Exchange
    slot: Any  # of the exchange; neighbouring rows of a CTA take different ones
    step: Any  # how many rows this CTA has had before; 0 where it has one only

    @property
    def shape(self) -> tuple[int, ...]:
        return WARPS, 32 * self.plan.vec

    def _layout(self, vec: int) -> Any:
        return layouts.row_across_warps(vec, split=True)

    def _warpgroup(self) -> jax.Array:
        return lax.axis_index("warpgroup") if self.plan.warpgroups > 1 else jnp.int32(0)

    def _worker(self) -> jax.Array:
        worker = self._warpgroup()
        if self.plan.cluster > 1:
            worker = worker + lax.axis_index("cluster") * self.plan.warpgroups
        return worker

    def _offsets(self) -> list[jax.Array]:
        first = self._worker() * self.plan.parts
        return [(first + part) * self.plan.span for part in range(self.plan.parts)]

    def _stage_starts(self) -> list[jax.Array]:
        if self.plan.cluster == 1:
            return self._starts()
        return [(j * self.plan.warpgroups + self._warpgroup()) * self.plan.span for j in range(self.plan.chunks)]

    def _position(self) -> jax.Array:
        sub_row, column = (self._cast(lax.broadcasted_iota(jnp.int32, self.shape, axis)) for axis in (0, 1))
        return sub_row * self.shape[1] + column

    def begin_sum(self, chunks: Sequence[jax.Array]) -> jax.Array:
        partials, slot, parts = self.exchange.partials, self.slot, self.plan.parts
        for part, columns in enumerate(self._columns(chunks)):
            partials[slot, self._warpgroup() * parts + part] = jnp.sum(self._lanes(columns), axis=1)
        mosaic.arrive_and_wait(self.exchange.barrier)
        total = _neighbours_added(
            partials[slot, g, w] for g in range(self.plan.warpgroups * parts) for w in range(WARPS)
        )
        if self.exchange.totals is not None:
            self._meet_first()
            self.exchange.totals.send(slot, total)
        return total

    def end_sum(self, begun: jax.Array) -> jax.Array:
        totals = self.exchange.totals
        return begun if totals is None else _neighbours_added(totals.received(self.slot, self._uses()))

    def _meet_first(self) -> None:
        """Before the first row's total goes to a CTA, it has opened its exchange."""
        if isinstance(self.step, int):
            mosaic.cluster_wait()
        else:
            pl.when(self.step == 0)(mosaic.cluster_wait)

    def _uses(self) -> Any:
        return lax.div(jnp.int32(self.step), jnp.int32(SLOTS))

    def _row_max(self, bits: jax.Array, exchange: Any) -> jax.Array:
        """As a sum, through the partials of an exchange of its own: those of the sum may still be read."""
        partials, slot = exchange.partials, self.slot
        partials[slot, self._warpgroup()] = jnp.max(bits, axis=1)
        mosaic.arrive_and_wait(exchange.barrier)
        of_warps = [partials[slot, *divmod(i, WARPS)] for i in range(self.plan.warpgroups * WARPS)]
        largest = functools.reduce(jnp.maximum, of_warps)
        if exchange.totals is None:
            return largest
        exchange.totals.send(slot, largest)
        return functools.reduce(jnp.maximum, exchange.totals.received(slot, self._uses()))

    def store_rows(self, ref: Any, per_row: jax.Array) -> None:
        @pl.when(self._worker() == 0)
        def _() -> None:
            ref[self.row] = per_row
