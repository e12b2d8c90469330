"""The schedule for few rows of a prepared call: a kernel of its own with the same bits, compiled at the first of
these."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from pallas_norm.plans import few_rows
from pallas_norm.plans.plan import Plan

from . import launch
from ._kernels import Forward, program_of
from .launch import Kernel

NO_ROWS = -1

# Kernel, full blocks, CTAs or clusters of these, rows left over, CTAs of each.
Schedule = tuple[Kernel, int, int, int, int]


class FewRows:
    """most: rows that it is for; NO_ROWS where a kernel has one schedule. Its blocks are of one row."""

    def __init__(self, kernel: Forward, device: int, plan: Plan, itemsize: int) -> None:
        found = few_rows.of(plan, itemsize, launch.gpu_of(device))
        self.most, self._cluster = (NO_ROWS, 1) if found is None else (found[0], found[1].cluster)
        self._kernel, self._device = kernel._replace(few=True), device
        self._run: Kernel | None = None

    def instead_of(self, many: Schedule, rows: int) -> Schedule:
        """Of so few rows, where the plan for many has the one given.

        That one too while a CUDA graph is captured that comes before the first such call: nothing can be compiled then,
        and it has the same bits. Raises launch.Unavailable.
        """
        if self._run is None:
            if launch.captures(self._device):
                return many
            self._run = launch.kernel(program_of(self._kernel, launch.gpu_of(self._device)), self._device)
        return self._run, rows, rows, 0, self._cluster
