"""What a kernel is called with: addresses and numbers, in the order of the program's operands and results."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pallas_norm.kernels import grid as grids
from pallas_norm.plans.plan import Plan

from .. import rows
from ..programs import Program

Tensor = torch.Tensor


def counts(plan: Plan, count: int) -> dict[str, int]:
    """The numbers of a launch on `count` rows."""
    return dict(zip(grids.COUNTS, grids.counts_of(plan, count), strict=True))


def strides(places: rows.Places, arrays: Mapping[str, Tensor | None]) -> dict[str, int]:
    """The numbers of a launch on rows that lie at strides: `places` of what was given, and of the fresh results."""
    numbers = {"group": places.group}
    for name in ("x", "residual", "y", "s"):
        if (tensor := arrays.get(name)) is not None:
            offset, outer, inner = places.of.get(name) or rows.fresh(
                tensor.shape[-1] * tensor.element_size(), places.group
            )
            numbers |= {f"{name}_offset": offset, f"{name}_outer": outer, f"{name}_inner": inner}
    return numbers


def values(program: Program, arrays: Mapping[str, Tensor | None], numbers: Mapping[str, int]) -> list[int]:
    """Of `Program.inputs`, then of its outputs."""

    def address(name: str) -> int:
        tensor = arrays[name]
        assert tensor is not None
        return tensor.data_ptr() - numbers.get(f"{name}_offset", 0)

    inputs = [address(name) for name, _ in program.dtypes]
    outputs = [address(name) for name in program.outputs]
    assert not any(value % rows.ALIGNMENT for value in (*inputs, *outputs))
    return [*inputs, *(numbers[name] * unit for name, unit in program.numbers.items()), *outputs]


def grid(plan: Plan, count: int) -> int:
    """CTAs for `count` rows."""
    return grids.counts_of(plan, count)[2] * plan.cluster
