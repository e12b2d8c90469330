"""The forward kernel of heads: y of each head of q and of k, rotated by the angles of its token. Programs of q's blocks
come first, then those of k's."""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _compat, reference
from .._dtypes import Dtypes
from .._spec import Spec
from ..plans.plan import Plan
from . import mosaic
from .block import Chunks
from .heads import HeadRows, Lying
from .launch_arguments import count

PAIR = ("q", "k")
INTERPRETED_ROWS = 3  # of a block, each with a store of its own there
STRIDES = ("offset", "outer", "inner")  # in elements
OF_EACH = ("last", "heads", *STRIDES)  # of q, and of k
# The numbers of a launch, in this order.
NUMBERS = ("q_blocks", "positions", *(f"{name}_{number}" for name in PAIR for number in OF_EACH))


def numbers_of(q: jax.Array, k: jax.Array | None, heads: tuple[int, int], positions: int, plan: Plan) -> dict[str, int]:
    """NUMBERS of q and k (tokens, heads, n), or with k None of the heads of both in q, the tensor of a projection."""
    tokens, within, n = q.shape
    found = {"q_blocks": blocks_of(tokens * heads[0], plan), "positions": positions}
    for i, name in enumerate(PAIR):
        outer, offset = (within * n, i * heads[0] * n) if k is None else (heads[i] * n, 0)
        own = tokens * heads[i] - 1, heads[i], offset, outer, n
        found |= {f"{name}_{number}": value for number, value in zip(OF_EACH, own, strict=True)}
    return found


def blocks_of(rows: int, plan: Plan) -> int:
    return -(-rows // plan.block)


def programs_of(rows: tuple[int, int], plan: Plan) -> int:
    """CTAs for so many rows of q and of k."""
    return sum(blocks_of(count, plan) for count in rows)


def heads_of(named: dict[str, Any], own: dict[str, Any]) -> Lying:
    """q and k, or the tensor of a projection that holds both."""
    tensors = [named[name] for name in (*PAIR, "qkv") if name in named]
    return Lying(tensors, own["outer"], own["inner"], own["offset"])


def angles_of(named: dict[str, Any], numbers: dict[str, Any], n: int) -> dict[str, Lying]:
    return {name: Lying([named[name]], n, 0, tokens=numbers["positions"]) for name in ("cos", "sin")}


class Refs(NamedTuple):
    """Of q and k, and of what belongs to them. weight: None where there is none."""

    x: Lying
    weight: Lying | None
    cos: Lying
    sin: Lying
    out: Lying


def normalise_and_rotate(block: HeadRows, refs: Refs, *, dtypes: Dtypes, spec: Spec) -> None:
    x, cos, sin = block.load(refs.x), block.load(refs.cos), block.load(refs.sin)
    weight = [None] * len(x) if refs.weight is None else block.load(refs.weight)
    wide = [block.widened(chunk) for chunk in x]
    total = block.end_sum(block.begin_sum([block.product(chunk, chunk) for chunk in wide]))
    scale = block.broadcast(block.inverse_root(total, spec.eps))
    unit = [block.narrowed(chunk * scale, dtypes.unit) for chunk in wide]  # Hugging Face rounds here, before the weight
    y = [_scaled(block, *pair, spec.weight_offset, dtypes.y) for pair in zip(unit, weight, strict=True)]
    block.store(refs.out, rotated(block, y, cos, sin))


def _scaled(block: HeadRows, unit: jax.Array, weight: Any, offset: float, dtype: Any) -> jax.Array:
    if weight is None:
        return block.narrowed(unit, dtype)
    if unit.dtype == weight.dtype == dtype and not offset:
        return block.times(unit, weight)
    return block.narrowed(block.widened(unit) * reference.scale(weight, offset), dtype)


def rotated(block: HeadRows, y: Chunks, cos: Chunks, sin: Chunks) -> Chunks:
    found: Chunks = []
    for i, partner in enumerate(block.partners(y)):
        a, b = block.times(y[i], cos[i]), block.times(partner, sin[i])
        found.append(block.plus(a, block.half_negated(b, i)))
    return found


def of_tensor(is_k: jax.Array, numbers: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The numbers of k where is_k is 1, else those of q."""
    return {name: jnp.where(is_k == 1, numbers[f"k_{name}"], numbers[f"q_{name}"]) for name in names}


def block_of(plan: Plan, numbers: dict[str, Any], program: Any, *, interpret: bool) -> tuple[HeadRows, dict[str, Any]]:
    """The block of a program, and the numbers of its tensor."""
    is_k = (program >= numbers["q_blocks"]).astype(jnp.int32)
    own = of_tensor(is_k, numbers, OF_EACH)
    row = (program - is_k * numbers["q_blocks"]) * plan.block
    return HeadRows(plan, row, interpret, own["last"], own["heads"], is_k), own


def rope(
    operands: dict[str, jax.Array],
    *,
    plan: Plan,
    dtypes: Dtypes,
    spec: Spec,
    heads: tuple[int, int] | None,
    interpret: bool,
) -> dict[str, jax.Array]:
    """q_out and k_out (rows, n); of q and k (tokens, heads, n), or with `heads` of both in qkv, of cos and sin
    (positions, n), and where given q_weight and k_weight.

    With NUMBERS among the operands the rows, and where they lie, are the launch's; the shapes then bound nothing.
    """
    if interpret:
        plan = dataclasses.replace(plan, block=INTERPRETED_ROWS)
    tensors = {name: value for name, value in operands.items() if name not in NUMBERS}
    q = tensors["qkv" if heads else "q"]
    assert tensors["cos"].shape == tensors["sin"].shape  # one number of positions is that of both
    heads = heads or (q.shape[1], tensors["k"].shape[1])
    rows = q.shape[0] * heads[0], q.shape[0] * heads[1]
    known = numbers_of(q, tensors.get("k"), heads, tensors["cos"].shape[0], plan)
    outputs = [jax.ShapeDtypeStruct((count, plan.n), dtypes.y) for count in rows]

    def kernel(*refs: Any) -> None:
        named = dict(zip([*operands, "q_out", "k_out"], refs, strict=True))
        numbers: dict[str, Any] = {name: jnp.int32(value) for name, value in known.items()}
        numbers |= {name: count(named[name], interpret=interpret) for name in NUMBERS if name in named}
        block, own = block_of(plan, numbers, lax.axis_index("program"), interpret=interpret)
        weights = [named[f"{name}_weight"] for name in PAIR if f"{name}_weight" in named]
        lying = Refs(
            **angles_of(named, numbers, plan.n),
            x=heads_of(named, own),
            weight=Lying(weights, 0, 0) if weights else None,
            out=Lying([named["q_out"], named["k_out"]], own["heads"] * plan.n, plan.n),
        )
        normalise_and_rotate(block, lying, dtypes=dtypes, spec=spec)

    results = mosaic.kernel(
        kernel,
        interpret=interpret,
        out_type=tuple(outputs),
        grid=(programs_of(rows, plan),),
        grid_names=("program",),
    )(*operands.values())
    return {name: _compat.vary_like(value, q) for name, value in zip(("q_out", "k_out"), results, strict=True)}
