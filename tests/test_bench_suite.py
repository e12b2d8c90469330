"""The cases and the candidates of tuning: data that has to hold together."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from bench import __main__, candidates, copy_kernel, record, suite, timing, tune
from bench.suite import Case
from pallas_norm import reference
from pallas_norm.plans.hardware import SMS
from pallas_norm.regimes import backward_plan_for, plan_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("implicit_promotion_throughout")]

GB = 1 << 30


def test_suites_are_parts_of_the_product() -> None:
    product = set(suite.product())
    assert set(suite.FULL) <= product
    assert set(suite.README) <= set(suite.FULL)
    assert suite.FULL[: len(suite.QUICK)] == suite.QUICK  # first, should time run out
    assert all(case.bytes <= suite.LARGEST_BYTES for case in product)
    for cases in (*suite.SUITES.values(), suite.README):
        assert len({case.label for case in cases}) == len(cases)


def test_the_full_suite_has_every_model_width_operation_and_dtype() -> None:
    assert {*suite.HIDDEN, *suite.HEAD_SIZES, *suite.LONG} <= {case.n for case in suite.FULL}
    assert {case.operation for case in suite.FULL} == set(suite.PASSES)
    assert {case.dtype for case in suite.FULL} == set(suite.ITEMSIZE)
    assert {1, 8, 64, 256, 1024, 4096, 16384, 65536, suite.MANY_ROWS} <= {case.rows for case in suite.FULL}
    assert any(case.heads for case in suite.FULL)
    assert sum(case.bytes for case in suite.FULL) < 64 * GB


def test_a_case_counts_the_rows_that_it_reads_and_writes() -> None:
    assert Case("forward", 4, 128).bytes == 2 * 4 * 128 * 2
    assert Case("add", 4, 128, "float32").bytes == 4 * 4 * 128 * 4
    assert Case("backward", 4, 128).bytes == 3 * 4 * 128 * 2
    assert Case("forward", 8, 64, heads=4).label == "forward 8 x 64 bfloat16 q slice of 4 heads"
    assert all(case.rows % case.heads == 0 for case in suite.FULL if case.heads)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("n", [64, 80, 128, 896, 1000, 4096, 16384, 131072])
def test_candidates_begin_with_the_plan_in_use_and_cover_the_row(n: int, dtype: str) -> None:
    for operation, find in (("forward", plan_for), ("backward", backward_plan_for)):
        plans = candidates.CANDIDATES[operation](n, dtype)
        assert next(iter(plans.values())) == find(n, dtype)
        assert len(set(plans.values())) == len(plans) <= 128
        for plan in plans.values():
            assert plan.span <= n
            assert plan.chunks * plan.workers * plan.span >= n
            assert n % plan.vec == 0
            assert plan.order == find(n, dtype).order  # or the bits would be others


@pytest.mark.parametrize(
    ("operation", "n"), [("forward", 128), ("forward", 16384), ("backward", 128), ("backward", 4096)]
)
def test_candidates_lower_for_cuda(operation: str, n: int) -> None:
    plans = list(candidates.CANDIDATES[operation](n, "bfloat16").values())
    for plan in plans[:: max(1, len(plans) // 5)]:
        assert tune.lowers(operation, plan, "bfloat16") is None


def test_a_plan_that_does_not_lower_is_told_with_its_reason() -> None:
    beyond_the_row = dataclasses.replace(plan_for(128, "bfloat16"), vec=64)
    assert tune.lowers("forward", beyond_the_row, "bfloat16") is not None


@pytest.mark.parametrize(("rows", "n", "inputs", "outputs"), [(1, 896, 1, 1), (3, 1000, 2, 2), (4096, 4096, 2, 1)])
def test_the_copy_kernel_lowers_for_every_size_that_is_padded_to_its_granule(
    rows: int, n: int, inputs: int, outputs: int
) -> None:
    granule = copy_kernel.granule("bfloat16")
    array = jax.ShapeDtypeStruct((-(-rows * n // granule) * granule,), "bfloat16")
    traced = jax.jit(functools.partial(copy_kernel.copy, outputs=outputs)).trace([array] * inputs)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(ValueError, match=r"^1000 elements; needed a multiple of 1024: pad the arrays$"):
        copy_kernel.copy([jnp.zeros(1000, "bfloat16")], 1)


def test_the_residual_form_is_not_tuned_by_itself() -> None:
    found = tune.subjects("full", operation="forward", widths=[128, 4096])
    assert ("forward", 4096, "bfloat16") in found
    assert {(operation, n) for operation, n, _ in found} == {("forward", 128), ("forward", 4096)}
    assert len(set(found)) == len(found)


class Trial:
    """Of times alone."""

    def __init__(self, rows: int, **times: float) -> None:
        self.case = Case("forward", rows, 128)
        self.rows: dict[str, Any] = {name: {"median_us": time, "spread_us": 0.1} for name, time in times.items()}


@pytest.mark.parametrize(
    ("many", "few", "best", "wins"),
    [
        ({"old": 10.0, "new": 9.0}, {"old": 2.0, "new": 2.0}, "new", True),
        ({"old": 10.0, "new": 9.9}, {"old": 2.0, "new": 1.0}, "new", False),  # within the spreads
        ({"old": 10.0, "new": 9.0}, {"old": 2.0, "new": 2.5}, "new", False),  # loses with few rows
        ({"old": 9.0, "new": 10.0}, {"old": 2.0, "new": 1.0}, "old", False),
    ],
)
def test_a_candidate_wins_beyond_the_spread_with_many_rows_and_loses_nothing_with_few(
    many: dict[str, float], few: dict[str, float], best: str, *, wins: bool
) -> None:
    plan = plan_for(128, "bfloat16")
    trials: Any = [Trial(1000, copy=8, **many), Trial(8, copy=1, **few)]
    line = tune.verdict(("forward", 128, "bfloat16"), "old", {"old": plan, "new": plan}, ["old", "new"], trials)
    assert (line["best"], line["wins"]) == (best, wins)
    assert line["us_1000"]["copy"] == 8
    assert "forward 128 bfloat16" in tune.table([line])


def test_tuning_keeps_every_sample_and_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver, with XLA in place of the kernels and wall time in place of theirs."""

    def reference_program(operation: str, plan: Any) -> Any:
        if plan.block == 16:
            return lambda operands: 1 / 0
        scale = 2.0 if (plan.block, plan.vec) == (4, 4) or plan.programs == 4 * SMS else 1.0  # a wrong kernel
        if operation == "forward":
            return lambda o: {"y": reference.forward(o["x"], o["weight"])[0] * scale}
        return lambda o: dict(
            zip(("dx", "dweight"), reference.backward(o["x"], o["weight"], o["rstd"], o["dy"]), strict=True)
        )

    def wall(variants: Any, *, repetitions: int, flush: Any) -> Any:
        return timing.measure_wall(variants, repetitions=repetitions)

    monkeypatch.setattr(tune, "program", reference_program)
    monkeypatch.setattr(tune, "on_gpu", lambda: True)
    monkeypatch.setattr(tune, "LARGE_BYTES", 1 << 15)
    monkeypatch.setattr(timing, "Flush", lambda: None)
    monkeypatch.setattr(timing, "measure", wall)
    monkeypatch.setitem(tune.BASELINES, "copy", lambda operands: lambda: operands.arrays["x"] + 0)
    plans = candidates.CANDIDATES
    shortened = {
        name: lambda n, dtype, every=every: dict(list(every(n, dtype).items())[:9]) for name, every in plans.items()
    }
    monkeypatch.setattr(candidates, "CANDIDATES", shortened)
    found, out = tune.subjects("quick", widths=[128], dtype="bfloat16"), tmp_path / "tune.json"
    assert tune.run(found[:1], out, commit="c0ffee", time_limit_s=None) == 0
    assert tune.run(found, out, commit="c0ffee", time_limit_s=None) == 0  # continues
    file = record.read(out)
    assert {row["key"] for row in file["rows"]} == {"forward 128 bfloat16", "backward 128 bfloat16"}
    assert len(file["candidates"]) == 2
    reasons = {row["reason"] for row in file["rows"] if row["status"] == "failed"}
    assert any("ZeroDivisionError" in reason for reason in reasons)
    assert any("outputs are far from the reference" in reason for reason in reasons)
    finals = [row for row in record.measured(file) if row["repetitions"] == tune.FINAL]
    assert all(len(row["samples_us"]) == tune.FINAL for row in finals)
    assert any(row["plan"]["regime"] == "warp" for row in finals if "plan" in row)


def test_tune_without_a_gpu_lists_and_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["tune", "--list", "--suite", "full", "--n", "128", "--operation", "forward"]) == 0
    assert f"in use {candidates.label(plan_for(128, 'bfloat16'))}" in capsys.readouterr().out
    assert __main__.main(["tune", "--list", "--n", "123"]) == 2
    assert "the suite quick has no such rows" in capsys.readouterr().err
    if jax.default_backend() != "gpu":
        assert __main__.main(["tune"]) == 2
        assert "this process has no CUDA device; --list and --lower need none" in capsys.readouterr().err
