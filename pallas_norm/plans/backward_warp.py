"""The plans of the backward pass for rows in warps that no bulk copy brings: short ones in registers, longer ones read
twice."""

from __future__ import annotations

import dataclasses

from .hardware import SMS, WARPS
from .plan import BackwardPlan, Choice, Regime, Source
from .vectors import Narrower, lanes_of, warp_vector

LONGEST_SHORT = 256  # in registers
LONGEST_IN_WARPS = 1023
MOST_ELEMENTS = 24  # of a lane: n = 200 and 896 spilled with 56


@dataclasses.dataclass(frozen=True, kw_only=True)
class Short:
    """Programs of an SM where a lane has up to so many elements, of all its rows."""

    largest: int
    programs: tuple[int, int, int, int]  # where a column of x, dy and ds has up to 4, 6, 8 and 12 bytes


# As many as an SM has registers for at once; the others would run in a second wave. Of 80 elements, of which 3 fit,
# 128 MB took 113 us with 6 and 128 with 4; of 96 elements, of which 5 fit, 111 with 4 and 126 with 6.
SHORT = (
    Short(largest=8, programs=(7, 5, 5, 4)),
    Short(largest=12, programs=(5, 4, 4, 3)),
    Short(largest=16, programs=(4, 3, 3, 2)),
    Short(largest=20, programs=(3, 3, 2, 2)),
    Short(largest=MOST_ELEMENTS, programs=(3, 2, 2, 2)),
)
# Elements of a lane that has vectors of half the width, and half of the elements, so that twice as many lanes have the
# same columns: the bits are the same. 64 MB of 80 elements took 64.3 us with 20 in each of 4 lanes, and 57.9 with 10 in
# 8; 4096 rows 4.45 and 3.55. 72, 144, 160, and 80 and 160 in float32 gain too, most with few rows
# (bench/results/kept_order_h200_2026-11-28.json, kept_order_2). Of 24 elements the half is too many for the registers
# of four programs where dy is float32.
HALVED = range(17, 21)
# Elements that are read one by one take more registers: n = 127 88, n = 128 72; four are what all but the longest of
# these have registers for.
ODD_PER_SM = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a group of lanes at a time, where one gives a lane up to so many elements."""

    largest: int
    widest: int = 8  # elements of a vector
    rows: int
    most_programs: int = 7  # of an SM
    why: str
    figures: tuple[int, ...]


ROWS = (
    Rows(largest=8, widest=4, rows=2, why="65536 x 128: 19.1 us, with one row 21.3, with four 24.2", figures=(2, 3)),
    # 131072 x 256 takes 57.8 us with two rows, and 55.2 with one and six programs; with seven, for which there are no
    # registers, 67.5. From a pipeline of three stages 53.2, but 4096 rows 5.3 where they take 4.8 (kept_order_h200).
    Rows(largest=MOST_ELEMENTS, rows=1, most_programs=6, why="one row is enough to be read at a time", figures=()),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RereadInWarps:
    """Rows that are too long to be short ones, and that no bulk copy moves."""

    largest_n: int
    per_sm: int  # programs for which an SM has registers
    why: str
    figures: tuple[int, ...]


REREAD_IN_WARPS = (
    RereadInWarps(
        largest_n=640,
        per_sm=4,
        why="65536 x 512: 57.6 us, kept in registers 58.6, and then n = 1000 spills",
        figures=(3,),
    ),
    RereadInWarps(largest_n=LONGEST_IN_WARPS, per_sm=3, why="registers for three programs", figures=()),
)

NARROWER = (
    Narrower(
        itemsize=2,
        largest_n=224,
        vector_bytes=8,
        why="64 MB of 96 elements 59.9 us, with 16 bytes 77.1; of 160 68.9, 82.7; 4096 x 128: 4.6, 5.3. Of 256 "
        "elements 59.1, 54.4",
        figures=(12, 13),
    ),
)


def _per_sm(elements: int, column_bytes: int) -> int:
    row = next(row for row in SHORT if elements <= row.largest)
    return row.programs[next(at for at, most in enumerate((4, 6, 8, 12)) if column_bytes <= most)]


def in_warps(n: int, itemsize: int, column_bytes: int) -> Choice:
    vec = warp_vector(n, itemsize, NARROWER)

    def elements(lanes: int) -> int:
        return -(-n // (lanes * vec)) * vec

    lanes = lanes_of(n, vec)
    while lanes < 32 and elements(lanes) > MOST_ELEMENTS:
        lanes *= 2
    if n <= LONGEST_SHORT and vec >= 4 and elements(lanes) in HALVED:
        vec, lanes = vec // 2, lanes * 2
    block = WARPS * (32 // lanes)
    if n <= LONGEST_SHORT:
        row = next(row for row in ROWS if elements(lanes) <= row.largest and vec <= row.widest)
        per_sm = ODD_PER_SM if vec == 1 else _per_sm(row.rows * elements(lanes), column_bytes)
        programs = min(per_sm, row.most_programs) * SMS
        plan = BackwardPlan(n, Regime.WARP, vec, lanes, block * row.rows, programs=programs)
        return Choice(plan, f"in registers; {row.why}", row.figures)
    row = next(row for row in REREAD_IN_WARPS if n <= row.largest_n)
    programs = row.per_sm * SMS
    plan = BackwardPlan(n, Regime.WARP, vec, lanes, block, source=Source.MEMORY, keeps_weight=False, programs=programs)
    return Choice(plan, f"read twice; {row.why}", row.figures)
