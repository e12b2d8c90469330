"""Calls with results of 8 bits that were prepared, as those of `prepared`: allocate, put addresses in order, launch."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch

from pallas_norm.kernels.launch_arguments import COUNT
from pallas_norm.kernels.quantized import misfit
from pallas_norm.plans.fitting import Misfit

from . import _options, _torch_state, launch, rows
from ._kernels import Quantized, program_of

Tensor = torch.Tensor
Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # q, scales, s, y

_current_device = _torch_state.current_device
_stream = _torch_state.stream


class QuantizedCall:
    """q, and on request scales, s and y; of operands of the kernel's dtypes on its device."""

    FORM = "results of 8 bits"

    def __init__(self, kernel: Quantized, device: int) -> None:
        gpu = launch.gpu_of(device)
        program = program_of(kernel, gpu)
        assert program.plan is not None
        if (reason := misfit(program.plan, gpu, program.q_dtype, kernel.group)) is not None:
            raise Misfit(reason)
        self.kernel, self.device, self.plan = kernel, device, program.plan
        self._run = launch.kernel(program, device)
        self._to = _options.dtypes(kernel.spec, kernel.x, kernel.residual, kernel.weight)

    def __call__(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, scale: Tensor | None) -> Results:
        kernel, plan = self.kernel, self.plan
        operands = [rows.ready(operand) for operand in (x, residual, weight, scale) if operand is not None]
        count, shape, device = x.numel() // kernel.n, x.shape, x.device
        q = torch.empty(shape, dtype=kernel.q, device=device)
        scales = s = y = None
        if kernel.group:
            groups = (*shape[:-1], kernel.n // kernel.group)
            scales = torch.empty(groups, dtype=torch.float32, device=device)
        if residual is not None:
            s = torch.empty(shape, dtype=self._to.s, device=device)
        if kernel.with_y:
            y = torch.empty(shape, dtype=self._to.y, device=device)
        blocks, left = divmod(count, plan.block)
        full = blocks if plan.programs is None else min(blocks, plan.programs)
        at = [operand.data_ptr() for operand in operands]
        at += (blocks * COUNT, full * COUNT, 0)
        at += (result.data_ptr() for result in (q, scales, s, y) if result is not None)
        if count:
            grid = (full + left) * plan.cluster
            run = self._run.launch if self.device == _current_device() else self._run.elsewhere
            run(_stream(self.device), grid, at)
        return q, scales, s, y
