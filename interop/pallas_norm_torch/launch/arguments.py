"""What a kernel is called with: addresses and numbers, in the order of the program's operands and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from pallas_norm.kernels import grid as grids
from pallas_norm.kernels import rope as heads
from pallas_norm.kernels import rope_backward as heads_backward
from pallas_norm.plans.plan import BackwardPlan, Plan

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
    if program.kind == "rope_backward":
        assert isinstance(program.plan, BackwardPlan)
        return sum(heads_backward.programs_of((NOMINAL_ROWS, NOMINAL_ROWS), program.plan))
    return grid(program.plan, NOMINAL_ROWS)


def of_heads(
    program: Program, pair: Sequence[Tensor], given: Sequence[Tensor], results: Sequence[Tensor], positions: int
) -> tuple[int, list[int]]:
    """(CTAs, values) of a kernel that rotates heads: q and k, which it can read as they lie; `given` are its
    other arrays, contiguous and aligned."""
    plan = program.plan
    assert plan is not None
    starts, numbers, counts = _of_pair(pair, plan)
    numbers |= {"positions": positions, "q_blocks": heads.blocks_of(counts[0], plan)}
    return heads.programs_of(counts, plan), _in_order(program, [*starts, *_addresses(given)], numbers, results)


def of_gradients(
    program: Program,
    pair: Sequence[Tensor],
    angles: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    results: Sequence[Tensor],
    programs: tuple[int, int],
) -> tuple[int, list[int]]:
    """As of_heads, of the kernel of their gradients, which lie as they like too, with so many programs for q and k."""
    plan = program.plan
    assert isinstance(plan, BackwardPlan)
    starts, numbers, _ = _of_pair(pair, plan)
    dr_starts, of_dr, _ = _of_pair(gradients, plan)
    numbers |= {f"{name}_dr_{stride}": of_dr[f"{name}_{stride}"] for name in heads.PAIR for stride in heads.STRIDES}
    numbers |= {"positions": angles[0].numel() // program.n, "q_programs": programs[0], "k_programs": programs[1]}
    inputs = [*starts, *_addresses(angles), *dr_starts, *_addresses(weights)]
    return sum(programs), _in_order(program, inputs, numbers, results)


def _of_pair(pair: Sequence[Tensor], plan: Plan) -> tuple[list[int], dict[str, int], tuple[int, int]]:
    """(addresses, numbers, rows) of two tensors of heads, which can be read as they lie."""
    starts, numbers, counts = list[int](), dict[str, int](), list[int]()
    for name, x in zip(heads.PAIR, pair, strict=True):
        found = rows.heads_of(x, vec=plan.vec)
        assert found is not None
        counts.append(found.tokens * found.heads)
        starts.append(x.data_ptr() - found.offset * x.element_size())
        own = counts[-1] - 1, found.heads, found.offset, found.outer, found.inner
        numbers |= {f"{name}_{number}": value for number, value in zip(heads.OF_EACH, own, strict=True)}
    return starts, numbers, (counts[0], counts[1])


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [one.data_ptr() for one in tensors]


def _in_order(
    program: Program, inputs: Sequence[int], numbers: Mapping[str, int], results: Sequence[Tensor]
) -> list[int]:
    outputs = _addresses(results)
    assert not any(value % rows.ALIGNMENT for value in (*inputs, *outputs))
    return [*inputs, *(numbers[name] * unit for name, unit in program.numbers.items()), *outputs]
