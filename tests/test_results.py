"""The figures of README.md and docs/ are those of the committed result files, and these are of one commit."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from bench import plot_style, readme, results, shown
from bench.suite import ACCURACY, ACCURACY_ELEMENTS

PICTURES = {"roofline": "run", "speedup": "run", "overhead": "overhead", "accuracy": "accuracy", "parity": "parity"}


@pytest.mark.parametrize("page", readme.PAGES)
def test_the_page_shows_the_committed_results(page: str) -> None:
    text = (readme.ROOT / page).read_text()
    assert readme.sections(text)
    assert readme.rendered(text) == text


def test_every_section_is_on_one_page() -> None:
    found = [section for page in readme.PAGES for section in readme.sections((readme.ROOT / page).read_text())]
    assert sorted(found) == sorted(readme.SECTIONS)


@pytest.mark.parametrize("picture", PICTURES)
def test_the_picture_is_of_the_file_that_the_tables_are_of(picture: str) -> None:
    text = (readme.ROOT / "docs" / f"{picture}.svg").read_text()
    assert plot_style.origin(shown.read(PICTURES[picture])) in text


def mixed(files: dict[str, dict[str, Any]]) -> str:
    """What keeps evidence from being of one commit and one device; empty for good evidence."""
    origins = {kind: (file["device"], file["commit"]) for kind, file in files.items()}
    return "" if len(set(origins.values())) <= 1 else f"docs show files of several commits or devices: {origins}"


def test_what_docs_show_is_of_one_commit_and_one_device() -> None:
    assert shown.evidence().keys() == set(shown.KINDS)
    assert mixed({kind: shown.read(kind) for kind in shown.KINDS}) == ""


def test_files_of_two_commits_are_noticed() -> None:
    one = {"device": "NVIDIA H200", "commit": "a"}
    assert mixed({"run": one, "parity": one}) == ""
    assert "several commits" in mixed({"run": one, "parity": one | {"commit": "b"}})
    assert "several commits" in mixed({"run": one, "parity": one | {"device": "NVIDIA H100 80GB HBM3"}})


def test_evidence_is_the_newest_file_with_the_name_of_evidence(tmp_path: Path) -> None:
    for name in (
        "run_h200_2026-12-01",
        "run_h100_2026-12-02",
        "run_h100",
        "tune_h200_2026-12-01",
        "model_h200_2026-12-01",
    ):
        (tmp_path / f"{name}.json").touch()
    found = {kind: path.name for kind, path in shown.evidence(tmp_path).items()}
    assert found == {"run": "run_h100_2026-12-02.json", "model": "model_h200_2026-12-01.json"}


def test_every_result_file_names_its_device_its_versions_and_its_commit() -> None:
    for file in (*map(shown.read, shown.KINDS), results.read("counters")):
        assert file["device"]
        assert file["commit"]
        assert file["versions"]["jax"]
        assert file["rows"]


DTYPES = ("bfloat16", "float16", "float32")
PROVIDERS = ("pallas-norm", "XLA", "HF eager", "F.rms_norm")


def accuracy() -> dict[tuple[str, int, str], dict[str, Any]]:
    return {(row["dtype"], row["n"], row["provider"]): row for row in shown.read("accuracy")["rows"]}


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
