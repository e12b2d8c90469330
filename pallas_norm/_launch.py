"""From a kernel body and a Plan to a launched kernel: references by name, scratch, clusters; and which rows a CTA
gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from . import _compat, _strided
from ._blocks import Block, OneRow, WarpgroupRow, WarpRows
from ._plan import WARPS, Plan, Regime, Source, from_memory, staged_view
from ._shared_row import Exchange, SharedRow

SLOTS = 2  # of the exchange: while some warps still read one row's partial sums, others already write the next row's

AnyPlan = TypeVar("AnyPlan", bound=Plan)


def launch(
    body: Callable[..., None],
    plan: Plan,
    grid: int,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    scratch: Mapping[str, Any] | None = None,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs `body(exchange, x_ref=..., y_ref=..., ...)` in `grid` programs; returns the outputs by name.

    An operand that is absent from `inputs` or `outputs` is absent from the call: the body's default for it is None.
    """
    meeting = _exchange(plan)
    scratch = scratch or {}

    def kernel(*refs: Any) -> None:
        named = dict(zip([*inputs, *outputs, *meeting, *scratch], refs, strict=True))
        exchange = Exchange(**{name: named.pop(name) for name in meeting}) if meeting else None
        own = {name: named.pop(name) for name in scratch}
        body(exchange, **{f"{name}_ref": ref for name, ref in named.items()}, **own)
        if plan.cluster > 1:  # no CTA may leave while another still reads its total
            _compat.cluster_arrive()
            _compat.cluster_wait()

    options: dict[str, Any] = {}
    if plan.warpgroups > 1:
        options |= {"num_threads": plan.warpgroups, "thread_name": "warpgroup"}
    if plan.cluster > 1:
        options |= {"cluster": (plan.cluster,), "cluster_names": ("cluster",)}
    results = _compat.kernel(
        kernel,
        interpret=interpret,
        out_type=tuple(outputs.values()),
        grid=(grid,),
        grid_names=("program",),
        scratch_types=(*meeting.values(), *scratch.values()),
        **options,
    )(*inputs.values())
    like = next(iter(inputs.values()))
    return {name: _compat.vary_like(value, like) for name, value in zip(outputs, results, strict=True)}


def _exchange(plan: Plan) -> dict[str, Any]:
    if plan.workers == 1:
        return {}
    return {
        "partials": _compat.smem((SLOTS, plan.warpgroups, WARPS), jnp.float32),
        "barrier": _compat.barrier(plan.warpgroups),
        "total": _compat.smem((SLOTS,), jnp.float32),
    }


def interpretable(plan: AnyPlan, itemsize: int) -> AnyPlan:
    """The plan for the interpreter, which knows no clusters: one CTA with up to 4 warpgroups stands in.

    A warpgroup that waits at a barrier holds a thread of XLA's CPU pool, which has one for each core or CPU device:
    more warpgroups than that may hang. jax_num_cpu_devices = 8 gives the tests theirs.
    """
    plan = dataclasses.replace(plan, warpgroups=min(plan.workers, 4), cluster=1)
    lost = plan.source is Source.PIPELINE and staged_view(plan, itemsize) is None
    return from_memory(plan) if lost else plan


def units(plan: Plan, rows: int) -> tuple[int, int]:
    """(full blocks of plan.block rows, rows left over)."""
    return divmod(rows, plan.block)


@dataclasses.dataclass(frozen=True)
class Extent:
    """What a kernel knows of its rows: numbers of the program, or of the launch (see `_strided.count`)."""

    blocks: Any  # full ones, of plan.block rows
    programs: Any  # that work on full blocks
    left: int | None  # rows left over, which have a program each behind those; None where the launch decides
    # As `programs`, from a parameter of its own. The compiler sees two conditions, not one and its inverse, and so does
    # not move the end of both branches behind the second one: that was one more line of instructions to fetch, from
    # memory, and cost 0.6 us of 10 at 65536 rows of 128.
    first_left: Any


COUNTS = ("blocks", "first_left", "programs")  # the last is the host's: it launches so many


def counts_of(plan: Plan, rows: int) -> tuple[int, int, int]:
    """The values of COUNTS."""
    blocks, left = units(plan, rows)
    programs = blocks if plan.programs is None else min(blocks, plan.programs)
    return blocks, programs, programs + left


def extent(plan: Plan, rows: int, counts: dict[str, Any], *, interpret: bool) -> Extent:
    """Of `rows` rows, or of the row count of the launch, where the kernel has the operands of COUNTS."""
    if not counts:
        blocks, programs, with_left = counts_of(plan, rows)
        return Extent(blocks, programs, with_left - programs, programs)
    blocks, first_left = (_strided.count(counts[f"{name}_ref"], interpret=interpret) for name in COUNTS[:2])
    programs = blocks if plan.programs is None else lax.min(blocks, jnp.int32(plan.programs))
    return Extent(blocks, programs, 0 if plan.block == 1 else None, first_left)


def counts_and_rows(refs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The references of COUNTS, if any, and the others: those of rows at strides of the launch's choice, of which there
    is a `group` then, wrapped as such."""
    refs = dict(refs)
    counts = {name: refs.pop(name) for name in [f"{count}_ref" for count in COUNTS] if name in refs}
    group = refs.pop("group_ref", None)
    if group is None:
        return counts, refs
    levels = ("offset", "outer", "inner")
    strides = {name: refs.pop(name) for name in list(refs) if name.removesuffix("_ref").endswith(levels)}

    def wrapped(name: str, ref: Any) -> Any:
        given = [strides.get(f"{name.removesuffix('_ref')}_{level}_ref") for level in levels]
        return ref if any(level is None for level in given) else _strided.StridedRows(ref, group, *given)

    return counts, {name: wrapped(name, ref) for name, ref in refs.items()}


def block(plan: Plan, index: Any, exchange: Exchange | None, slot: Any, *, interpret: bool) -> Block:
    """The index-th full block."""
    if plan.regime is Regime.WARP:
        return WarpRows(plan, pl.ds(pl.multiple_of(index * plan.block, plan.block), plan.block), interpret)
    if exchange is None:
        return WarpgroupRow(plan, index, interpret)
    return SharedRow(plan, index, interpret, exchange, slot)


class Share(NamedTuple):
    """The blocks of one program of a persistent grid: every programs-th of `count`, from `program` on."""

    program: Any
    programs: Any
    count: Any

    @property
    def steps(self) -> jax.Array:
        return lax.div(self.count - self.program + (self.programs - 1), jnp.int32(self.programs))

    def at(self, step: Any) -> Any:
        return self.program + step * self.programs


def for_each_program(
    plan: Plan, extent: Extent, full: Callable[[Any], None], *, one_row: Callable[[Block], None], interpret: bool
) -> None:
    """`full(program)` in the programs of the full blocks, then one program for each row that fills none.

    No row is written by two programs, so an output may be an input where there are no rows left over: those are held by
    every warp, which do not wait for each other. They have the lanes and vectors of the others.
    """
    program = lax.axis_index("program")

    def left_over() -> None:
        one_row(OneRow(plan, program - extent.first_left + extent.blocks * plan.block, interpret))

    if extent.left == 0:
        full(program)
    elif extent.left is not None and extent.blocks == 0:
        left_over()
    else:
        pl.when(program < extent.programs)(lambda: full(program))
        pl.when(program >= extent.first_left)(left_over)
