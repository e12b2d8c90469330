"""Tensors on the device with the bits that calls of them must give, which the host has computed.

y is the host's replay of the rounding from the kernel's own rstd, within its bound; dx and dweight are of operands
whose sums are exact, and their zeros have the signs of a first call. That call is here for each kernel, so that no
later one compiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from pallas_norm_torch import _library, add_rms_norm, rms_norm
from tests import oracle
from tests.gpu_proof import operands
from tests.gpu_proof.every_launch import DEVICE, RAW, array, require_launch, tensor
from tests.gpu_proof.kernels import Backward, Forward

HEADS, OTHER_HEADS = 4, 2  # of a fused projection, whose heads are rows at strides

# (n, dtype, most rows): a row in a warp; odd vectors; one warpgroup; several; a cluster. Few elements, so that a launch
# takes longer than its kernel.
SHAPES = (
    (128, "bf16", 512),
    (1000, "f16", 64),
    (896, "f32", 64),
    (2048, "bf16", 48),
    (4096, "bf16", 32),
    (4097, "bf16", 20),
    (16384, "bf16", 12),
    (32767, "bf16", 8),
)
SMALL = ((64, "bf16", 4), (33, "f16", 4))  # a rehearsal on a CPU, where every new shape compiles


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(RAW[values.element_size()][1])


def _backward(g: dict[str, Any], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, rstd, dy = (g[name][:rows] for name in ("x", "rstd", "dy"))
    dx, dweight = _library.backward(x, g["weight"], rstd, dy, None, operands.SPEC, with_dweight=True)
    assert dweight is not None
    return dx, dweight


@dataclasses.dataclass(frozen=True)
class Case:
    """Of one row length and dtype. Row r of each tensor depends on row r of the others alone."""

    n: int
    rows: int
    weight: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    residual: torch.Tensor
    s: torch.Tensor
    y_of_s: torch.Tensor
    heads: torch.Tensor  # x as (tokens, HEADS, n) inside a fused projection
    gradient: dict[str, Any]  # x, weight, rstd, dy, dx, and a dweight for each number of rows

    @classmethod
    def of(cls, n: int, dtype: str, rows: int) -> Case:
        form = Forward(n, dtype, residual=True)
        given = operands.forward(form, rows)
        x, residual, weight = (tensor(given[name]) for name in ("x", "residual", "weight"))
        require_launch(x)
        with torch.no_grad():
            results = []
            for with_residual in (None, residual):
                y, s, rstd = _library.forward(x, with_residual, weight, operands.SPEC, with_rstd=True)
                case = dataclasses.replace(form, residual=s is not None)
                found = {"y": array(y), "s": None if s is None else array(s)}
                operands.check_forward(case, given, found, array(rstd), by_torch=not x.is_cuda)
                results += [y, s]
            y, _, y_of_s, s = results
            heads = cls._fused(x)
            gradient = cls._gradient(n, dtype, rows)
            made = cls(n, rows, weight, x, y, residual, s, y_of_s, heads, gradient)
            made.first_calls()
        return made

    @staticmethod
    def _fused(x: torch.Tensor) -> torch.Tensor:
        tokens = len(x) // HEADS
        fused = torch.zeros(tokens, HEADS + OTHER_HEADS, x.shape[-1], dtype=x.dtype, device=x.device)
        heads = fused[:, 1 : 1 + HEADS]
        return heads.copy_(x[: tokens * HEADS].view(tokens, HEADS, -1))

    @staticmethod
    def _gradient(n: int, dtype: str, rows: int) -> dict[str, Any]:
        given, dx, terms = operands.backward(Backward(n, dtype, dtype, residual=False), rows)
        sums = np.cumsum(terms, axis=0).astype(given["weight"].dtype)
        g: dict[str, Any] = {name: tensor(value) for name, value in given.items()}
        found = [_backward(g, count) for count in range(1, rows + 1)]
        g |= {"dx": found[-1][0], "dweight": torch.stack([dweight for _, dweight in found])}
        operands.assert_equal(array(g["dx"]), dx)
        operands.assert_equal(array(g["dweight"]), sums)
        return g

    def backward(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _backward(self.gradient, rows)

    def first_calls(self) -> None:
        """Of what a thread will call, compared on the host."""
        y, s = add_rms_norm(self.x, self.residual, self.weight, operands.EPS)
        found = [(rms_norm(self.x, self.weight, operands.EPS), self.y), (y, self.y_of_s), (s, self.s)]
        strided = rms_norm(self.heads, self.weight, operands.EPS)
        found.append((strided.view(-1, self.n), self.y[: strided.numel() // self.n]))
        for actual, expected in found:
            oracle.assert_same(array(actual), array(expected))


def every_case() -> list[Case]:
    return [Case.of(*shape) for shape in (SHAPES if DEVICE == "cuda" else SMALL)]
