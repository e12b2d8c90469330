"""The prepared calls of the backward pass: the kernel, and the sum of its partial dweights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from pallas_norm.kernels.dweight_sum import TILE
from pallas_norm.kernels.launch_arguments import COUNT
from pallas_norm.plans.plan import BackwardPlan, Plan

from . import _torch_state, launch, rows
from ._kernels import Backward, ColumnSum, program_of
from .rows import ALIGNMENT

Tensor = torch.Tensor

_empty_like = torch.empty_like
_current_device = _torch_state.current_device
_stream = _torch_state.stream


class Grid:
    """How many CTAs a plan takes for so many rows, and the numbers that tell the kernel."""

    def __init__(self, plan: Plan) -> None:
        self.block, self.cluster = plan.block, plan.cluster
        self.most = (1 << 62) if plan.programs is None else plan.programs

    def of(self, count: int) -> tuple[int, int, int]:
        """(blocks and the first left-over row's CTA, as the kernel takes them; CTAs)."""
        blocks, left = divmod(count, self.block)
        full = blocks if blocks < self.most else self.most
        return blocks * COUNT, full * COUNT, (full + left) * self.cluster


class BackwardCall:
    """dx, dresidual where it has another dtype, with_dweight also dweight; of operands of the kernel's dtypes on its
    device."""

    def __init__(self, kernel: Backward, device: int) -> None:
        gpu = launch.gpu_of(device)
        program = program_of(kernel, gpu)
        assert isinstance(program.plan, BackwardPlan)
        self.kernel, self.device, self.n = kernel, device, kernel.n
        self._plan, self._run, self._grid = program.plan, launch.kernel(program, device), Grid(program.plan)
        self._sum: Any = None
        if kernel.with_dweight:
            assert kernel.weight is not None
            self._sum = launch.kernel(program_of(ColumnSum(kernel.n, kernel.weight), gpu), device)

    def __call__(
        self, x: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, ds: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        at = [x.data_ptr(), rstd.data_ptr(), dy.data_ptr()]
        low_bits = at[0] | at[1] | at[2]
        usual = x.is_contiguous() and rstd.is_contiguous() and dy.is_contiguous()
        if weight is not None:
            at.append(weight.data_ptr())
            low_bits, usual = low_bits | at[-1], usual and weight.is_contiguous()
        if ds is not None:
            at.append(ds.data_ptr())
            low_bits, usual = low_bits | at[-1], usual and ds.is_contiguous()
        if low_bits % ALIGNMENT or not usual:
            given = [rows.ready(tensor) for tensor in (x, rstd, dy, weight, ds) if tensor is not None]
            at, x = [tensor.data_ptr() for tensor in given], given[0]
        kernel, dresidual, count = self.kernel, None, x.numel() // self.n
        dx = _empty_like(x) if kernel.dx is None else _empty_like(x, dtype=kernel.dx)
        if kernel.dresidual is not None:
            dresidual = _empty_like(x, dtype=kernel.dresidual)
        if not count:
            return dx, dresidual, None if self._sum is None or weight is None else torch.zeros_like(weight)
        blocks, first_left, grid = self._grid.of(count)
        at += (blocks, first_left, 0, dx.data_ptr())
        if dresidual is not None:
            at.append(dresidual.data_ptr())
        elsewhere, stream = self.device != _current_device(), _stream(self.device)
        run, run_sum = self._run, self._sum
        if run_sum is None or weight is None:
            (run.elsewhere if elsewhere else run.launch)(stream, grid, at)
            return dx, dresidual, None
        # The sum reads whole tiles, and leaves out what no CTA wrote.
        used = grid // self._grid.cluster
        parts = unwritten(x, max(used, TILE), self.n)
        dweight = _empty_like(weight)
        at.append(parts.data_ptr())
        (run.elsewhere if elsewhere else run.launch)(stream, grid, at)
        numbers = [parts.data_ptr(), used * COUNT, dweight.data_ptr()]
        (run_sum.elsewhere if elsewhere else run_sum.launch)(stream, run_sum.recorded.grid, numbers)
        return dx, dresidual, dweight


def unwritten(x: Tensor, count: int, n: int) -> Tensor:
    """Memory for the CTAs' parts of dweight."""
    return x.new_empty((count, n), dtype=torch.float32)


_calls: dict[tuple[Backward, int], BackwardCall] = {}


def backward_call(kernel: Backward, device: int) -> BackwardCall:
    """As forward_call. rstd has eps in it, so one kernel serves every eps."""
    kernel = kernel._replace(spec=dataclasses.replace(kernel.spec, eps=0.0))
    if (found := _calls.get((kernel, device))) is not None:
        return found
    return _calls.setdefault((kernel, device), BackwardCall(kernel, device))
