"""Kernels for CPU tensors: called with addresses, as the real ones are, and computed from the memory there.

So everything between a public function and the launch runs where there is no GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm.kernels.launch_arguments import BYTES, COUNT
from pallas_norm.plans.hardware import H200
from pallas_norm.plans.plan import BackwardPlan
from pallas_norm_torch import (
    _form_calls,
    _library,
    _lookup,
    _options,
    _out,
    direct,
    gated_statements,
    launch,
    prepared,
    prepared_gated,
    prepared_gradient,
    prepared_quantized,
    prepared_rope,
    quantized_statements,
    rope_statements,
    rows,
    statements,
)
from pallas_norm_torch.launch.recording import Parameter, Recorded
from pallas_norm_torch.programs import Program

Tensor = torch.Tensor
ALIGNMENT = 64  # of torch's allocations on a CPU
GRID_OF_SUM = 7
FORWARD = Program("forward", 4096, (("x", "bfloat16"), ("weight", "bfloat16")), ("y",), Spec())


def at(address: int, dtype: torch.dtype, elements: int) -> Tensor:
    """The memory there."""
    assert address, "no memory"
    memory = (ctypes.c_char * (elements * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


def program_n(program: Program) -> int:
    """Of all weights that rows have in turn."""
    return program.n * program.groups


class FakeKernel:
    """As launch.Kernel, of that program."""

    def __init__(self, program: Program, *, device: int = -1, off: float = 0.0) -> None:
        self.program, self.device, self.off = program, device, off
        self.name = f"the {program.kind} kernel for n = {program.n}"
        self.recorded = Recorded(0, GRID_OF_SUM, 128, 0, 1, (Parameter(0, 0),))
        self.launches: list[tuple[int, int, dict[str, int]]] = []

    def elsewhere(self, stream: int, grid: int, values: Sequence[int]) -> None:
        self.launch(stream, grid, values)

    def launch(self, stream: int, grid: int, values: Sequence[int]) -> None:
        program = self.program
        named = dict(zip((*program.inputs, *program.outputs), values, strict=True))
        self.launches.append((stream, grid, named))
        run = {"forward": self._forward, "quantized": self._quantized, "backward": self._backward}
        run |= {
            "rope": self._rope,
            "rope_backward": self._rope_backward,
            "gated": self._gated,
            "gated_backward": self._gated_backward,
        }
        run.get(program.kind, self._sum)(grid, named)

    def _rows(self, grid: int, named: dict[str, int]) -> int:
        plan = self.program.plan
        assert plan is not None
        blocks, full = named["blocks"] // COUNT, named["first_left"] // COUNT
        assert full == (blocks if plan.programs is None else min(blocks, plan.programs))
        return blocks * plan.block + (grid // plan.cluster - full)

    def _seen(self, name: str, dtype: torch.dtype, count: int, named: dict[str, int]) -> Tensor:
        n = self.program.n
        if name in ("weight", "rstd", "scale"):
            return at(named[name], dtype, {"weight": program_n(self.program), "rstd": count, "scale": 1}[name])
        if name == "scales":
            groups = n // self.program.group
            return at(named[name], dtype, count * groups).view(count, groups)
        if f"{name}_outer" not in named:
            return at(named[name], dtype, count * n).view(count, n)
        group = named["group"] // COUNT
        offset, outer, inner = (named[f"{name}_{level}"] // BYTES for level in ("offset", "outer", "inner"))
        starts = [offset + row // group * outer + row % group * inner for row in range(count)]
        whole = at(named[name], dtype, max(starts) // dtype.itemsize + n)
        return whole, starts  # pyright: ignore[reportReturnType]

    def _read(self, name: str, dtype: str, count: int, named: dict[str, int]) -> Tensor:
        seen: Any = self._seen(name, getattr(torch, dtype), count, named)
        if isinstance(seen, Tensor):
            return seen.clone()
        whole, starts = seen
        return torch.stack([whole[start // whole.itemsize :][: self.program.n] for start in starts])

    def _write(self, name: str, value: Tensor, count: int, named: dict[str, int]) -> None:
        seen: Any = self._seen(name, value.dtype, count, named)
        if isinstance(seen, Tensor):
            seen.copy_(value)
            return
        whole, starts = seen
        for start, row in zip(starts, value, strict=True):
            whole[start // whole.itemsize :][: self.program.n] = row

    def _forward(self, grid: int, named: dict[str, int]) -> None:
        count = self._rows(grid, named)
        given = {name: self._read(name, dtype, count, named) for name, dtype in self.program.dtypes}
        x, residual, weight = given["x"], given.get("residual"), given.get("weight")
        y, s, rstd = statements.forward(x, residual, weight, self.program.spec, with_rstd=True)
        results = {"y": y + self.off if self.off else y, "s": s, "rstd": rstd}  # -0.0 + 0.0 is 0.0
        for name in self.program.outputs:
            value = results[name]
            assert value is not None
            self._write(name, value, count, named)

    def _quantized(self, grid: int, named: dict[str, int]) -> None:
        program, count = self.program, self._rows(grid, named)
        given = {name: self._read(name, dtype, count, named) for name, dtype in program.dtypes}
        dtype = getattr(torch, program.q_dtype)
        operands = given["x"], given.get("residual"), given.get("weight"), given.get("scale")
        q, scales, s, y = quantized_statements.forward(*operands, program.spec, dtype, program.group)
        results = {"q": q.view(torch.int8) + int(self.off), "scales": scales, "s": s, "y": y}
        for name in program.outputs:
            value = results[name]
            assert value is not None
            self._write(name, value, count, named)

    def _of_gated(self, grid: int, named: dict[str, int]) -> tuple[int, dict[str, Tensor], Any]:
        """(rows of the kernel, operands as whole rows, the form)."""
        program, count = self.program, self._rows(grid, named)
        assert program.form is not None
        given = {name: self._read(name, dtype, count, named) for name, dtype in program.dtypes}
        assert not count % program.groups
        whole = {name: value.reshape(count // program.groups, -1) for name, value in given.items() if name != "weight"}
        return count, whole | {name: value for name, value in given.items() if name == "weight"}, program.form

    def _gated(self, grid: int, named: dict[str, int]) -> None:
        count, given, form = self._of_gated(grid, named)
        y, rstd = gated_statements.forward(given["x"], given["gate"], given.get("weight"), self.program.spec, form)
        results = {"y": y + self.off if self.off else y, "rstd": rstd}
        for name in self.program.outputs:
            self._write(name, results[name].reshape(count, -1).squeeze(-1 if name == "rstd" else 1), count, named)

    def _gated_backward(self, grid: int, named: dict[str, int]) -> None:
        program, plan = self.program, self.program.plan
        assert plan is not None
        count, given, form = self._of_gated(grid, named)
        operands = given["x"], given["gate"], given.get("weight"), given["rstd"], given["dy"], program.spec, form
        dx, dgate, _ = gated_statements.backward(*operands, with_dweight=False)
        for name, value in (("dx", dx), ("dgate", dgate)):
            self._write(name, (value + self.off if self.off else value).reshape(count, -1), count, named)
        if "dweight" in program.outputs:
            used = grid // plan.cluster
            parts = at(named["dweight"], torch.float32, used * program.n).view(used, -1)
            parts.zero_()
            for row, terms in enumerate(gated_statements.dweight_terms(*operands).reshape(count, -1)):
                parts[row % used] += terms

    def _rope(self, grid: int, named: dict[str, int]) -> None:
        program, plan, n = self.program, self.program.plan, self.program.n
        assert plan is not None
        numbers = {name: named[name] // COUNT for name in program.numbers}
        dtypes = {name: getattr(torch, dtype) for name, dtype in program.dtypes}
        positions, blocks = numbers["positions"], [-(-(numbers[f"{name}_last"] + 1) // plan.block) for name in "qk"]
        assert (blocks[0], sum(blocks)) == (numbers["q_blocks"], grid)
        cos, sin = (at(named[name], dtypes[name], positions * n).view(positions, n) for name in ("cos", "sin"))
        for name in "qk":
            x, tokens = self._heads(name, named, numbers, "")
            weight = at(named[f"{name}_weight"], dtypes["q_weight"], n) if "q_weight" in dtypes else None
            y, _, _ = statements.forward(x, None, weight, program.spec, with_rstd=False)
            rotated = rope_statements.rotated(y[:, None], cos[tokens % positions], sin[tokens % positions])[:, 0]
            out = at(named[f"{name}_out"], y.dtype, y.numel()).view(y.shape)
            out.copy_(rotated + self.off if self.off else rotated)

    def _heads(self, name: str, named: dict[str, int], numbers: dict[str, int], of: str) -> tuple[Tensor, Tensor]:
        """Rows of q or k, or of their gradients, and the token of each."""
        n, dtypes = self.program.n, dict(self.program.dtypes)
        last, heads = numbers[f"{name}_last"], numbers[f"{name}_heads"]
        offset, outer, inner = (numbers[f"{name}_{of}{what}"] for what in ("offset", "outer", "inner"))
        tensor = f"d{name}_out" if of else name
        tokens = torch.arange(last + 1) // heads
        starts = offset + tokens * outer + torch.arange(last + 1) % heads * inner
        whole = at(named[tensor], getattr(torch, dtypes[tensor]), int(starts.max()) + n)
        return torch.stack([whole[start : start + n] for start in starts.tolist()]), tokens

    def _rope_backward(self, grid: int, named: dict[str, int]) -> None:
        program, plan, n = self.program, self.program.plan, self.program.n
        assert isinstance(plan, BackwardPlan)
        numbers = {name: named[name] // COUNT for name in program.numbers}
        dtypes = {name: getattr(torch, dtype) for name, dtype in program.dtypes}
        programs, positions = {name: numbers[f"{name}_programs"] for name in "qk"}, numbers["positions"]
        assert sum(programs.values()) == grid <= plan.programs
        cos, sin = (at(named[name], dtypes[name], positions * n).view(positions, n) for name in ("cos", "sin"))
        for name in "qk":
            (x, tokens), (dr, _) = self._heads(name, named, numbers, ""), self._heads(name, named, numbers, "dr_")
            assert programs[name] <= -(-len(x) // plan.block)
            weight = at(named[f"{name}_weight"], dtypes["q_weight"], n) if "q_weight" in dtypes else None
            _, _, rstd = statements.forward(x, None, weight, program.spec, with_rstd=True)
            turned = cos[tokens % positions], sin[tokens % positions]
            dy = rope_statements.rotated_back(dr[:, None], *turned)[:, 0]
            assert rstd is not None
            dx, _ = statements.backward(x, weight, rstd, dy, None, program.spec, with_dweight=False)
            at(named[f"d{name}"], x.dtype, x.numel()).view(x.shape).copy_(dx + self.off if self.off else dx)
            if weight is not None:
                unit = (x.float() * rstd[:, None]).to(_options.dtypes(program.spec, x.dtype).unit).float()
                parts = at(named[f"{name}_dweight"], torch.float32, programs[name] * n).view(-1, n)
                parts.zero_()
                for row, product in enumerate(dy.float() * unit):
                    parts[row // plan.block % programs[name]] += product

    def _backward(self, grid: int, named: dict[str, int]) -> None:
        count, plan = self._rows(grid, named), self.program.plan
        assert isinstance(plan, BackwardPlan)
        given = {name: self._read(name, dtype, count, named) for name, dtype in self.program.dtypes}
        x, weight, dy = given["x"], given.get("weight"), given["dy"]
        dx, _ = statements.backward(
            x, weight, given["rstd"], dy, given.get("ds"), self.program.spec, with_dweight=False
        )
        for name in ("dx", "dresidual"):
            if name in named:
                value = dx + self.off if self.off else dx
                self._write(name, value.to(getattr(torch, self.program.result_dtype(name))), count, named)
        if "dweight" in self.program.outputs:
            unit = x.float() * given["rstd"][:, None]
            unit = unit.to(_options.dtypes(self.program.spec, x.dtype).unit).float()
            used = grid // plan.cluster
            parts = at(named["dweight"], torch.float32, used * self.program.n).view(used, -1)
            parts.zero_()
            for row, product in enumerate(dy.float() * unit):
                parts[row % used] += product

    def _sum(self, grid: int, named: dict[str, int]) -> None:
        count, n = named["rows"] // COUNT, self.program.n
        assert grid == GRID_OF_SUM
        total = at(named["parts"], torch.float32, count * n).view(count, n).sum(0)
        at(named["dweight"], getattr(torch, self.program.dweight_dtype), n).copy_(total)


def expected(x: Tensor, weight: Tensor | None, residual: Tensor | None = None) -> Any:
    """y and s, which a fake kernel computes."""
    return statements.forward(x, residual, weight, Spec(), with_rstd=False)[:2]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[Program, FakeKernel]:
    """CPU tensors take the direct launch inside, with fake kernels, which are kept here by program."""
    kernels: dict[Program, FakeKernel] = {}
    calls: dict[Any, Any] = {}

    def kernel(program: Program, device: int) -> FakeKernel:
        return kernels.setdefault(program, FakeKernel(program, device=device))

    monkeypatch.setattr(launch, "kernel", kernel)
    monkeypatch.setattr(launch, "captures", lambda device: False)
    monkeypatch.setattr(launch, "gpu_of", lambda device: H200)
    monkeypatch.setattr(_library, "path", lambda x, n=None: direct)
    for module in (prepared, prepared_gradient, rows, _out):
        monkeypatch.setattr(module, "ALIGNMENT", ALIGNMENT)
    monkeypatch.setattr(prepared, "_forward", {})
    for module in (prepared_gradient, _form_calls):
        monkeypatch.setattr(module, "_calls", {})
    monkeypatch.setattr(_form_calls, "_refused", {})
    for module, name in ((_lookup, "_prepared"), (direct, "calls")):
        monkeypatch.setattr(module, name, calls)
    monkeypatch.setattr(direct, "_refused", {})
    for module in (prepared, prepared_gradient, prepared_quantized, prepared_gated, prepared_rope):
        monkeypatch.setattr(module, "_stream", lambda device: 99)
    return kernels
