"""The cases, as data: shared by the benchmark and the tests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

# Every kind of row: each regime and plan, their limits, odd lengths, and hidden sizes and head sizes of real models.
WIDTHS = (
    *(32, 33, 50, 64, 80, 96, 128, 200, 256, 511, 512, 513, 576, 768, 896, 1000, 1024, 1536, 2048, 2560, 2880, 3584),
    *(4096, 4097, 5120, 7168, 8192, 12288, 16384, 32768, 65536, 131072),
)

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
PASSES = {"forward": 2, "add": 4, "backward": 3}  # over the rows: x y; x residual y s; x dy dx
KV_SHARE = 4  # query heads for each key head in the projections whose slices are normalised
LARGEST_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Case:
    """One program: `rows` rows of `n` elements. With `heads`, x is the query slice of a fused q/k/v projection of that
    many heads, so rows = tokens * heads and a token's rows lie apart from the next one's."""

    operation: str  # forward, add or backward
    rows: int
    n: int
    dtype: str = "bfloat16"
    heads: int = 0  # 0: contiguous

    @property
    def bytes(self) -> int:
        """Of the rows that are read and written, which is what the copy kernel moves. The weight and rstd are left
        out."""
        return PASSES[self.operation] * self.rows * self.n * ITEMSIZE[self.dtype]

    @property
    def label(self) -> str:
        slices = f" q slice of {self.heads} heads" if self.heads else ""
        return f"{self.operation} {self.rows} x {self.n} {self.dtype}{slices}"


HIDDEN = {
    512: "DeepSeek-V3, latent of k and v",
    896: "Qwen2.5-0.5B",
    1000: "odd",
    1536: "Qwen2.5-1.5B; DeepSeek-V3, latent of q",
    2048: "Llama-3.2-1B",
    2304: "Gemma-2-2B",
    2560: "Qwen3-4B",
    2880: "gpt-oss",
    3072: "Llama-3.2-3B",
    3584: "Qwen2.5-7B, Gemma-2-9B",
    4096: "Llama-3.1-8B",
    5120: "Qwen3-14B",
    5376: "Gemma-3-27B",
    7168: "DeepSeek-V3",
    8192: "Llama-3.1-70B",
    12288: "Mistral-Large",
    16384: "Llama-3.1-405B",
}
LONG = (32768, 65536, 131072)
HEAD_SIZES = {64: (14, 32), 80: (32,), 96: (32,), 128: (4, 8, 32, 128), 256: (4, 8, 16)}  # of q and k norms, by heads
ROWS = (1, 8, 32, 64, 256, 1024, 4096, 16384, 65536)
MANY_ROWS = 10**6  # of narrow rows: 7800 tokens of 128 heads


def _within(cases: Iterable[Case]) -> Iterator[Case]:
    return (case for case in cases if case.bytes <= LARGEST_BYTES)


def product() -> Iterator[Case]:
    """Every shape of a real model with every row count, dtype and operation, up to LARGEST_BYTES."""
    shapes = [
        *itertools.product(ROWS, (*HIDDEN, *LONG)),
        *itertools.product((*ROWS, MANY_ROWS), HEAD_SIZES),
    ]
    for operation, (rows, n), dtype in itertools.product(PASSES, shapes, ITEMSIZE):
        yield from _within([Case(operation, rows, n, dtype)])
    for n, counts in HEAD_SIZES.items():
        for heads, tokens, dtype in itertools.product(counts, ROWS, ITEMSIZE):
            yield from _within([Case("forward", tokens * heads, n, dtype, heads)])


def _cases(operation: str, *shapes: tuple[int, int], dtype: str = "bfloat16") -> tuple[Case, ...]:
    return tuple(Case(operation, rows, n, dtype) for rows, n in shapes)


SMOKE = (  # seconds, and on a CPU too
    *_cases("forward", (8, 128), (4, 896)),
    *_cases("forward", (8, 128), dtype="float32"),
    *_cases("add", (4, 512)),
    *_cases("backward", (16, 256)),
    Case("forward", 32, 64, heads=4),
)

QUICK = (
    *_cases("forward", (1, 4096), (64, 4096), (4096, 4096), (16384, 4096), (16384, 896), (4096, 16384), (65536, 128)),
    *_cases("forward", (4096, 4096), dtype="float32"),
    *_cases("add", (64, 4096), (16384, 4096)),
    *_cases("backward", (4096, 4096), (16384, 4096), (65536, 128)),
    Case("forward", 131072, 128, heads=32),
)

README = (  # the table in docs/performance.md, from a run's file
    *_cases("forward", *((rows, 4096) for rows in (1, 64, 256, 4096, 16384))),
    *_cases("forward", *((16384, n) for n in (896, 1536, 2560, 5120, 7168, 8192, 16384))),
    *_cases("forward", (65536, 128), (MANY_ROWS, 128), *((1024, n) for n in LONG)),
    *_cases("forward", (16384, 4096), (MANY_ROWS, 128), dtype="float32"),
    Case("forward", 131072, 128, heads=32),
    *_cases("add", (64, 4096), (16384, 4096), (16384, 8192), (MANY_ROWS, 128)),
    *_cases("backward", *((16384, n) for n in (896, 2048, 4096, 5120, 8192, 16384))),
    *_cases("backward", (65536, 128), (MANY_ROWS, 128), (65536, 512)),
    *_cases("backward", (4096, 4096), dtype="float32"),
)

FULL = tuple(
    dict.fromkeys(
        (
            *QUICK,
            *README,
            # Every width with many rows, then with few: what training and decoding see.
            *_within(Case("forward", 16384, n) for n in HIDDEN),
            *_cases("forward", *itertools.product((1, 8, 64, 256), (896, 2880, 4096, 7168, 8192, 16384))),
            *_cases("forward", *((rows, 4096) for rows in ROWS)),
            *_cases("forward", *itertools.product((1024, 65536, MANY_ROWS), HEAD_SIZES)),
            *_cases("forward", *itertools.product((1, 64, 1024), LONG)),
            *_cases("add", *itertools.product((1, 64, 4096), (4096, 8192)), (16384, 896), (16384, 2880), (16384, 7168)),
            *_cases("add", (16384, 8192), (4096, 16384), (MANY_ROWS, 128)),
            *_cases("backward", *((16384, n) for n in (896, 1000, 1536, 2048, 2880, 5120, 7168, 8192, 16384))),
            *_cases("backward", (256, 4096), (4096, 16384), (65536, 512), *((1024, n) for n in LONG)),
            *_cases("backward", *((MANY_ROWS, n) for n in HEAD_SIZES)),
            *(
                Case("forward", tokens * heads, n, heads=heads)
                for tokens, heads, n in (
                    (64, 32, 128),
                    (64, 8, 128),
                    (4096, 8, 128),
                    (4096, 128, 128),
                    (4096, 14, 64),
                    (4096, 16, 256),
                )
            ),
            *_cases("forward", (64, 4096), (16384, 4096), (MANY_ROWS, 128), dtype="float16"),
            *_cases("backward", (16384, 4096), dtype="float16"),
            *_cases("forward", (64, 4096), (16384, 4096), (4096, 16384), (MANY_ROWS, 128), dtype="float32"),
            *_cases("add", (4096, 4096), dtype="float32"),
            *_cases("backward", (4096, 4096), (MANY_ROWS, 128), dtype="float32"),
        )
    )
)

SUITES = {"smoke": SMOKE, "quick": QUICK, "full": FULL}

ACCURACY = (64, 128, 896, 2048, 4096, 5120, 8192, 16384)
ACCURACY_ELEMENTS = (
    10_000_000  # a rstd that is one ULP off changes 0.01 % of the outputs of its row: fewer elements see nothing
)
