"""Rows on their way to shared memory, several ahead of the one that is being worked on, by the bulk-copy engine."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import _compat
from ._plan import Plan, Regime, staged_view


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """plan.stages rows of each operand in shared memory, or a CTA's parts of them. Step i of this program works on row
    row_of(i)."""

    sources: Mapping[str, Any]  # GMEM (rows, *staged_view)
    buffers: dict[str, Any]  # SMEM (stages, *staged_view without the axis of the cluster)
    arrived: Any  # a barrier for each stage
    plan: Plan
    row_of: Callable[[Any], Any]
    steps: jax.Array

    def start(self) -> None:
        for step in range(self.plan.stages):
            self._copy(step, step < self.steps)

    def stage(self, step: jax.Array) -> dict[str, Any]:
        """The references of this step's row."""
        stage = lax.rem(step, jnp.int32(self.plan.stages))
        return {name: buffer.at[stage] for name, buffer in self.buffers.items()}

    def wait(self, step: jax.Array) -> dict[str, Any]:
        """As `stage`, once the row is there."""
        _compat.wait(self.arrived.at[lax.rem(step, jnp.int32(self.plan.stages))])
        return self.stage(step)

    def refill(self, step: jax.Array) -> None:
        """Overwrites the stage of step - 1. To be called when all warps have met after they read it for the last
        time."""
        following = step - 1 + self.plan.stages
        self._copy(following, (step > 0) & (following < self.steps))

    def each_row(
        self,
        begin: Callable[[jax.Array, dict[str, Any], Any], tuple[Any, Any]],
        end: Callable[[jax.Array, Any], Any],
        finish: Callable[[jax.Array, dict[str, Any], Any], None],
        carry: Any,
    ) -> Any:
        """sums, carry = begin(step, stage, carry), in which all warps meet; sums = end(step, sums), for which they wait
        for other CTAs; finish(step, stage, sums).

        With plan.ahead, begin(step + 1) comes before finish(step): what the CTAs of a cluster tell each other is on its
        way meanwhile. It comes behind end(step): a barrier of a cluster allows no second arrival before the wait.
        """

        def alone(step: jax.Array, carry: Any) -> Any:
            stage = self.wait(step)
            begun, carry = begin(step, stage, carry)
            self.refill(step)
            finish(step, stage, end(step, begun))
            return carry

        def overlapped(step: jax.Array, begun_and_carry: Any) -> Any:
            begun, carry = begun_and_carry
            sums = end(step, begun)
            following, carry = begin(step + 1, self.wait(step + 1), carry)
            self.refill(step)
            finish(step, self.stage(step), sums)
            return following, carry

        if not self.plan.ahead:
            return lax.fori_loop(0, self.steps, alone, carry)
        first, last = jnp.int32(0), self.steps - 1
        begun, carry = lax.fori_loop(0, last, overlapped, begin(first, self.wait(first), carry))
        finish(last, self.stage(last), end(last, begun))
        return carry

    def _copy(self, step: Any, condition: jax.Array) -> None:
        if self.plan.warpgroups > 1:
            condition = condition & (lax.axis_index("warpgroup") == 0)

        @pl.when(condition)
        def _() -> None:
            stages, row = self.plan.stages, self.row_of(step)
            stage = lax.rem(step, jnp.int32(stages)) if isinstance(step, jax.Array) else step % stages
            part: tuple[Any, ...] = (row,)
            if self.plan.regime is Regime.WARP:
                part = (pl.ds(row * self.plan.block, self.plan.block),)
            elif self.plan.cluster > 1:
                part = (row, slice(None), lax.axis_index("cluster"))
            for name, source in self.sources.items():
                _compat.copy_to_smem(source.at[part], self.buffers[name].at[stage], self.arrived.at[stage])


def staged(
    plan: Plan, operands: Mapping[str, jax.Array], names: Sequence[str]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """What a kernel needs for a Pipeline of `names`: these operands, seen as staged_view says, and shared memory."""
    view = staged_view(plan, operands["x"].dtype.itemsize)
    assert view is not None
    stage = view if plan.cluster == 1 else (view[0], *view[2:])
    stage = (plan.block, *stage) if plan.regime is Regime.WARP else stage
    views = {name: operands[name].reshape(len(operands[name]), *view) for name in names}
    buffers = {f"{name}_stages": _compat.smem((plan.stages, *stage), operands[name].dtype) for name in names}
    return views, buffers | {"arrived": _compat.barrier(len(names), plan.stages)}
