"""What a kernel is called with: addresses and numbers, in the order of the program's operands and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pallas_norm.kernels import grid as grids
from pallas_norm.kernels import rope as heads
from pallas_norm.plans.plan import Plan

from .. import rows
from ..programs import NOMINAL_ROWS, Program

Tensor = torch.Tensor


def counts(plan: Plan, count: int) -> dict[str, int]:
    """The numbers of a launch on `count` rows."""
    return dict(zip(grids.COUNTS, grids.counts_of(plan, count), strict=True))


def strides(places: rows.Places, arrays: Mapping[str, Tensor | None]) -> dict[str, int]:
    """The numbers of a launch on rows that lie at strides: `places` of what was given, and of the fresh results."""
    numbers = {"group": places.group}
    for name in ("x", "residual", "gate", "y", "s"):
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


def nominal_grid(program: Program) -> int | None:
    """CTAs of the launch in the lowered program; of a sum, whose grid depends on n alone, None."""
    if program.plan is None:
        return None
    if program.kind == "rope":  # so many rows of q, and as many of k
        return heads.programs_of((NOMINAL_ROWS, NOMINAL_ROWS), program.plan)
    return grid(program.plan, NOMINAL_ROWS)


def of_heads(
    program: Program, pair: Sequence[Tensor], given: Sequence[Tensor], results: Sequence[Tensor], positions: int
) -> tuple[int, list[int]]:
    """(CTAs, values) of a kernel that rotates heads: q and k, which it can read as they lie; `given` are its
    other arrays, contiguous and aligned."""
    plan = program.plan
    assert plan is not None
    numbers, starts, counts = {"positions": positions}, list[int](), list[int]()
    for name, x in zip(heads.PAIR, pair, strict=True):
        found = rows.heads_of(x, vec=plan.vec)
        assert found is not None
        counts.append(found.tokens * found.heads)
        starts.append(x.data_ptr() - found.offset * x.element_size())
        numbers |= {f"{name}_last": counts[-1] - 1, f"{name}_heads": found.heads, f"{name}_offset": found.offset}
        numbers |= {f"{name}_outer": found.outer, f"{name}_inner": found.inner}
    numbers["q_blocks"] = -(-counts[0] // plan.block)
    inputs = [*starts, *(one.data_ptr() for one in given)]
    outputs = [one.data_ptr() for one in results]
    assert not any(value % rows.ALIGNMENT for value in (*inputs, *outputs))
    in_order = (numbers[name] * unit for name, unit in program.numbers.items())
    return heads.programs_of((counts[0], counts[1]), plan), [*inputs, *in_order, *outputs]
