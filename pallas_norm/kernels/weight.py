"""The weight, as the float32 factors of a block's columns: kept in registers, or read each time it is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp

from .. import reference
from .block import Block

F32 = jnp.float32

Factors = Sequence[Any]  # of each chunk; None where there is no weight


def read(block: Block, ref: Any, offset: float, dtype: Any) -> Factors:
    """ref: None without a weight. dtype: what the weight is rounded to, if it is not its own."""
    if ref is None:
        return [None] * block.plan.chunks
    chunks = block.columns(ref)
    if dtype != ref.dtype:
        chunks = [block.rounded(chunk.astype(F32), dtype) for chunk in chunks]
    return [reference.scale(chunk, offset) for chunk in chunks]


class Weight(Protocol):
    def factors(self, block: Block) -> Factors: ...

    def all_read(self, block: Block) -> None:
        """As of Rows: what the second pass needs may begin to be read."""
        ...


@dataclasses.dataclass(frozen=True)
class Kept(Weight):
    values: Factors

    def factors(self, block: Block) -> Factors:
        del block
        return self.values

    def all_read(self, block: Block) -> None:
        del block


@dataclasses.dataclass
class Reread(Weight):
    ref: Any
    offset: float
    dtype: Any
    ahead: Factors | None = None

    def factors(self, block: Block) -> Factors:
        values, self.ahead = self.ahead, None
        return read(block, self.ref, self.offset, self.dtype) if values is None else values

    def all_read(self, block: Block) -> None:
        self.ahead = read(block, self.ref, self.offset, self.dtype)


def of(block: Block, ref: Any, *, offset: float, dtype: Any, kept: bool) -> Weight:
    return Kept(read(block, ref, offset, dtype)) if kept else Reread(ref, offset, dtype)
