"""The cases, as data: shared by the benchmark and the tests."""

from __future__ import annotations

from typing import NamedTuple

# Every kind of row: each regime and plan, their limits, odd lengths, and hidden sizes and head sizes of real models.
WIDTHS = (
    *(32, 33, 50, 64, 80, 96, 128, 200, 256, 511, 512, 513, 576, 768, 896, 1000, 1024, 1536, 2048, 2560, 2880, 3584),
    *(4096, 4097, 5120, 7168, 8192, 12288, 16384, 32768, 65536, 131072),
)


class Case(NamedTuple):
    operation: str  # forward, add or backward
    rows: int
    n: int
    dtype: str = "bfloat16"


TIMES = (
    *(Case("forward", 16384, n) for n in (1536, 2048, 2560, 4096, 5120, 8192, 16384)),
    *(Case("forward", rows, 4096) for rows in (1, 64, 4096)),
    *(
        Case("forward", rows, n)
        for rows, n in ((524288, 128), (65536, 128), (2048, 32768), (1024, 65536), (512, 131072))
    ),
    *(Case("forward", rows, n, "float32") for rows, n in ((8192, 4096), (262144, 128))),
    *(Case("add", rows, n) for rows, n in ((16384, 4096), (8192, 8192), (524288, 128))),
    *(
        Case("backward", rows, n)
        for rows, n in ((16384, 2048), (16384, 4096), (8192, 8192), (4096, 16384), (65536, 128), (524288, 128))
    ),
    *(Case("backward", rows, n) for rows, n in ((32768, 896), (65536, 512), (16384, 5120))),
    Case("backward", 8192, 4096, "float32"),
)

ACCURACY = (64, 128, 896, 2048, 4096, 5120, 8192, 16384)
ACCURACY_ELEMENTS = (
    10_000_000  # a rstd that is one ULP off changes 0.01 % of the outputs of its row: fewer elements see nothing
)
