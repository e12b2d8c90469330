"""The backward kernel of heads: dx of each head of q and of k, and each program's part of their dweights, of the
gradients of what was rotated.

rstd is computed again, since a row is read for its gradient anyhow. The grid is persistent: some programs have q's
blocks, the others k's.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .. import _compat
from .._dtypes import Dtypes
from .._spec import Spec
from ..plans.plan import BackwardPlan
from . import backward as norm_backward
from . import dweight_sum, mosaic, weight
from .block import Chunks, ColumnReduction
from .heads import HeadRows, Lying
from .launch_arguments import count
from .rope import (
    INTERPRETED_ROWS,
    OF_EACH,
    PAIR,
    STRIDES,
    angles_of,
    blocks_of,
    heads_of,
    numbers_of,
    of_tensor,
)
from .rows import Fetched

F32 = jnp.float32
OF_GRADIENT = tuple(f"dr_{stride}" for stride in STRIDES)
# The numbers of a launch, in this order.
NUMBERS = (
    *("positions", "q_programs", "k_programs"),
    *(f"{name}_{number}" for name in PAIR for number in (*OF_EACH, *OF_GRADIENT)),
)
Loaded = tuple[Chunks, Chunks]  # of x and of dr


def programs_of(rows: tuple[int, int], plan: BackwardPlan) -> tuple[int, int]:
    """Programs for so many rows of q and of k, neither of which is 0: as their blocks are shared out."""
    of_q, of_k = (blocks_of(count, plan) for count in rows)
    for_k = min(of_k, max(1, round(plan.programs * of_k / (of_q + of_k))))
    return min(of_q, max(1, plan.programs - for_k)), for_k


class Refs(NamedTuple):
    """Of q and k, and of what belongs to them. weight: None where there is none."""

    x: Lying
    dr: Lying
    cos: Lying
    sin: Lying
    weight: Lying | None
    dx: Lying


def rotated_back(block: HeadRows, dr: Chunks, cos: Chunks, sin: Chunks) -> Chunks:
    """dy of rope_reference.rotated_back."""
    turned = block.partners([block.times(*pair) for pair in zip(dr, sin, strict=True)])
    found: Chunks = []
    for i, partner in enumerate(turned):
        dy = block.plus(block.times(dr[i], cos[i]), block.half_negated(partner, i, second=True))
        found.append(block.zeros_positive(dy))
    return found


def gradient(
    block: HeadRows,
    loaded: Loaded,
    factors: weight.Weight,
    partial: Chunks | None,
    refs: Refs,
    *,
    dtypes: Dtypes,
    eps: float,
) -> Chunks | None:
    """Writes dx of the block's rows; returns `partial` with their dweight added."""
    x, dr = loaded
    dy = rotated_back(block, dr, block.load(refs.cos), block.load(refs.sin))
    wide = [block.widened(chunk) for chunk in x]
    total = block.end_sum(block.begin_sum([block.product(chunk, chunk) for chunk in wide]))
    out = norm_backward.Refs(block.inverse_root(total, eps), refs.dx)
    added = norm_backward.gradient(block, Fetched({"x": x, "dy": dy}), factors, partial, out, dtypes=dtypes)
    if added is None or partial is None:
        return None
    return [block.of_new_rows(*pair) for pair in zip(added, partial, strict=True)]


@dataclasses.dataclass(frozen=True)
class HeadBlocks:
    """The blocks of one program: every `programs`-th of its tensor's, from `program` on."""

    plan: BackwardPlan
    program: Any
    programs: Any
    own: dict[str, Any]
    is_k: Any
    interpret: bool

    @property
    def steps(self) -> jax.Array:
        blocks = lax.div(self.own["last"], jnp.int32(self.plan.block)) + 1
        return lax.div(blocks - self.program + (self.programs - 1), self.programs)

    def block(self, step: Any) -> HeadRows:
        row = (self.program + step * self.programs) * self.plan.block
        return HeadRows(self.plan, row, self.interpret, self.own["last"], self.own["heads"], self.is_k)


def backward(
    operands: dict[str, jax.Array], *, plan: BackwardPlan, dweight_dtype: Any = F32, interpret: bool, **options: Any
) -> dict[str, jax.Array]:
    """As partial_dweights, but the sums of the parts, rounded to dweight_dtype."""
    found = partial_dweights(operands, plan=plan, interpret=interpret, **options)
    rows = len(found["dq"]), len(found["dk"])
    for name, used in zip(PAIR, programs_of(rows, _here(plan, interpret=interpret)), strict=True):
        if (parts := found.get(f"{name}_dweight")) is not None:
            found[f"{name}_dweight"] = dweight_sum.column_sum(parts, used, dweight_dtype, interpret=interpret)
    return found


