"""The README's figures are those of the committed result files."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from bench import readme, results
from bench.suite import ACCURACY, ACCURACY_ELEMENTS


def test_the_readme_shows_the_committed_results() -> None:
    text = readme.README.read_text()
    assert readme.rendered(text) == text


def test_every_result_file_names_its_device_its_versions_and_its_commit() -> None:
    for name in ("run", "overhead_h200", "accuracy", "parity", "model", "training", "counters"):
        file = results.read(name)
        assert file["device"]
        assert file["commit"]
        assert file["versions"]["jax"]
        assert file["rows"]


DTYPES = ("bfloat16", "float16", "float32")
PROVIDERS = ("pallas-norm", "XLA", "HF eager", "F.rms_norm")


def accuracy() -> dict[tuple[str, int, str], dict[str, Any]]:
    return {(row["dtype"], row["n"], row["provider"]): row for row in results.read("accuracy")["rows"]}


def test_accuracy_was_measured_of_every_dtype_at_eight_widths_over_enough_outputs() -> None:
    rows = accuracy()
    assert len(ACCURACY) == 8
    missing = sorted(set(itertools.product(DTYPES, ACCURACY, PROVIDERS)) - rows.keys())
    assert not missing, f"{len(missing)} of {len(DTYPES) * 8 * len(PROVIDERS)} measurements are missing: {missing[:3]}"
    assert all(row["elements"] >= ACCURACY_ELEMENTS for row in rows.values())


def test_the_kernels_differ_from_the_replay_in_no_output() -> None:
    rows = [row for row in accuracy().values() if row["provider"] == "pallas-norm"]
    assert {(row["dtype"], row["n"]) for row in rows} >= set(itertools.product(DTYPES, ACCURACY))
    assert all(row["differ_from_replay"] == 0 for row in rows)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernels_differ_from_exact_statistics_no_more_than_hugging_face_eager_does(dtype: str) -> None:
    """Both differ where a float32 sum of another order meets a rounding boundary: some hundreds of ten million outputs.
    Two such counts differ by chance, by five times the root of their sum at most."""
    rows = accuracy()
    for n in ACCURACY:
        ours, theirs = (rows[dtype, n, provider]["differ_from_exact"] for provider in ("pallas-norm", "HF eager"))
        assert ours <= theirs + 5 * math.sqrt(ours + theirs), n
        once = rows[dtype, n, "F.rms_norm"]["differ_from_exact"]
        assert once > 0.2 * rows[dtype, n, "F.rms_norm"]["elements"], "this comparison tells one rounding from two"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_kernels_are_not_biased(dtype: str) -> None:
    """A truncation moves half of all outputs by a unit. A rounding to nearest moves some up and as many down:
    of `count` moved ones the sum is within five times the root of `count`, times the largest distance."""
    rows = accuracy()
    for n in ACCURACY:
        row = rows[dtype, n, "pallas-norm"]
        assert row["max_ulp_from_exact"] <= 2
        moved = abs(row["mean_signed_ulp_from_exact"]) * row["elements"]
        assert moved <= 5 * math.sqrt(row["differ_from_exact"]) * max(1, row["max_ulp_from_exact"]), n
