"""The forward kernel with a result of 8 bits: q, and on request the scales, s and y.

The kernels write the bits of q as int8, whatever its dtype: Mosaic GPU's own types of 8 bits differ between versions.
"""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .. import quantized_reference
from .._spec import Spec
from ..plans.hardware import Gpu, named
from ..plans.plan import Plan
from . import eight_bits, launch, layouts
from .block import Block, Chunks
from .cta import Exchange
from .eight_bits import Divisor
from .forward import normalised
from .pipeline import narrowest, staged

F32 = jnp.float32
LANES = 32
LARGEST = "largest_"  # names of the exchange for the largest of a row
SINCE_FLOAT8 = (8, 9)


@dataclasses.dataclass(frozen=True)
class Quantiser:
    """Which scale the elements of a block have."""

    dtype: str
    group: int  # elements that share a scale; 0: the scale is given
    scale: Any  # reference of the one that is given, or None
    largest: Exchange | None  # where the largest of a row that workers share meet

    def quantise(self, block: Block, y: Chunks, scales: Any) -> Chunks:
        """q; the scales that were computed are stored."""
        if not self.group:
            return self._by_rows(block, y, self.scale[0])
        options: dict[str, Any] = {"vec": block.plan.vec, "interpret": block.interpret}
        if self.group == block.plan.n:
            largest = eight_bits.lane_max(y, block.layout, **options)
            scale = self._scale_of(block.row_max(largest, self.largest), block.row_layout, block)
            block.store_rows(scales, scale)
            return self._by_rows(block, y, scale)
        found = [self._by_groups(block, chunk, options) for chunk in y]
        block.store_groups(scales, [scale for _, scale in found], self.group)
        return [q for q, _ in found]

    def _by_groups(self, block: Block, y: jax.Array, options: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        """(q, scale) of one chunk at a time: of all at once a row of 65536 spilled 344 bytes a lane."""
        layout = block.layout
        of_lanes = eight_bits.lane_max([y], layout, **options)
        largest = eight_bits.group_max(of_lanes, self.group, layout, one_row=block.one_row, **options)
        scale = self._scale_of(largest, layout, block)
        return self._rounded(block, y, scale, Divisor.of(scale, layout, interpret=block.interpret)), scale

    def _scale_of(self, largest: jax.Array, layout: Any, block: Block) -> jax.Array:
        limit = jnp.full_like(largest, quantized_reference.LARGEST[self.dtype])
        scale = eight_bits.divided(largest, limit, layout, interpret=block.interpret)
        return jnp.where(scale == 0, F32(quantized_reference.SCALE_OF_ZEROS), scale)

    def _by_rows(self, block: Block, y: Chunks, scale: jax.Array) -> Chunks:
        layout = block.row_layout if scale.ndim else layouts.scalar()
        of_rows = Divisor.of(scale, layout, interpret=block.interpret)
        filled, divisor = block.filled(scale), Divisor(*map(block.filled, of_rows))
        return [self._rounded(block, chunk, filled, divisor) for chunk in y]

    def _rounded(self, block: Block, y: jax.Array, scale: jax.Array, divisor: Divisor) -> jax.Array:
        options = {"in_range": bool(self.group), "interpret": block.interpret}
        return eight_bits.rounded(block.widened(y), divisor, scale, self.dtype, block.layout, **options)


@dataclasses.dataclass(frozen=True)
class Out:
    """References, None for a result that is not asked for; y is quantised on its way."""

    quantiser: Quantiser
    q: Any
    scales: Any
    s: Any
    y: Any

    def store(self, block: Block, y: Chunks, s: Chunks, rstd: jax.Array) -> None:
        del rstd
        block.store(self.q, self.quantiser.quantise(block, y, self.scales))
        if self.s is not None:
            block.store(self.s, s)
        if self.y is not None:
            block.store(self.y, y)


def misfit(plan: Plan, gpu: Gpu, dtype: str, group: int) -> str | None:
    """Why that GPU has no kernel with such results where it has the norm's, or None."""
    if dtype == "float8_e4m3fn" and gpu.capability < SINCE_FLOAT8:
        return (
            f"a GPU of compute capability {named(gpu.capability)} rounds to no float8_e4m3fn, which came with "
            f"{named(SINCE_FLOAT8)} (Ada)"
        )
    if group in (0, plan.n) or group <= LANES * plan.vec:
        return None
    return f"in the kernel for n = {plan.n} a group of {group} elements does not lie in one warp"


def quantized(
    operands: dict[str, jax.Array],
    *,
    plan: Plan,
    spec: Spec,
    dtype: str,
    group: int,
    with_y: bool,
    interpret: bool,
) -> dict[str, jax.Array]:
    """The bits of q, with a residual also s, on request y; of x (rows, n), and where given residual, weight and scale
    (1,). Without a scale also scales, (rows,) or (rows, n // group). LaunchArguments as of `forward`."""
    x = operands["x"]
    given = {name: operands[name].dtype for name in ("x", "residual", "weight") if name in operands}
    dtypes, names = spec.dtypes(**given), [name for name in given if name != "weight"]
    if interpret:
        plan = launch.interpretable(plan, narrowest(operands, names))
    outputs = {"q": jax.ShapeDtypeStruct(x.shape, jnp.int8)}
    if group:
        shape = x.shape[:1] if group == plan.n else (x.shape[0], plan.n // group)
        outputs["scales"] = jax.ShapeDtypeStruct(shape, F32)
    if "residual" in operands:
        outputs["s"] = jax.ShapeDtypeStruct(x.shape, dtypes.s)
    if with_y:
        outputs["y"] = jax.ShapeDtypeStruct(x.shape, dtypes.y)
    inputs, scratch = staged(plan, operands, names)
    exchange = Exchange.scratch(plan, jnp.int32, 1, LARGEST) if group == plan.n else {}

    def out_of(refs: dict[str, Any]) -> Out:
        quantiser = Quantiser(dtype, group, refs.get("scale"), Exchange.opened(refs, LARGEST))
        return Out(quantiser, *(refs.get(name) for name in ("q", "scales", "s", "y")))

    work = normalised(plan, spec, dtypes, names, out_of)
    return launch.launch(work, plan, len(x), inputs, outputs, scratch=scratch | exchange, interpret=interpret)
