"""python -m bench tune: the candidates of every row length, against the copy kernel and the plan in use.

First every candidate with few repetitions, in groups that each have the copy kernel and the plan in use; then the best
ones with more. Each is judged with many rows and with few. A candidate wins where it beats the plan in use by more
than both spreads with many rows, and loses to it by no more than the spreads with few: the choice of a plan may not
depend on the rows.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_norm import reference
from pallas_norm._spec import Spec
from pallas_norm.kernels import backward as backward_kernel
from pallas_norm.kernels import forward as forward_kernel
from pallas_norm.plans.plan import Plan

from . import candidates, record, rounding, timing
from .baselines import BASELINES, COPY
from .calls import failure
from .operands import EPS, Operands, on_gpu
from .progress import Progress
from .suite import ITEMSIZE, SUITES, Case
from .table import columns

LARGE_BYTES = 128 << 20  # of x
FEW_ROWS = {"forward": 64, "backward": 4096}
GROUP, FINALISTS = 12, 5
SCREENING, FINAL = 5, 25  # repetitions

Subject = tuple[str, int, str]  # operation, n, dtype


def subjects(
    suite: str, *, operation: str | None = None, widths: Sequence[int] | None = None, dtype: str | None = None
) -> list[Subject]:
    """The rows of a suite whose plans can be tuned; the residual form shares the plan of the forward pass."""
    found = dict.fromkeys((case.operation, case.n, case.dtype) for case in SUITES[suite] if case.operation != "add")
    return [
        (name, n, kind)
        for name, n, kind in found
        if operation in (None, name) and (widths is None or n in widths) and dtype in (None, kind)
    ]


def program(operation: str, plan: Any) -> Callable[..., Any]:
    """operands -> outputs, by this plan."""
    spec = Spec(eps=EPS)
    if operation == "forward":
        return lambda operands: forward_kernel.forward(operands, plan=plan, spec=spec, with_rstd=False, interpret=False)
    return lambda operands: backward_kernel.backward(operands, plan=plan, spec=spec, with_dweight=True, interpret=False)


def _rows(subject: Subject) -> tuple[int, ...]:
    operation, n, dtype = subject
    many = LARGE_BYTES // (n * ITEMSIZE[dtype])
    return many, min(FEW_ROWS[operation], many // 2)


def _key(subject: Subject) -> str:
    return " ".join(map(str, subject))


def structs(operation: str, n: int, dtype: str, rows: int = 37) -> dict[str, jax.ShapeDtypeStruct]:
    row, one = jax.ShapeDtypeStruct((rows, n), dtype), jax.ShapeDtypeStruct((n,), dtype)
    if operation == "forward":
        return {"x": row, "weight": one}
    return {"x": row, "weight": one, "rstd": jax.ShapeDtypeStruct((rows,), "float32"), "dy": row}


def lowers(operation: str, plan: Plan, dtype: str) -> str | None:
    """Why this plan does not become a CUDA kernel, or None. Needs no GPU; registers and shared memory are not
    checked."""
    try:
        traced = jax.jit(program(operation, plan)).trace(structs(operation, plan.n, dtype))
        traced.lower(lowering_platforms=("cuda",))
    except Exception as error:
        return failure(error)
    return None


def show(found: Sequence[Subject], *, lower: bool) -> int:
    """The candidates, and on request whether each lowers; how many do not."""
    bad = total = 0
    for operation, n, dtype in found:
        plans = candidates.CANDIDATES[operation](n, dtype)
        print(f"{operation} {n} {dtype}: {len(plans)} candidates, in use {next(iter(plans))}")
        total += len(plans)
        for name, plan in plans.items():
            reason = lowers(operation, plan, dtype) if lower else None
            bad += reason is not None
            print(f"    {name}{f'  does not lower: {reason}' if reason else ''}", flush=True)
    print(f"{total} candidates" + (f", {bad} do not lower for CUDA" if lower else ""))
    return bad


class Trial:
    """One subject with one row count: its operands, and what each plan gave."""

    def __init__(self, subject: Subject, rows: int, flush: timing.Flush) -> None:
        self.operation, self.n, self.dtype = subject
        self.case = Case(self.operation, rows, self.n, self.dtype)
        self.flush, self.operands = flush, Operands(self.case)
        self.inputs = dict(self.operands.arrays)
        if self.operation == "backward":
            self.inputs["rstd"] = _rstd(self.inputs["x"])
        self.copy = BASELINES[COPY](self.operands)
        self.calls: dict[str, Callable[[], Any]] = {}
        self.rows: dict[str, dict[str, Any]] = {}

    def build(self, name: str, plan: Plan) -> None:
        """Compiled, and its result compared with the reference."""
        row = self.rows[name] = {"plan": as_data(plan), "status": "measured"}
        try:
            run = jax.jit(program(self.operation, plan))
            rounding.poison(self.operands, torch=False)
            found = run(self.inputs)
            result = (found["dx"], found["dweight"]) if self.operation == "backward" else found["y"]
            outputs = rounding.outputs_of(self.operands, result)
            if wrong := rounding.wrong_outputs(self.operands, outputs):
                row |= {"status": "failed", "reason": f"{wrong} outputs are far from the reference"}
                return
            self.calls[name] = lambda: run(self.inputs)
        except Exception as error:
            row |= {"status": "failed", "reason": failure(error)}

    def time(self, names: Sequence[str], repetitions: int) -> None:
        variants = {COPY: self.copy, **{name: self.calls[name] for name in names if name in self.calls}}
        for name, found in timing.measure(variants, repetitions=repetitions, flush=self.flush).items():
            self.rows.setdefault(name, {"status": "measured"}).update(found.row(), repetitions=repetitions)

    def best(self, count: int) -> list[str]:
        timed = [name for name, row in self.rows.items() if name != COPY and "median_us" in row]
        return sorted(timed, key=lambda name: self.rows[name]["median_us"])[:count]

    def record(self, key: str) -> list[dict[str, Any]]:
        common = {**dataclasses.asdict(self.case), "bytes": self.case.bytes}
        return [
            {"key": key, "provider": f"{name} @ {self.case.rows}", **common, **row} for name, row in self.rows.items()
        ]


@jax.jit
def _rstd(x: jax.Array) -> jax.Array:
    return reference.forward(x, eps=EPS)[1]


def as_data(plan: Plan) -> dict[str, Any]:
    return {
        name: value.value if isinstance(value, enum.Enum) else value for name, value in dataclasses.asdict(plan).items()
    }


def tune_one(subject: Subject, flush: timing.Flush) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(rows of the record, line of the candidate table)."""
    operation, n, dtype = subject
    plans: Mapping[str, Plan] = candidates.CANDIDATES[operation](n, dtype)
    in_use = next(iter(plans))
    trials = [Trial(subject, rows, flush) for rows in _rows(subject)]
    many = trials[0]
    for name, plan in plans.items():
        many.build(name, plan)
    others = [name for name in plans if name != in_use]
    for start in range(0, max(1, len(others)), GROUP):
        many.time([in_use, *others[start : start + GROUP]], SCREENING)
    finalists = list(dict.fromkeys([in_use, *many.best(FINALISTS)]))
    for trial in trials:
        if trial is not many:
            for name in finalists:
                trial.build(name, plans[name])
        trial.time(finalists, FINAL)
    rows = [row for trial in trials for row in trial.record(_key(subject))]
    return rows, verdict(subject, in_use, plans, finalists, trials)


