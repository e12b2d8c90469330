"""The forward kernel: y, and on request rstd and the rounded sum x + residual."""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import reference
from .._spec import Spec
from ..plans.plan import Plan, Source
from . import launch, weight
from .block import Block, Chunks
from .grid import CtaBlocks
from .pipeline import staged
from .rows import InRegisters, Reader, Rows, feed
from .weight import Weight

F32 = jnp.float32


class Out(NamedTuple):
    """References; None for a result that is not asked for."""

    y: Any
    s: Any
    rstd: Any


def normalise(block: Block, rows: Rows[Chunks], weight: Weight, out: Out, *, spec: Spec) -> None:
    x = rows.first(block)
    begun = block.begin_sum([chunk.astype(F32) * chunk.astype(F32) for chunk in x])
    rows.all_read(block)
    rstd = lax.rsqrt(block.end_sum(begun) / block.plan.n + spec.eps)  # n, not the padded width
    factors, x = weight.factors(block), rows.second(block, x)
    scale = block.broadcast(rstd)
    y: Chunks = []
    for chunk, factor in zip(x, factors, strict=True):
        unit = chunk.astype(F32) * scale
        if spec.cast_before_scale:
            unit = unit.astype(chunk.dtype).astype(F32)  # Hugging Face rounds here, before the weight
        y.append((unit if factor is None else unit * factor).astype(out.y.dtype))
    block.store(out.y, y)
    if out.s is not None:
        block.store(out.s, x)
    if out.rstd is not None:
        block.store_rows(out.rstd, rstd)


def added(operands: dict[str, Chunks]) -> Chunks:
    """x, or s = round(x + residual)."""
    x = operands["x"]
    if "residual" not in operands:
        return x
    return [(a.astype(F32) + b.astype(F32)).astype(a.dtype) for a, b in zip(x, operands["residual"], strict=True)]


def forward(
    operands: dict[str, jax.Array], *, plan: Plan, spec: Spec, with_rstd: bool, interpret: bool
) -> dict[str, jax.Array]:
    """y, with a residual also s, on request rstd; of x (rows, n), and where given residual and weight.

    With LaunchArguments among the operands the row count, and where they have strides those of the rows, are the
    launch's; the shape of x then bounds nothing.
    """
    x = operands["x"]
    if interpret:
        plan = launch.interpretable(plan, x.dtype.itemsize)
    weight_dtype = operands["weight"].dtype if "weight" in operands else None
    outputs = {"y": jax.ShapeDtypeStruct(x.shape, reference.result_dtype(x.dtype, weight_dtype))}
    if "residual" in operands:
        outputs["s"] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if with_rstd:
        outputs["rstd"] = jax.ShapeDtypeStruct(x.shape[:1], F32)
    names = [name for name in ("x", "residual") if name in operands]
    inputs, scratch = staged(plan, operands, names)

    def work(refs: dict[str, Any]) -> tuple[launch.Full, launch.LeftOver]:
        reader = Reader({name: refs[name] for name in names}, added)
        out, weight_ref = Out(refs["y"], refs.get("s"), refs.get("rstd")), refs.get("weight")
        kept = plan.source is not Source.MEMORY

        def full(blocks: CtaBlocks) -> None:
            rows = feed(blocks, reader, refs)
            factors = weight.of(blocks.first, weight_ref, spec.weight_offset, kept=kept)  # before x, to arrive with it
            rows.each(lambda block, rows, _: normalise(block, rows, factors, out, spec=spec), None)

        def left_over(block: Block, _: Any) -> None:
            factors = weight.of(block, weight_ref, spec.weight_offset, kept=True)
            normalise(block, InRegisters(reader), factors, out, spec=spec)

        return full, left_over

    return launch.launch(work, plan, len(x), inputs, outputs, scratch=scratch, interpret=interpret)
