"""The order in which a row is added up: part of the specification, a pure function of n and the dtypes.

A row is cut into blocks of `width` elements, the last one ending at n. Column c of the blocks adds its elements from
the first block to the last; then neighbouring columns are added, and neighbouring sums again, down to one:

    n = 11, width = 4          columns   0        1        2        3
    block 0                             x0       x1       x2       x3
    block 1                            +x4      +x5      +x6      +x7
    block 2, from n - 4 = 7 on                  +x8      +x9      +x10     x7 was counted in block 1
                                         c0 + c1           c2 + c3
                                             (c0 + c1) + (c2 + c3)

Every product is rounded to float32 before it is added, and every addition is one of float32. Vectors, lanes, warps,
warpgroups and CTAs own neighbouring columns, so how many of them share a row changes no bit; the width does.
"""

from __future__ import annotations

import dataclasses

from .lengths import SMALLEST_N

FEWEST_BLOCKS = 8  # of rows that are too long for a kernel


@dataclasses.dataclass(frozen=True)
class Order:
    n: int
    width: int  # columns: a power of two, at most n

    @property
    def blocks(self) -> int:
        return -(-self.n // self.width)

    @property
    def overlap(self) -> int:
        """Leading elements of the last block that the one before has counted."""
        return self.blocks * self.width - self.n

    @property
    def depth(self) -> int:
        """Additions on the longest path: they bound the sum's relative error by depth * 2^-24."""
        return self.blocks - 1 + self.width.bit_length() - 1


def without_kernel(n: int) -> Order:
    """Of rows that no kernel takes: all columns of short ones, and of long ones 8 to 16 blocks, as 131072 elements
    have."""
    widest = 1 << (n.bit_length() - 1)
    return Order(n, widest if n < SMALLEST_N else widest // FEWEST_BLOCKS)