def verdict(
    subject: Subject, in_use: str, plans: Mapping[str, Plan], finalists: Sequence[str], trials: Sequence[Trial]
) -> dict[str, Any]:
    """The best finalist beside the plan in use, and whether it wins."""
    many, few = (trial.rows for trial in trials)
    shared = [name for name in finalists if "median_us" in many.get(name, {}) and "median_us" in few.get(name, {})]
    operation, n, dtype = subject
    line: dict[str, Any] = {"operation": operation, "n": n, "dtype": dtype, "in_use": in_use, "wins": False}
    if in_use not in shared:
        return line | {"best": None, "why": f"the plan in use was not measured: {many[in_use].get('reason')}"}
    best = min(shared, key=lambda name: many[name]["median_us"])

    def gain(rows: Mapping[str, Any]) -> tuple[float, float]:
        old, new = rows[in_use], rows[best]
        return old["median_us"] - new["median_us"], old["spread_us"] + new["spread_us"]

    (large, large_spread), (small, small_spread) = gain(many), gain(few)
    line |= {"best": best, "plan": as_data(plans[best]), "wins": large > large_spread and small > -small_spread}
    for trial, rows in zip(trials, (many, few), strict=True):
        line[f"us_{trial.case.rows}"] = {name: rows[name]["median_us"] for name in (COPY, in_use, best)}
    return line


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    shown = [["subject", "in use", "best", "copy / in use / best, us", "", "wins"]]
    for line in lines:
        times = [
            " / ".join(f"{value:.2f}" for value in found.values()) for name, found in line.items() if name[:3] == "us_"
        ]
        subject = f"{line['operation']} {line['n']} {line['dtype']}"
        wins = "yes" if line["wins"] else line.get("why", "no")
        shown.append([subject, line["in_use"], str(line["best"]), *[*times, "", ""][:2], wins])
    return columns(shown)


def run(found: Sequence[Subject], out: Path, *, commit: str | None, time_limit_s: float | None) -> int:
    if not on_gpu():
        raise RuntimeError("tune measures kernels, and this process has no CUDA device; --list and --lower need none")
    began, longest_s = time.monotonic(), 0.0
    options = {"screening": SCREENING, "final": FINAL, "large_bytes": LARGE_BYTES}
    file = record.begin(out, "tune", record.DEVICE_TIME, options, commit)
    file.setdefault("candidates", [])
    left = [subject for subject in found if _key(subject) not in record.done(file)]
    flush, progress = timing.Flush(), Progress(len(left))
    while left and (time_limit_s is None or time.monotonic() - began + longest_s <= time_limit_s):
        start = time.monotonic()
        progress.starts(_key(left[0]))
        rows, line = tune_one(left[0], flush)
        record.replace_rows(file, _key(left[0]), rows)
        file["candidates"].append(line)
        progress.step(_key(left.pop(0)))
        file["left"] = [_key(subject) for subject in left]
        record.write(out, file)
        longest_s = max(longest_s, time.monotonic() - start)
    progress.close()
    print(table(file["candidates"]))
    if left:
        print(f"{len(left)} are left (time limit): the same command with --out {out} continues")
    print(f"wrote {out}")
    return 0
