"""The README's figures are those of the committed result files."""

from __future__ import annotations

import itertools

from bench import readme, results
from bench.suite import ACCURACY


def test_the_readme_shows_the_committed_results() -> None:
    text = readme.README.read_text()
    assert readme.rendered(text) == text


def test_every_result_file_names_its_device_its_versions_and_its_commit() -> None:
    for name in ("times", "accuracy", "training"):
        file = results.read(name)
        assert file["device"]
        assert file["commit"]
        assert file["versions"]["jax"]
        assert file["rows"]


def test_the_kernels_differ_from_the_replay_in_no_output() -> None:
    rows = [row for row in results.read("accuracy")["rows"] if row["provider"] == "pallas-norm"]
    assert {(row["dtype"], row["n"]) for row in rows} >= set(itertools.product(("bfloat16", "float16"), ACCURACY))
    assert all(row["differ_from_replay"] == 0 for row in rows)
