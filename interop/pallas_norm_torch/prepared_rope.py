"""Calls with rotated heads that were prepared, as those of `prepared`: allocate, put addresses in order, launch."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch

from . import _options, _torch_state, launch, rows
from ._kernels import Rope, program_of
from .launch import arguments

Tensor = torch.Tensor

_current_device = _torch_state.current_device
_stream = _torch_state.stream


class RopeCall:
    """q and k, normalised and rotated; of operands of the kernel's dtypes on its device."""

    FORM = "rotated heads"

    def __init__(self, kernel: Rope, device: int) -> None:
        program = program_of(kernel, launch.gpu_of(device))
        assert program.plan is not None
        self._program = program
        self.kernel, self.device, self.plan = kernel, device, program.plan
        self._run = launch.kernel(program, device)
        self._to = _options.dtypes(kernel.spec, kernel.q, None, kernel.weight)

    def __call__(
        self, pair: tuple[Tensor, Tensor], cos: Tensor, sin: Tensor, weights: tuple[Tensor | None, Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        results = tuple(torch.empty(x.shape, dtype=self._to.y, device=x.device) for x in pair)
        # Copies, which are kept until the launch.
        read = [x if rows.heads_of(x, vec=self.plan.vec) is not None else rows.ready(x) for x in pair]
        others = [rows.ready(one) for one in (cos, sin, *weights) if one is not None]
        positions = cos.numel() // self.kernel.n
        if all(x.numel() for x in pair):
            grid, at = arguments.of_heads(self._program, read, others, results, positions)
            run = self._run.launch if self.device == _current_device() else self._run.elsewhere
            run(_stream(self.device), grid, at)
        return results[0], results[1]
