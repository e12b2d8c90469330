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


class FewRows:
    """most: rows that it is for; NO_ROWS where a kernel has one schedule."""

    def __init__(self, kernel: Forward, device: int, plan: Plan, itemsize: int) -> None:
        found = few_rows.of(plan, itemsize, launch.gpu_of(device))
        self.most, self.cluster = (NO_ROWS, 1) if found is None else (found[0], found[1].cluster)
        self._kernel, self._device = kernel._replace(few=True), device
        self._run: Kernel | None = None

    def instead_of(self, run: Kernel, full: int, cluster: int, rows: int) -> tuple[Kernel, int, int]:
        """(kernel, CTAs or clusters, CTAs of a cluster) of so few rows, where many have the ones given.

        These ones too while a CUDA graph is captured that comes before the first such call: nothing can be compiled
        then, and they have the same bits. Raises launch.Unavailable.
        """
        if self._run is None:
            if launch.captures(self._device):
                return run, full, cluster
            self._run = launch.kernel(program_of(self._kernel, launch.gpu_of(self._device)), self._device)
        return self._run, rows, self.cluster
