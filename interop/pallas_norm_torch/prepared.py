"""Calls that were prepared: one for each kernel and device, which knows all that does not change between calls.

A call is then: allocate the results, put addresses and counts in order, launch. Every way in takes it: plain tensors,
`out=`, the residual form, rows at strides, under autograd and its backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pallas_norm.kernels.launch_arguments import COUNT
from pallas_norm.plans.plan import from_memory, may_be_in_place

from . import _options, _torch_state, _validate, launch, rows
from ._kernels import Backward, Forward, program_of
from ._overlap import in_place
from .prepared_few import FewRows
from .prepared_gradient import BackwardCall, backward_call
from .rows import ALIGNMENT

Tensor = torch.Tensor
Results = tuple[Tensor, Tensor | None, Tensor | None]  # y, s, rstd

MOST_LAYOUTS = 1024  # kept for each call
NO_LIMIT = 1 << 62  # of the blocks that have a CTA each

# Looked up once: each name saves 0.05 us of a call.
_empty, _empty_like = torch.empty, torch.empty_like
_current_device = _torch_state.current_device
_stream = _torch_state.stream


class ForwardCall:
    """y, with a residual also s, with_rstd also rstd; of operands of the kernel's dtypes on its device."""

    def __init__(self, kernel: Forward, device: int) -> None:
        program = program_of(kernel, launch.gpu_of(device))
        assert program.plan is not None
        self.kernel, self.device, self.n, self.plan = kernel, device, kernel.n, program.plan
        self.to = _options.dtypes(kernel.spec, kernel.x, kernel.residual, kernel.weight)
        # None where it is that of x, and torch.empty_like(x) makes it.
        self.y_dtype = None if self.to.y == kernel.x else self.to.y
        self.s_dtype = None if self.to.s == kernel.x else self.to.s
        self._run = launch.kernel(program, device)
        self._few = FewRows(kernel, device, self.plan, self.to.s.itemsize)
        self._few_blocks = self._few.most // self.plan.block  # full ones of the plan for many
        self._block_elements = self.plan.block * self.n
        self._most, self._cluster = program.plan.programs or NO_LIMIT, program.plan.cluster
        self._layouts: dict[Any, Any] = {}  # by shape, strides and offsets, the numbers; None: to be copied
        self._at_strides: Any = None
        self._rstd = torch.empty(0)  # of the shape of the last call's: what rstd is made like
        self._training: ForwardCall | None = self if kernel.with_rstd else None
        self._gradients: dict[tuple[torch.dtype, bool, bool], BackwardCall] = {}

    def training(self) -> ForwardCall:
        """The same with rstd."""
        if self._training is None:
            self._training = forward_call(self.kernel._replace(with_rstd=True), self.device)
        return self._training

    def gradient(self, dy: torch.dtype, *, with_ds: bool, with_dweight: bool) -> BackwardCall:
        """The backward pass of these operands."""
        key = dy, with_ds, with_dweight
        if (found := self._gradients.get(key)) is None:
            n, x, weight, spec, residual, *_ = self.kernel
            dx, dresidual = None if x == self.to.s else x, None if residual in (None, x) else residual
            options = with_ds, with_dweight and weight is not None, dx, dresidual
            kernel = Backward(n, self.to.s, weight, dy, spec, *options)
            found = self._gradients[key] = backward_call(kernel, self.device)
        return found

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        """y of the commonest call, flat: what is unusual goes the longer way."""
        x_at, weight_at = x.data_ptr(), weight.data_ptr()
        blocks, left = divmod(x.numel(), self._block_elements)
        # An address is 0 for autograd's zero tensors, which have no memory.
        if (x_at | weight_at) % ALIGNMENT or left or not (x_at and x.is_contiguous() and weight.is_contiguous()):
            return self._less_plain(x, weight, x_at, weight_at)
        y = _empty_like(x) if self.y_dtype is None else _empty_like(x, dtype=self.y_dtype)
        run, full, cluster = self._run, blocks if blocks < self._most else self._most, self._cluster
        if blocks <= self._few_blocks:
            many = run, blocks, full, 0, cluster
            run, blocks, full, _, cluster = self._few.instead_of(many, blocks * self.plan.block)
        values = x_at, weight_at, blocks * COUNT, full * COUNT, 0, y.data_ptr()
        if self.device == _current_device():
            run.launch(_stream(self.device), full * cluster, values)
        else:
            run.elsewhere(_stream(self.device), full * cluster, values)
        return y

    def _less_plain(self, x: Tensor, weight: Tensor, x_at: int, weight_at: int) -> Tensor:
        """y of rows at strides that a call has seen before, in one step; else through the longer way."""
        if x.is_contiguous() or weight_at % ALIGNMENT or not (x_at and weight_at and weight.is_contiguous()):
            return self(x, None, weight)[0]
        numbers = self._layouts.get((x.shape, x.stride(), x_at % ALIGNMENT))
        if numbers is None or self._at_strides is None:
            return self(x, None, weight)[0]
        y = _empty_like(x, dtype=self.y_dtype, memory_format=torch.contiguous_format)
        blocks, left = divmod(x.numel() // self.n, self.plan.block)
        values = x_at - x_at % ALIGNMENT, weight_at, blocks * COUNT, blocks * COUNT, 0, *numbers, y.data_ptr()
        self._launch(self._at_strides, (blocks + left) * self._cluster, values)
        return y

    def added(self, x: Tensor, residual: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """(y, s), as `plain`, of a call with a residual."""
        x_at, residual_at, weight_at = x.data_ptr(), residual.data_ptr(), 0 if weight is None else weight.data_ptr()
        blocks, left = divmod(x.numel(), self._block_elements)
        if (
            (x_at | residual_at | weight_at) % ALIGNMENT
            or left
            or weight is None
            or not (x_at and residual_at and weight_at)
            or not (x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous())
        ):
            y, s, _ = self(x, residual, weight)
            assert s is not None
            return y, s
        y = _empty_like(x) if self.y_dtype is None else _empty_like(x, dtype=self.y_dtype)
        s = _empty_like(x) if self.s_dtype is None else _empty_like(x, dtype=self.s_dtype)
        run, full, cluster = self._run, blocks if blocks < self._most else self._most, self._cluster
        if blocks <= self._few_blocks:
            many = run, blocks, full, 0, cluster
            run, blocks, full, _, cluster = self._few.instead_of(many, blocks * self.plan.block)
        values = x_at, residual_at, weight_at, blocks * COUNT, full * COUNT, 0, y.data_ptr(), s.data_ptr()
        if self.device == _current_device():
            run.launch(_stream(self.device), full * cluster, values)
        else:
            run.elsewhere(_stream(self.device), full * cluster, values)
        return y, s

    def trained(self, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """(y, rstd), as `plain`, of a call with rstd."""
        x_at, weight_at = x.data_ptr(), 0 if weight is None else weight.data_ptr()
        count = x.numel() // self.n
        if (
            (x_at | weight_at) % ALIGNMENT
            or count % self.plan.block
            or weight is None
            or not (weight_at and x_at and x.is_contiguous() and weight.is_contiguous())
        ):
            y, _, rstd = self(x, None, weight)
            assert rstd is not None
            return y, rstd
        # Of the shape that every other way gives it: checkpointing compares what a forward pass and its rerun save.
        like, shape = self._rstd, x.shape[:-1]  # `like` is of this thread from here on
        if like.shape != shape:
            self._rstd = like = x.new_empty(shape, dtype=torch.float32)
        y = _empty_like(x) if self.y_dtype is None else _empty_like(x, dtype=self.y_dtype)
        rstd = _empty_like(like)  # 1 us less than by its shape, dtype and device
        blocks, run, cluster = count // self.plan.block, self._run, self._cluster
        full = blocks if blocks < self._most else self._most
        if count <= self._few.most:
            run, blocks, full, _, cluster = self._few.instead_of((run, blocks, full, 0, cluster), count)
        values = x_at, weight_at, blocks * COUNT, full * COUNT, 0, y.data_ptr(), rstd.data_ptr()
        if self.device == _current_device():
            run.launch(_stream(self.device), full * cluster, values)
        else:
            run.elsewhere(_stream(self.device), full * cluster, values)
        return y, rstd

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        out: Tensor | None = None,
        s_out: Tensor | None = None,
    ) -> Results:
        """`out` receives y and `s_out` s: each an operand itself, or memory that none shares."""
        at = [x.data_ptr()]
        usual = out is None and s_out is None and x.is_contiguous()
        if residual is not None:
            usual = usual and residual.is_contiguous()
            at.append(residual.data_ptr())
        if weight is not None:
            usual = usual and weight.is_contiguous()
            at.append(weight.data_ptr())
        if not usual or any(address % ALIGNMENT for address in at) or not all(at):  # 0: without memory, or rows
            return self._unusual(x, residual, weight, out, s_out)
        y = _empty_like(x) if self.y_dtype is None else _empty_like(x, dtype=self.y_dtype)
        return self._launched(x, residual, y, None, at)

    def _launched(self, x: Tensor, residual: Tensor | None, y: Tensor, s: Tensor | None, at: list[int]) -> Results:
        count = x.numel() // self.n
        blocks, left = divmod(count, self.plan.block)
        run, full, cluster = self._run, min(blocks, self._most), self._cluster
        if 0 < count <= self._few.most:
            run, blocks, full, left, cluster = self._few.instead_of((run, blocks, full, left, cluster), count)
        at += (blocks * COUNT, full * COUNT, 0, y.data_ptr())
        rstd = None
        if residual is not None:
            s = _empty_like(x, dtype=self.s_dtype) if s is None else s
            at.append(s.data_ptr())
        if self.kernel.with_rstd:
            rstd = _empty(x.shape[:-1], dtype=torch.float32, device=x.device)
            at.append(rstd.data_ptr())
        if full + left:
            self._launch(run, (full + left) * cluster, at)
        return y, s, rstd

    def _launch(self, run: Any, grid: int, values: Sequence[int]) -> None:
        if self.device == _current_device():
            run.launch(_stream(self.device), grid, values)
        else:
            run.elsewhere(_stream(self.device), grid, values)

    # --- other places -------------------------------------------------------------------------------------------------

    def _unusual(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, out: Tensor | None, s_out: Tensor | None
    ) -> Results:
        """Into `out` and `s_out`, and rows that are not one behind the other from an aligned address on."""
        if any(tensor is not None and tensor._is_zerotensor() for tensor in (x, residual, weight)):
            _validate.operands(x, residual, weight, with_residual=residual is not None)  # raises: there is no memory
        weight = None if weight is None else rows.ready(weight)
        given = [tensor for tensor in (x, residual, out, s_out) if tensor is not None]
        in_rows = all(tensor.is_contiguous() and rows.aligned(tensor) for tensor in given)
        plan, count = self.plan if in_rows else from_memory(self.plan), x.numel() // self.n
        places = [tensor for tensor in (out, s_out) if tensor is not None]
        if places and not may_be_in_place(plan, count) and in_place(places, x, residual):
            return self._elsewhere(x, residual, weight, out, s_out)
        results = (self._in_rows if in_rows else self._strided)(x, residual, weight, out, s_out)
        for tensor in places:
            torch.autograd.graph.increment_version(tensor)  # what autograd may have saved of it has changed
        return results

    def _elsewhere(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, out: Tensor | None, s_out: Tensor | None
    ) -> Results:
        """Into memory of their own first, where rows are read after they were written."""
        y, s, rstd = self(x, residual, weight)
        y = y if out is None else out.copy_(y)
        return y, s if s is None or s_out is None else s_out.copy_(s), rstd

    def _in_rows(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, out: Tensor | None, s_out: Tensor | None
    ) -> Results:
        at = [tensor.data_ptr() for tensor in (x, residual, weight) if tensor is not None]
        y = torch.empty_like(x, dtype=self.y_dtype) if out is None else out
        return self._launched(x, residual, y, s_out, at)

    def _strided(
        self, x: Tensor, residual: Tensor | None, weight: Tensor | None, out: Tensor | None, s_out: Tensor | None
    ) -> Results:
        """Rows are read, and those of `out` and `s_out` written, where they lie; copied where a kernel cannot."""
        x_at = x.data_ptr()
        key: Any = x.shape, x.stride(), x_at % ALIGNMENT
        if residual is not None or out is not None:
            others = [tensor for tensor in (residual, out, s_out) if tensor is not None]
            key = (*key, *((t.stride(), t.data_ptr() % ALIGNMENT) for t in others), out is None, s_out is None)
        numbers = self._layouts.get(key, self)
        if numbers is self:
            numbers = self._layout(key, {"x": x, "residual": residual, "y": out, "s": s_out})
        if numbers is None:
            if any(place is not None and not (place.is_contiguous() and rows.aligned(place)) for place in (out, s_out)):
                return self._elsewhere(x, residual, weight, out, s_out)
            return self(rows.ready(x), None if residual is None else rows.ready(residual), weight, out, s_out)
        if self._at_strides is None:
            strided = program_of(self.kernel._replace(strided=True), launch.gpu_of(self.device))
            self._at_strides = launch.kernel(strided, self.device)
        y = _empty(x.shape, dtype=self.to.y, device=x.device) if out is None else out
        y_at, s, rstd, count = y.data_ptr(), None, None, x.numel() // self.n
        at = [x_at - x_at % ALIGNMENT]
        if residual is not None:
            at.append(residual.data_ptr() // ALIGNMENT * ALIGNMENT)
        if weight is not None:
            at.append(weight.data_ptr())
        blocks, left = divmod(count, self.plan.block)  # rows that no bulk copy brings have no persistent grid
        at += (blocks * COUNT, blocks * COUNT, 0, *numbers, y_at - y_at % ALIGNMENT)
        if residual is not None:
            s = _empty(x.shape, dtype=self.to.s, device=x.device) if s_out is None else s_out
            at.append(s.data_ptr() // ALIGNMENT * ALIGNMENT)
        if self.kernel.with_rstd:
            rstd = _empty(x.shape[:-1], dtype=torch.float32, device=x.device)
            at.append(rstd.data_ptr())
        if count:
            self._launch(self._at_strides, (blocks + left) * self._cluster, at)
        return y, s, rstd

    def _layout(self, key: Any, given: dict[str, Tensor | None]) -> tuple[int, ...] | None:
        """The group and strides, as the kernel takes them, of what is given and of fresh results; kept."""
        if len(self._layouts) >= MOST_LAYOUTS:
            self._layouts.clear()
        made = {"y": self.to.y} | ({} if self.kernel.residual is None else {"s": self.to.s})
        tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
        numbers = self._layouts[key] = rows.numbers(tensors, made, n=self.n, vec=self.plan.vec)
        return numbers


_forward: dict[tuple[Forward, int], ForwardCall] = {}


def forward_call(kernel: Forward, device: int) -> ForwardCall:
    """The one for each, compiled at the first. Raises launch.Unavailable, and Misfit."""
    if (found := _forward.get((kernel, device))) is not None:
        return found
    return _forward.setdefault((kernel, device), ForwardCall(kernel, device))
