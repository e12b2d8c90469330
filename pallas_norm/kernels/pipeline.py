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

from ..plans.plan import Plan, Regime, Source, staged_view
from . import mosaic
from .grid import CtaBlocks


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """plan.stages rows of each operand in shared memory, or a CTA's parts of them. Step i of this CTA works on block
    block_of(i)."""

    sources: Mapping[str, Any]  # GMEM (rows, *staged_view)
    buffers: dict[str, Any]  # SMEM (stages, *staged_view without the axis of the cluster)
    arrived: Any  # a barrier for each stage
    read: Any  # a barrier at which warps that share no sum meet; None where they share one
    plan: Plan
    block_of: Callable[[Any], Any]
    steps: jax.Array

    @staticmethod
    def of(plan: Plan, sources: Mapping[str, Any], scratch: Mapping[str, Any], blocks: CtaBlocks) -> Pipeline:
        buffers = {name: scratch[f"{name}_stages"] for name in sources}
        return Pipeline(sources, buffers, scratch["arrived"], scratch.get("read"), plan, blocks.at, blocks.steps)

    def start(self) -> None:
        for step in range(self.plan.stages):
            self._copy(step, step < self.steps)

    def wait(self, step: jax.Array) -> dict[str, Any]:
        """The references of this step's stage, once the rows are there."""
        mosaic.wait(self.arrived.at[lax.rem(step, jnp.int32(self.plan.stages))])
        stage = lax.rem(step, jnp.int32(self.plan.stages))
        return {name: buffer.at[stage] for name, buffer in self.buffers.items()}

    def refill(self, step: jax.Array) -> None:
        """Overwrites the stage that is read no more: of this step where rows are kept, else of the one before. To be
        called when all warps have met after they read it for the last time."""
        read = step if self.plan.rows_in_registers else step - 1
        following = read + self.plan.stages
        self._copy(following, (read >= 0) & (following < self.steps))

    def _copy(self, step: Any, condition: jax.Array) -> None:
        if self.plan.warpgroups > 1:
            condition = condition & (lax.axis_index("warpgroup") == 0)

        @pl.when(condition)
        def _() -> None:
            stages, block = self.plan.stages, self.block_of(step)
            stage = lax.rem(step, jnp.int32(stages)) if isinstance(step, jax.Array) else step % stages
            part: tuple[Any, ...] = (block,)
            if self.plan.regime is Regime.WARP:
                part = (pl.ds(block * self.plan.block, self.plan.block),)
            elif self.plan.cluster > 1:
                part = (block, slice(None), lax.axis_index("cluster"))
            for name, source in self.sources.items():
                mosaic.copy_to_smem(source.at[part], self.buffers[name].at[stage], self.arrived.at[stage])


def narrowest(operands: Mapping[str, jax.Array], names: Sequence[str]) -> int:
    """Bytes of an element of those that decide which rows bulk copies can move."""
    return min(operands[name].dtype.itemsize for name in names)


def staged(
    plan: Plan, operands: Mapping[str, jax.Array], names: Sequence[str]
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """(the operands, those of `names` seen as staged_view says; the shared memory that their pipeline needs)."""
    if plan.source is not Source.PIPELINE:
        return dict(operands), {}
    view = staged_view(plan, narrowest(operands, names))
    assert view is not None
    stage = view if plan.cluster == 1 else (view[0], *view[2:])
    stage = (plan.block, *stage) if plan.regime is Regime.WARP else stage
    views = {name: operands[name].reshape(len(operands[name]), *view) for name in names}
    scratch = {f"{name}_stages": mosaic.smem((plan.stages, *stage), operands[name].dtype) for name in names}
    scratch |= {"arrived": mosaic.barrier(len(names), plan.stages)}
    if plan.regime is Regime.WARP:
        scratch["read"] = mosaic.barrier(1)
    return {**operands, **views}, scratch
