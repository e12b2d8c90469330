"""`python -m pallas_norm plans`, and that docs/plans.md is what it prints."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from pallas_norm import __main__ as program
from pallas_norm.plans import backward_staged, backward_warp, few_rows, forward, report
from pallas_norm.regimes import backward_plan_for, plan_for

ROOT = Path(__file__).parents[1]
ROWS = (
    *(*forward.TABLE, *forward.NARROWER, *few_rows.TABLE),
    *(*backward_staged.WARP_PIPELINES, *backward_staged.PIPELINES),
    *(*backward_warp.ROWS, *backward_warp.REREAD_IN_WARPS, *backward_warp.NARROWER),
)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert program.main(["plans", *words]) == 0
    return capsys.readouterr().out


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """Else: python -m pallas_norm plans > docs/plans.md."""
    assert (ROOT / "docs" / "plans.md").read_text() == printed(capsys)


def test_one_row_length_has_its_plans_and_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--n", "4096", "--dtype", "bfloat16")
    lines = [line for line in text.splitlines() if line.startswith("| 4096 ")]
    rows = forward.TABLE[1], few_rows.TABLE[2], backward_staged.PIPELINES[3]
    assert all(row.why in line for row, line in zip(rows, lines, strict=True))
    assert "264" in lines[2]


def test_a_row_length_without_a_kernel_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="no kernel for rows of 31 elements"):
        program.main(["plans", "--n", "31"])


@pytest.mark.parametrize("n", report.LENGTHS)
def test_the_page_has_the_plans_that_the_kernels_take(n: int) -> None:
    for residual, (dtype, itemsize) in itertools.product((False, True), report.DTYPES.items()):
        plans = (report.chosen(n, itemsize, residual=residual, backwards=backwards).plan for backwards in (False, True))
        assert tuple(plans) == (plan_for(n, dtype, residual=residual), backward_plan_for(n, dtype, residual=residual))


def test_every_row_names_files_that_are_there_or_gives_a_reason_without_figures() -> None:
    for row in ROWS:
        assert row.why
        for number in row.figures:
            assert (ROOT / "bench" / "results" / f"tuning_{number}.json").exists(), row
    assert sum(1 for row in ROWS if not row.figures) == 3  # not measured, or a bound of the hardware


def test_the_page_has_a_plan_of_each_row_of_the_tables() -> None:
    rows = (*forward.TABLE, *few_rows.TABLE, *backward_staged.PIPELINES, *backward_staged.WARP_PIPELINES)
    text = (ROOT / "docs" / "plans.md").read_text()
    assert [row.why for row in rows if row.why not in text] == []
