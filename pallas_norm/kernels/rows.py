"""Where the rows of a block come from: what the first pass over them reads, and what the second one does.

A `Feed` walks over the blocks of a CTA and gives the rows of each as an object with these two passes.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from ..plans.plan import Regime, Source
from . import mosaic
from .block import Block, Chunks
from .grid import CtaBlocks
from .pipeline import Pipeline

T = TypeVar("T")
Refs = Mapping[str, Any]  # of the operands that have rows, by name


class Rows(Protocol[T]):
    """T: what a kernel makes of its operands' chunks, such as the chunks of x + residual."""

    def first(self, block: Block) -> T:
        """What the first pass works on."""
        ...

    def all_read(self, block: Block) -> None:
        """Every warp that shares the rows has read them for the first pass: what comes next may begin."""
        ...

    def second(self, block: Block, first: T) -> T:
        """What the second pass works on."""
        ...


@dataclasses.dataclass(frozen=True)
class Reader(Generic[T]):
    """How a kernel reads a block: the chunks of each operand, and what it makes of them."""

    refs: Refs
    combined: Callable[[Block, dict[str, Chunks]], T]

    def read(self, block: Block) -> T:
        return self.combined(block, {name: block.load(ref) for name, ref in self.refs.items()})

    def read_stage(self, block: Block, stage: Refs) -> T:
        """As read, of rows that were copied to shared memory, or that have the shape of a stage."""
        return self.combined(block, {name: block.load_stage(ref) for name, ref in stage.items()})

    def read_left_over(self, block: Block, *, viewed: bool) -> T:
        """As read, of one row that fills no block. viewed: the operands have the shape that bulk copies see."""
        if not viewed:
            return self.read(block)
        return self.read_stage(block, {name: ref.at[block.row] for name, ref in self.refs.items()})


@dataclasses.dataclass(frozen=True)
class InRegisters(Rows[T]):
    """Read once, and kept for the second pass."""

    reader: Reader[T]

    def first(self, block: Block) -> T:
        return self.reader.read(block)

    def all_read(self, block: Block) -> None:
        del block

    def second(self, block: Block, first: T) -> T:
        del block
        return first


@dataclasses.dataclass(frozen=True)
class Fetched(Rows[T]):
    """In registers already: read while the block before was worked on."""

    rows: T

    def first(self, block: Block) -> T:
        del block
        return self.rows

    def all_read(self, block: Block) -> None:
        del block

    def second(self, block: Block, first: T) -> T:
        del block
        return first


@dataclasses.dataclass
class Reread(Rows[T]):
    """Registers cannot hold the rows: they are read from memory in each pass."""

    reader: Reader[T]

    def first(self, block: Block) -> T:
        return self.reader.read(block)

    def all_read(self, block: Block) -> None:
        del block

    def second(self, block: Block, first: T) -> T:
        del first
        return self.reader.read(block)


@dataclasses.dataclass
class RereadAhead(Reread[T]):
    """As Reread; the second reading is in flight while the CTAs of a cluster add up their sums."""

    again: T | None = None

    def all_read(self, block: Block) -> None:
        self.again = self.reader.read(block)

    def second(self, block: Block, first: T) -> T:
        del block, first
        assert self.again is not None
        return self.again


@dataclasses.dataclass(frozen=True)
class Staged(Rows[T]):
    """In a stage of shared memory, which is filled again once all warps have read it for the last time."""

    reader: Reader[T]
    pipeline: Pipeline
    step: jax.Array
    stage: Refs

    def _read(self, block: Block) -> T:
        return self.reader.read_stage(block, self.stage)

    def first(self, block: Block) -> T:
        plan = self.pipeline.plan
        kept = self._read(block) if plan.rows_in_registers else None
        if plan.regime is Regime.WARP:  # the warps share no sum in which they meet
            mosaic.arrive_and_wait(self.pipeline.read)
            self.pipeline.refill(self.step)
        return self._read(block) if kept is None else kept

    def all_read(self, block: Block) -> None:
        del block
        if self.pipeline.plan.regime is Regime.CTA:
            self.pipeline.refill(self.step)

    def second(self, block: Block, first: T) -> T:
        return first if self.pipeline.plan.rows_in_registers else self._read(block)


# --- the blocks of a CTA, each with its rows --------------------------------------------------------------------------

Work = Callable[[Block, Rows[T], Any], Any]  # carry = work(block, rows, carry)


class Feed(Protocol[T]):
    def each(self, work: Work[T], carry: Any) -> Any:
        """work of each block, in turn."""
        ...


@dataclasses.dataclass(frozen=True)
class Once(Feed[T]):
    """The only block of a CTA."""

    blocks: CtaBlocks
    rows: Rows[T]

    def each(self, work: Work[T], carry: Any) -> Any:
        return work(self.blocks.first, self.rows, carry)


@dataclasses.dataclass(frozen=True)
class Prefetched(Feed[T]):
    """In registers, the rows of the next block in flight while one is worked on."""

    blocks: CtaBlocks
    reader: Reader[T]

    def each(self, work: Work[T], carry: Any) -> Any:
        steps = self.blocks.steps

        def body(step: jax.Array, state: tuple[Any, T]) -> tuple[Any, T]:
            carry, rows = state
            following = self.reader.read(self.blocks.block(jnp.minimum(step + 1, steps - 1)))
            return work(self.blocks.block(step), Fetched(rows), carry), following

        carry, _ = lax.fori_loop(0, steps, body, (carry, self.reader.read(self.blocks.block(jnp.int32(0)))))
        return carry


@dataclasses.dataclass(frozen=True)
class FromMemory(Feed[T]):
    blocks: CtaBlocks
    reader: Reader[T]

    def each(self, work: Work[T], carry: Any) -> Any:
        def body(step: jax.Array, carry: Any) -> Any:
            return work(self.blocks.block(step), RereadAhead(self.reader), carry)

        return lax.fori_loop(0, self.blocks.steps, body, carry)


@dataclasses.dataclass(frozen=True)
class Copied(Feed[T]):
    """Bulk copies bring the rows several blocks ahead."""

    blocks: CtaBlocks
    reader: Reader[T]
    pipeline: Pipeline

    def each(self, work: Work[T], carry: Any) -> Any:
        def body(step: jax.Array, carry: Any) -> Any:
            stage = self.pipeline.wait(step)
            return work(self.blocks.block(step), Staged(self.reader, self.pipeline, step, stage), carry)

        return lax.fori_loop(0, self.pipeline.steps, body, carry)


def feed(blocks: CtaBlocks, reader: Reader[T], scratch: Refs) -> Feed[T]:
    """As the plan says. The bulk copies of a pipeline begin here."""
    plan = blocks.plan
    if plan.source is Source.PIPELINE:
        pipeline = Pipeline.of(plan, reader.refs, scratch, blocks)
        pipeline.start()
        return Copied(blocks, reader, pipeline)
    if plan.programs is None:
        return Once(blocks, InRegisters(reader) if plan.source is Source.REGISTERS else Reread(reader))
    return Prefetched(blocks, reader) if plan.source is Source.REGISTERS else FromMemory(blocks, reader)
