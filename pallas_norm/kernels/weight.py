"""The weight, as the float32 factors of a block's columns: kept in registers, or read each time it is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

from .. import reference
from .block import Block

Factors = Sequence[Any]  # of each chunk; None where there is no weight


def read(block: Block, ref: Any, offset: float) -> Factors:
    """ref: None without a weight."""
    if ref is None:
        return [None] * block.plan.chunks
    return [reference.scale(chunk, offset) for chunk in block.columns(ref)]


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
    ahead: Factors | None = None

    def factors(self, block: Block) -> Factors:
        values, self.ahead = self.ahead, None
        return read(block, self.ref, self.offset) if values is None else values

    def all_read(self, block: Block) -> None:
        self.ahead = read(block, self.ref, self.offset)


def of(block: Block, ref: Any, offset: float, *, kept: bool) -> Weight:
    return Kept(read(block, ref, offset)) if kept else Reread(ref, offset)
