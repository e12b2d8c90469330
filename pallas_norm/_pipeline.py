"""Rows on their way to shared memory, several ahead of the one that is being worked on, by the bulk-copy engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import _compat


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """`stages` rows of each operand in shared memory. Step i of this program works on row row_of(i)."""

    sources: dict[str, Any]  # GMEM (rows, *tile)
    buffers: dict[str, Any]  # SMEM (stages, *tile)
    arrived: Any  # a barrier for each stage
    stages: int
    several_warpgroups: bool
    row_of: Callable[[Any], Any]
    steps: jax.Array

    def start(self) -> None:
        for step in range(self.stages):
            self._copy(step, step < self.steps)

    def wait(self, step: jax.Array) -> dict[str, Any]:
        """The references of this step's row, once it is there."""
        stage = lax.rem(step, jnp.int32(self.stages))
        _compat.wait(self.arrived.at[stage])
        return {name: buffer.at[stage] for name, buffer in self.buffers.items()}

    def refill(self, step: jax.Array) -> None:
        """Overwrites the stage of step - 1. To be called when all warps have met in `step`, so none still reads that
        stage."""
        following = step - 1 + self.stages
        self._copy(following, (step > 0) & (following < self.steps))

    def _copy(self, step: Any, condition: jax.Array) -> None:
        if self.several_warpgroups:
            condition = condition & (lax.axis_index("warpgroup") == 0)

        @pl.when(condition)
        def _() -> None:
            stage = lax.rem(step, jnp.int32(self.stages)) if isinstance(step, jax.Array) else step % self.stages
            for name, source in self.sources.items():
                _compat.copy_to_smem(source.at[self.row_of(step)], self.buffers[name].at[stage], self.arrived.at[stage])
