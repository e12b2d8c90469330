"""The specification's bits do not change by accident: digests in tests/data/golden_bits.txt."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests import computed, golden, golden_cases


@pytest.mark.slow
def test_the_specification_in_numpy_has_the_recorded_bits() -> None:
    for record in (golden.SUITE, golden.DOCTOR):
        assert record.file.read_text().splitlines() == list(record.lines())


@pytest.mark.sampled(108)
@pytest.mark.parametrize("case", golden.CASES, ids=str)
def test_xla_on_a_cpu_has_the_recorded_bits(case: golden_cases.Case) -> None:
    given, cpu = golden_cases.operands(case), jax.devices("cpu")[0]
    found, with_residual = (
        computed.results(given, golden_cases.EPS, residual=residual, implementation="xla", device=cpu)
        for residual in (False, True)
    )
    assert golden.digests(found, with_residual) == golden.recorded()[str(case)]


def test_the_command_names_a_case_whose_bits_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["golden", *words])
        return golden.main(), capsys.readouterr().out

    files = [tmp_path / "suite.txt", tmp_path / "doctor.txt"]
    for name, file in zip(("SUITE", "DOCTOR"), files, strict=True):
        monkeypatch.setattr(golden, name, golden.Record(file, golden.CASES[:2], 1e-6))
    assert command("--write") == command() == (0, "4 cases are as recorded\n")
    text = files[1].read_text()
    files[1].write_text(text.replace("69 x 7 bfloat16: ", "69 x 7 bfloat16: 0"))
    right = text.splitlines()[2]
    assert command() == (1, f"{right.replace(': ', ': 0')}\n{right}\n")


def test_operands_are_ordinary_numbers_of_many_magnitudes() -> None:
    for dtype in golden_cases.DTYPES:
        given = golden_cases.operands(golden_cases.case(1000, dtype))
        magnitude = np.log2(np.abs(given["x"].astype(np.float64)).max(axis=1))
        assert magnitude.min() < -1
        assert magnitude.max() > 5
        assert np.unique(given["dy"]).size > 1000
        assert np.unique(given["weight"]).size > 50
        assert all(np.isfinite(value.astype(np.float64)).all() for value in given.values())
