"""Which kernels there are: one case for each distinct plan that the plan functions give, of any row length."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from bench.suite import WIDTHS
from pallas_norm.kernels import dweight_sum
from pallas_norm.plans import few_rows, vectors
from pallas_norm.plans.hardware import H200
from pallas_norm.plans.vectors import vector
from pallas_norm.regimes import backward_plan_for, plan_for
from tests.oracle import DTYPES

# Those of the suite, and odd ones beyond them, whose narrow vectors take plans of their own.
ALL_WIDTHS = tuple(sorted({*WIDTHS, *(row.largest_n - 1 for row in vectors.NARROW)}))
FIELDS = ("regime", "source", "rows_in_registers", "vec", "warpgroups", "cluster")


def kind_of_plan(plan: Any) -> tuple[Any, ...]:
    """What makes two plans two kernels: who owns what, where the second pass reads, and whether chunks overlap."""
    return *(getattr(plan, field, None) for field in FIELDS), plan.overlap > 0


@dataclasses.dataclass(frozen=True)
class Forward:
    n: int
    dtype: str
    residual: bool
    weight: bool = True
    few: bool = False  # the schedule for few rows

    @property
    def _schedules(self) -> tuple[Any, tuple[int, Any] | None]:
        many = plan_for(self.n, DTYPES[self.dtype], residual=self.residual)
        return many, few_rows.of(many, DTYPES[self.dtype].itemsize, H200)

    @property
    def most_few(self) -> int:
        """Rows that have a schedule of their own; 0 where none have."""
        _, few = self._schedules
        return 0 if few is None else few[0]

    @property
    def plan(self) -> Any:
        many, few = self._schedules
        return few[1] if self.few and few is not None else many

    def __str__(self) -> str:
        options = (" residual" * self.residual, "" if self.weight else " no weight", " few rows" * self.few)
        return f"forward {self.n} {self.dtype}{''.join(options)}"


@dataclasses.dataclass(frozen=True)
class Backward:
    n: int
    dtype: str
    dy_dtype: str
    residual: bool
    weight: bool = True
    dweight: bool = True

    @property
    def plan(self) -> Any:
        return backward_plan_for(self.n, DTYPES[self.dtype], dy_dtype=DTYPES[self.dy_dtype], residual=self.residual)

    def __str__(self) -> str:
        options = (" ds" * self.residual, "" if self.weight else " no weight", "" if self.dweight else " no dweight")
        return f"backward {self.n} {self.dtype} dy {self.dy_dtype}{''.join(options)}"


@dataclasses.dataclass(frozen=True)
class ColumnSum:
    n: int
    dtype: str

    @property
    def kind(self) -> tuple[Any, ...]:
        shape, vec = next(shape for shape in dweight_sum.SHAPES if self.n <= shape.largest_n), vector(self.n, 4)
        columns = min(shape.columns, 32 * vec)
        return columns, shape.ahead, vec, self.n % columns > 0

    def __str__(self) -> str:
        return f"column sum {self.n} {self.dtype}"


def every_forward() -> Iterator[Forward]:
    """Every width, dtype, form and schedule."""
    for residual, n, dtype in itertools.product((False, True), ALL_WIDTHS, ("bf16", "f32")):
        case = Forward(n, dtype, residual)
        yield case
        if case.most_few:
            yield dataclasses.replace(case, few=True)


def every_backward() -> Iterator[Backward]:
    dtypes = (("bf16", "bf16"), ("f32", "f32"), ("bf16", "f32"))  # of x; of dy, wider where the weight is
    for residual, n, (dtype, dy_dtype) in itertools.product((False, True), ALL_WIDTHS, dtypes):
        yield Backward(n, dtype, dy_dtype, residual)


def _first_of_each(cases: Iterable[Any], kind: Callable[[Any], Any]) -> list[Any]:
    found: dict[Any, Any] = {}
    for case in cases:
        found.setdefault(kind(case), case)
    return list(found.values())


def _varied(cases: list[Any], **options: tuple[bool, ...]) -> list[Any]:
    """With every combination of the options in turn, within each regime."""
    turns: dict[Any, Any] = {}
    combinations = [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]
    varied = []
    for case in cases:
        turn = turns.setdefault(case.plan.regime, itertools.cycle(combinations))
        varied.append(dataclasses.replace(case, **next(turn)))
    return varied


def _with(cases: Iterator[Any]) -> list[Any]:
    """One of each distinct plan, and of the residual form one for each way to read and to share a row."""
    every = list(cases)
    plain = _first_of_each(every, lambda case: kind_of_plan(case.plan))
    residual = [case for case in every if case.residual]
    ways = _first_of_each(residual, lambda case: (case.plan.regime, case.plan.source, case.plan.workers > 1))
    return list(dict.fromkeys([*plain, *ways]))


def forwards() -> list[Forward]:
    """With and without weight in each regime."""
    return _varied(_with(every_forward()), weight=(True, False))


def at_places() -> list[Forward]:
    """For strided rows and in place: one for each way to read and to share a row, of many rows."""

    def way(case: Forward) -> Any:
        return case.plan.regime, case.plan.source, case.plan.workers > 1, case.plan.overlap > 0

    return _first_of_each((case for case in every_forward() if not case.residual and not case.few), way)


def backwards() -> list[Backward]:
    """With and without weight and dweight in each regime."""
    return _varied(_with(every_backward()), weight=(True, False), dweight=(True, False))


def column_sums() -> list[ColumnSum]:
    found = _first_of_each((ColumnSum(n, "bf16") for n in ALL_WIDTHS), lambda case: case.kind)
    return [dataclasses.replace(case, dtype=dtype) for case, dtype in zip(found, itertools.cycle(("bf16", "f32")))]
