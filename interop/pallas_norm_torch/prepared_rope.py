"""Calls with rotated heads that were prepared, as those of `prepared`: allocate, put addresses in order, launch."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch

from pallas_norm.kernels import rope_backward
from pallas_norm.kernels.dweight_sum import TILE
from pallas_norm.kernels.launch_arguments import COUNT
from pallas_norm.plans.plan import BackwardPlan

from . import _options, _torch_state, launch, rows
from ._kernels import ColumnSum, Rope, RopeBackward, program_of
from .launch import arguments
from .prepared_gradient import unwritten

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
        read = [_readable(x, self.plan.vec) for x in pair]
        others = [rows.ready(one) for one in (cos, sin, *weights) if one is not None]
        positions = cos.numel() // self.kernel.n
        if all(x.numel() for x in pair):
            grid, at = arguments.of_heads(self._program, read, others, results, positions)
            run = self._run.launch if self.device == _current_device() else self._run.elsewhere
            run(_stream(self.device), grid, at)
        return results[0], results[1]


class RopeBackwardCall:
    """dq, dk and with weights their dweights; of q and k that have rows, and of what the kernel has dtypes for."""

    FORM = "gradients of rotated heads"

    def __init__(self, kernel: RopeBackward, device: int) -> None:
        gpu = launch.gpu_of(device)
        program = program_of(kernel, gpu)
        assert isinstance(program.plan, BackwardPlan)
        self._program, self._plan = program, program.plan
        self.kernel, self.device = kernel, device
        self._run, self._sum = launch.kernel(program, device), None
        if kernel.weight is not None:
            self._sum = launch.kernel(program_of(ColumnSum(kernel.n, kernel.weight), gpu), device)

    def __call__(
        self,
        pair: tuple[Tensor, Tensor],
        cos: Tensor,
        sin: Tensor,
        weights: tuple[Tensor | None, Tensor | None],
        gradients: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        n, vec = self.kernel.n, self._plan.vec
        # Copies, which are kept until the launches.
        read, dr = ([_readable(x, vec) for x in both] for both in (pair, gradients))
        angles = [rows.ready(one) for one in (cos, sin)]
        of_weights = [rows.ready(one) for one in weights if one is not None]
        dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in pair)
        used = rope_backward.programs_of((dq.numel() // n, dk.numel() // n), self._plan)
        # The sums read whole tiles, and leave out what no CTA wrote.
        parts = [] if self._sum is None else [unwritten(dq, max(count, TILE), n) for count in used]
        grid, at = arguments.of_gradients(self._program, read, angles, dr, of_weights, [dq, dk, *parts], used)
        elsewhere, stream = self.device != _current_device(), _stream(self.device)
        (self._run.elsewhere if elsewhere else self._run.launch)(stream, grid, at)
        if self._sum is None:
            return dq, dk, None, None
        dweights = [torch.empty_like(weight) for weight in of_weights]
        run_sum = self._sum.elsewhere if elsewhere else self._sum.launch
        for part, count, dweight in zip(parts, used, dweights, strict=True):
            run_sum(stream, self._sum.recorded.grid, [part.data_ptr(), count * COUNT, dweight.data_ptr()])
        return dq, dk, dweights[0], dweights[1]


def _readable(x: Tensor, vec: int) -> Tensor:
    """Where it lies, or else a copy."""
    return x if rows.heads_of(x, vec=vec) is not None else rows.ready(x)
