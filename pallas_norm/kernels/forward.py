"""The forward kernel: y, and on request rstd and the rounded sum x + residual."""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from .._dtypes import Dtypes
from .._spec import Spec
from ..plans.plan import Plan, Source
from . import launch, weight
from .block import Block, Chunks
from .grid import CtaBlocks
from .pipeline import narrowest, staged
from .rows import InRegisters, Reader, Rows, feed
from .weight import Weight

F32 = jnp.float32
T = TypeVar("T")


class Out(NamedTuple):
    """References; None for a result that is not asked for."""

    y: Any
    s: Any
    rstd: Any

    def store(self, block: Block, y: Chunks, s: Chunks, rstd: jax.Array) -> None:
        block.store(self.y, y)
        if self.s is not None:
            block.store(self.s, s)
        if self.rstd is not None:
            block.store_rows(self.rstd, rstd)


class AnyOut(Protocol):
    def store(self, block: Block, y: Chunks, s: Chunks, rstd: jax.Array) -> None: ...


def normalise(block: Block, rows: Rows[Chunks], weight: Weight, out: AnyOut, *, dtypes: Dtypes, eps: float) -> None:
    x = rows.first(block)
    begun = block.begin_sum([block.product(chunk.astype(F32), chunk.astype(F32)) for chunk in x])
    rows.all_read(block)
    rstd = block.inverse_root(block.end_sum(begun), eps)
    factors, x = weight.factors(block), rows.second(block, x)
    scale = block.broadcast(rstd)
    y: Chunks = []
    for chunk, factor in zip(x, factors, strict=True):
        unit = chunk.astype(F32) * scale
        unit = block.narrowed(unit, dtypes.unit).astype(F32)  # Hugging Face rounds here, before the weight
        y.append(block.narrowed(unit if factor is None else unit * factor, dtypes.y))
    out.store(block, y, x, rstd)


def added(block: Block, operands: dict[str, Chunks], dtype: Any) -> Chunks:
    """x, or s = round(x + residual)."""
    x = operands["x"]
    if "residual" not in operands:
        return x
    return [block.narrowed(a.astype(F32) + b.astype(F32), dtype) for a, b in zip(x, operands["residual"], strict=True)]


def forward(
    operands: dict[str, jax.Array],
    *,
    plan: Plan,
    spec: Spec,
    with_rstd: bool,
    interpret: bool,
    places: dict[str, str] | None = None,
) -> dict[str, jax.Array]:
    """y, with a residual also s, on request rstd; of x (rows, n), and where given residual and weight.

    With LaunchArguments among the operands the row count, and where they have strides those of the rows, are the
    launch's; the shape of x then bounds nothing.
    """
    x = operands["x"]
    given = {name: operands[name].dtype for name in ("x", "residual", "weight") if name in operands}
    dtypes, names = spec.dtypes(**given), [name for name in given if name != "weight"]
    if interpret:
        plan = launch.interpretable(plan, narrowest(operands, names))
    outputs = {"y": jax.ShapeDtypeStruct(x.shape, dtypes.y)}
    if "residual" in operands:
        outputs["s"] = jax.ShapeDtypeStruct(x.shape, dtypes.s)
    if with_rstd:
        outputs["rstd"] = jax.ShapeDtypeStruct(x.shape[:1], F32)
    inputs, scratch = staged(plan, operands, names)
    work = normalised(plan, spec, dtypes, names, lambda refs: Out(refs["y"], refs.get("s"), refs.get("rstd")))
    return launch.launch(work, plan, len(x), inputs, outputs, scratch=scratch, interpret=interpret, places=places)


def normalised(
    plan: Plan, spec: Spec, dtypes: Dtypes, names: Sequence[str], out_of: Callable[[dict[str, Any]], AnyOut]
) -> launch.Work:
    """`work` of a norm. names: of the operands that are added up."""
    combined = functools.partial(added, dtype=dtypes.s)
    normal = functools.partial(normalise, dtypes=dtypes, eps=spec.eps)
    return work(plan, spec, dtypes, names, out_of, combined=combined, normal=normal)


def work(
    plan: Plan,
    spec: Spec,
    dtypes: Dtypes,
    names: Sequence[str],
    out_of: Callable[[dict[str, Any]], T],
    *,
    combined: Callable[[Block, dict[str, Chunks]], Any],
    normal: Callable[[Block, Rows[Any], Weight, T], None],
) -> launch.Work:
    """What a CTA does with its blocks and with a row that is left over. names: of the operands that have rows, of which
    `normal` gets what `combined` makes."""
    factors_of = functools.partial(weight.of, offset=spec.weight_offset, dtype=dtypes.weight)

    def work(refs: dict[str, Any]) -> tuple[launch.Full, launch.LeftOver]:
        reader = Reader({name: refs[name] for name in names}, combined)
        out, weight_ref = out_of(refs), refs.get("weight")
        kept = plan.source is not Source.MEMORY

        def full(blocks: CtaBlocks) -> None:
            rows = feed(blocks, reader, refs)
            factors = factors_of(blocks.first, weight_ref, kept=kept)  # before x, to arrive with it
            rows.each(lambda block, rows, _: normal(block, rows, factors, out), None)

        def left_over(block: Block, _: Any) -> None:
            normal(block, InRegisters(reader), factors_of(block, weight_ref, kept=True), out)

        return full, left_over

    return work
