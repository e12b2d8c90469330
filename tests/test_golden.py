"""The specification's bits do not change by accident: digests in tests/data/golden_bits.txt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import computed, golden, golden_cases

ROOT = Path(__file__).parent.parent


def test_the_specification_in_numpy_has_the_recorded_bits() -> None:
    recorded = golden.recorded()
    assert list(recorded) == [str(case) for case in golden.CASES]
    different = [str(case) for case in golden.CASES if golden.specified_digests(case) != recorded[str(case)]]
    assert different == []


@pytest.mark.parametrize("case", golden.CASES, ids=str)
def test_xla_on_a_cpu_has_the_recorded_bits(case: golden_cases.Case) -> None:
    given, cpu = golden_cases.operands(case), jax.devices("cpu")[0]
    found, with_residual = (
        computed.results(given, golden_cases.EPS, residual=residual, implementation="xla", device=cpu)
        for residual in (False, True)
    )
    assert golden.digests(found, with_residual) == golden.recorded()[str(case)]


def test_the_command_names_a_case_whose_bits_changed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.golden"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(golden.CASES)} cases are as recorded\n"


def test_operands_are_ordinary_numbers_of_many_magnitudes() -> None:
    for dtype in golden_cases.DTYPES:
        given = golden_cases.operands(golden_cases.Case(1000, dtype))
        magnitude = np.log2(np.abs(given["x"].astype(np.float64)).max(axis=1))
        assert magnitude.min() < -1
        assert magnitude.max() > 5
        assert np.unique(given["dy"]).size > 1000
        assert np.unique(given["weight"]).size > 50
        assert all(np.isfinite(value.astype(np.float64)).all() for value in given.values())
