"""Calls of gated norms that were prepared, as those of `prepared`: allocate, put addresses in order, launch.

Each group of a row is a row of the kernel, which `n` is the length of.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import torch

from pallas_norm.kernels.dweight_sum import TILE
from pallas_norm.kernels.launch_arguments import BYTES, COUNT

from . import _form_calls, _options, _torch_state, launch, rows
from ._kernels import ColumnSum, Gated, GatedBackward, program_of
from .prepared_gradient import Grid, unwritten

Tensor = torch.Tensor

_current_device = _torch_state.current_device
_stream = _torch_state.stream


class GatedCall:
    """y, on request rstd; of operands of the kernel's dtypes on its device. A gate that is a part of a projection, as
    Mamba2's is, is read where it lies."""

    FORM = "gated norms"

    def __init__(self, kernel: Gated, device: int) -> None:
        program = program_of(kernel, launch.gpu_of(device))
        assert program.plan is not None
        self.kernel, self.device, self._vec = kernel, device, program.plan.vec
        self._run, self._grid = launch.kernel(program, device), Grid(program.plan)
        self._y = _options.dtypes(kernel.spec, kernel.x, None, kernel.weight).y
        self._at_strides: GatedCall | None = None

    def __call__(self, x: Tensor, gate: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight = None if weight is None else rows.ready(weight)
        if not all(tensor.is_contiguous() and rows.aligned(tensor) for tensor in (x, gate)):
            given = {"x": x, "gate": gate}
            groups = {name: torch.unflatten(value, -1, (-1, self.kernel.form.group)) for name, value in given.items()}
            if (places := rows.strided(groups, vec=self._vec)) is not None:
                return self._strided()._launched(x, gate, weight, places)
            x, gate = rows.ready(x), rows.ready(gate)
        return self._launched(x, gate, weight, None)

    def _strided(self) -> GatedCall:
        made = self._at_strides
        if made is None:
            made = _form_calls.call_of(GatedCall, self.kernel._replace(strided=True), self.device)
            self._at_strides = made
        return made

    def _launched(
        self, x: Tensor, gate: Tensor, weight: Tensor | None, places: rows.Places | None
    ) -> tuple[Tensor, Tensor | None]:
        kernel, count = self.kernel, x.numel() // self.kernel.form.group
        y = torch.empty(x.shape, dtype=self._y, device=x.device)
        rstd = None
        if kernel.with_rstd:
            groups = x.shape[-1] // kernel.form.group
            rstd = torch.empty((*x.shape[:-1], groups), dtype=torch.float32, device=x.device)
        blocks, first_left, grid = self._grid.of(count)
        at, numbers = [x.data_ptr(), gate.data_ptr()], [blocks, first_left, 0]
        if places is not None:
            of = [places.of["x"], places.of["gate"], rows.fresh(kernel.form.group * y.element_size(), places.group)]
            at = [address - strides.offset for address, strides in zip(at, of[:2], strict=True)]
            numbers += [places.group * COUNT, *(number * BYTES for strides in of for number in strides)]
        at += [] if weight is None else [weight.data_ptr()]
        at += (*numbers, *(result.data_ptr() for result in (y, rstd) if result is not None))
        if count:
            run = self._run.launch if self.device == _current_device() else self._run.elsewhere
            run(_stream(self.device), grid, at)
        return y, rstd


class GatedBackwardCall:
    """dx and dgate, on request dweight."""

    FORM = "gradients of gated norms"

    def __init__(self, kernel: GatedBackward, device: int) -> None:
        gpu = launch.gpu_of(device)
        program = program_of(kernel, gpu)
        assert program.plan is not None
        self.kernel, self.device, self._plan = kernel, device, program.plan
        self._run, self._grid = launch.kernel(program, device), Grid(program.plan)
        self._sum = None
        if kernel.with_dweight:
            assert kernel.weight is not None
            self._sum = launch.kernel(program_of(ColumnSum(kernel.n, kernel.weight), gpu), device)

    def __call__(
        self, x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        kernel, count = self.kernel, x.numel() // self.kernel.form.group
        operands = [rows.ready(operand) for operand in (x, gate, rstd, dy, weight) if operand is not None]
        dx, dgate = (torch.empty(x.shape, dtype=kernel.x, device=x.device) for _ in range(2))
        dweight = torch.zeros_like(weight) if self._sum is not None and weight is not None else None
        if not count:
            return dx, dgate, dweight
        blocks, first_left, grid = self._grid.of(count)
        at = [operand.data_ptr() for operand in operands]
        at += (blocks, first_left, 0, dx.data_ptr(), dgate.data_ptr())
        elsewhere, stream = self.device != _current_device(), _stream(self.device)
        if self._sum is None or dweight is None:
            (self._run.elsewhere if elsewhere else self._run.launch)(stream, grid, at)
            return dx, dgate, None
        # The sum reads whole tiles, and leaves out what no CTA wrote. A row of it has the parts of all groups.
        groups, used = kernel.n // kernel.form.group, grid // self._plan.cluster
        parts = unwritten(x, max(used // groups, TILE), kernel.n)
        at.append(parts.data_ptr())
        (self._run.elsewhere if elsewhere else self._run.launch)(stream, grid, at)
        numbers = [parts.data_ptr(), used // groups * COUNT, dweight.data_ptr()]
        run_sum = self._sum.elsewhere if elsewhere else self._sum.launch
        run_sum(stream, self._sum.recorded.grid, numbers)
        return dx, dgate, dweight