def _here(plan: BackwardPlan, *, interpret: bool) -> BackwardPlan:
    return dataclasses.replace(plan, block=INTERPRETED_ROWS) if interpret else plan


def partial_dweights(
    operands: dict[str, jax.Array],
    *,
    plan: BackwardPlan,
    dtypes: Dtypes,
    spec: Spec,
    heads: tuple[int, int] | None,
    interpret: bool,
) -> dict[str, jax.Array]:
    """dq and dk (rows, n), with weights also q_dweight and k_dweight: the part of each program, in the first
    programs_of(...) rows. Of q and k (tokens, heads, n), or with `heads` of both in qkv, of cos and sin (positions, n),
    where given q_weight and k_weight, and of dq_out and dk_out (tokens, heads, n).

    With NUMBERS among the operands the rows, and where they lie, are the launch's; the shapes then bound nothing.
    """
    plan = _here(plan, interpret=interpret)
    tensors = {name: value for name, value in operands.items() if name not in NUMBERS}
    q, n, with_dweight = tensors["qkv" if heads else "q"], plan.n, "q_weight" in tensors
    heads = heads or (q.shape[1], tensors["k"].shape[1])
    rows = q.shape[0] * heads[0], q.shape[0] * heads[1]
    programs = programs_of(rows, plan)
    known = numbers_of(q, tensors.get("k"), heads, tensors["cos"].shape[0], plan)
    for i, name in enumerate(PAIR):
        known[f"{name}_programs"] = programs[i]
        known |= dict(zip((f"{name}_{stride}" for stride in OF_GRADIENT), (0, heads[i] * n, n), strict=True))
    outputs = {f"d{name}": jax.ShapeDtypeStruct((count, n), q.dtype) for name, count in zip(PAIR, rows, strict=True)}
    scratch: dict[str, Any] = {}
    if with_dweight:
        for name, used in zip(PAIR, programs, strict=True):
            outputs[f"{name}_dweight"] = jax.ShapeDtypeStruct((max(used, dweight_sum.TILE), n), F32)
        scratch = {"rows": mosaic.smem((plan.block, plan.span), F32), "barrier": mosaic.barrier(1)}

    def kernel(*refs: Any) -> None:
        named = dict(zip([*operands, *outputs, *scratch], refs, strict=True))
        numbers: dict[str, Any] = {name: jnp.int32(known[name]) for name in NUMBERS}
        numbers |= {name: count(named[name], interpret=interpret) for name in NUMBERS if name in named}
        program = lax.axis_index("program")
        is_k = (program >= numbers["q_programs"]).astype(jnp.int32)
        own = of_tensor(is_k, numbers, ("programs", *OF_EACH, *OF_GRADIENT))
        program -= is_k * numbers["q_programs"]
        blocks = HeadBlocks(plan, program, own["programs"], own, is_k, interpret)
        lying = Refs(
            **angles_of(named, numbers, n),
            x=heads_of(named, own),
            dr=Lying([named[f"d{name}_out"] for name in PAIR], own["dr_outer"], own["dr_inner"], own["dr_offset"]),
            weight=Lying([named[f"{name}_weight"] for name in PAIR], 0, 0) if with_dweight else None,
            dx=Lying([named[f"d{name}"] for name in PAIR], own["heads"] * n, n),
        )

        def load(step: Any) -> Loaded:
            block = blocks.block(step)
            return block.load(lying.x), block.load(lying.dr)

        steps, first = blocks.steps, blocks.block(jnp.int32(0))
        factors = weight.of(first, lying.weight, offset=spec.weight_offset, dtype=dtypes.weight, kept=True)

        def body(step: jax.Array, state: tuple[Chunks | None, Loaded]) -> tuple[Chunks | None, Loaded]:
            partial, loaded = state
            following = load(jnp.minimum(step + 1, steps - 1))  # in flight while this block is worked on
            partial = gradient(blocks.block(step), loaded, factors, partial, lying, dtypes=dtypes, eps=spec.eps)
            return partial, following

        zeros = first.zeros() if with_dweight else None
        partial, _ = lax.fori_loop(0, steps, body, (zeros, load(jnp.int32(0))))
        if partial is not None:
            reduction = ColumnReduction(named["rows"], named["barrier"])
            for i, name in enumerate(PAIR):
                store = functools.partial(first.store_columns, named[f"{name}_dweight"].at[program], partial, reduction)
                pl.when(is_k == i)(store)

    results = mosaic.kernel(
        kernel,
        interpret=interpret,
        out_type=tuple(outputs.values()),
        grid=(sum(programs),),
        grid_names=("program",),
        scratch_types=tuple(scratch.values()),
    )(*operands.values())
    return {name: _compat.vary_like(value, q) for name, value in zip(outputs, results, strict=True)}
