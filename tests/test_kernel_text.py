"""scripts/kernel-text: the kernels are those recorded with this JAX, and a change of one shows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_norm.plans.lengths import LARGEST_N, SMALLEST_N
from tests import kernel_cases, kernel_lengths, kernel_record, rewrites

pytestmark = pytest.mark.skipif(
    not kernel_record.recorded().exists(),
    reason=f"tests/data has no record of the kernels with jax {jax.__version__} (scripts/kernel-text --write)",
)


def recorded() -> Iterator[Any]:
    """All cases take two processor hours: every push compares one in four, and the night the others."""
    cases = list(kernel_record.expected()) if kernel_record.recorded().exists() else []
    chosen = set(random.Random(0).sample(cases, -(-len(cases) // 4)))
    for case in cases:
        yield pytest.param(case, marks=() if case in chosen else pytest.mark.nightly)


@pytest.mark.sampled(376)
@pytest.mark.parametrize("case", list(recorded()), ids=str)
def test_a_kernel_has_the_text_that_was_recorded(case: kernel_cases.Case) -> None:
    assert list(kernel_record.differing([case], kernel_record.expected())) == []


def test_the_record_has_every_form() -> None:
    assert {case.form for case in kernel_record.expected()} == set(kernel_cases.FORMS)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ["mean over what is read", "backward: no projection", "left-over rows misplaced"])
def test_a_changed_kernel_is_seen(name: str) -> None:
    # An odd row, more of which is read than there is: where all of it is, the mean over what is read is the right one.
    ragged = (case for case in kernel_record.expected() if case.n > 1000 and case.n % 2)
    case = next(iter(kernel_record.expected())) if name.startswith("left") else next(ragged)
    with rewrites.rewritten(rewrites.SOURCE[name]):
        assert [found for found, _ in kernel_record.differing([case], kernel_record.expected())] == [case]


@pytest.mark.slow
def test_cases_are_one_row_length_of_each_plan() -> None:
    """Any row length has the plans of one that is a case."""
    form = kernel_cases.FORMS["gradients"]
    chosen = kernel_lengths.of(form.planned, "bfloat16", form.told_apart)

    def numbers(n: int) -> set[tuple[Any, ...]]:
        return {(place, *form.told_apart(plan)) for place, plan in enumerate(form.planned(n, "bfloat16"))}

    known = set().union(*map(numbers, chosen))
    assert all(not numbers(n) <= set().union(*map(numbers, chosen[:i])) for i, n in enumerate(chosen))
    drawn = random.Random(0).sample(range(SMALLEST_N, LARGEST_N + 1), 1000)
    assert all(numbers(n) <= known for n in drawn)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record with one of three cases, and the cost of none."""
    record = tmp_path / "kernel_text.txt"
    record.write_text("launch bfloat16 64 1 before\n")
    cases = [kernel_cases.Case("launch", "bfloat16", n) for n in (128, 64, 32)]
    monkeypatch.setattr(kernel_record, "recorded", lambda: record)
    monkeypatch.setattr(kernel_record, "cases", lambda: iter(cases))
    return record


@pytest.mark.parametrize(("words", "of_64"), [("--write", "now"), ("--add", "before")])
def test_a_record_is_written_whole(written: Path, monkeypatch: pytest.MonkeyPatch, words: str, of_64: str) -> None:
    """Two that were written at once into one file had lines of both, and zeros between them."""

    def digest(case: kernel_cases.Case) -> str:
        assert written.read_text() == "launch bfloat16 64 1 before\n"
        return "1 now"

    monkeypatch.setattr(kernel_record, "digest", digest)
    assert kernel_record.main([words]) == 0
    lines = [line.split()[2:] for line in written.read_text().splitlines()]
    assert lines == [["32", "1", "now"], ["64", "1", of_64], ["128", "1", "now"]]
    assert list(written.parent.iterdir()) == [written]


def test_what_was_added_before_a_stop_is_kept(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [kernel_cases.Case("launch", "bfloat16", n) for n in range(100, 120)]
    monkeypatch.setattr(kernel_record, "cases", lambda: iter(many))
    left = iter(range(17))

    def digest(case: kernel_cases.Case) -> str:
        return f"1 {next(left)}"

    monkeypatch.setattr(kernel_record, "digest", digest)
    with pytest.raises(StopIteration):
        kernel_record.main(["--add"])
    assert len(kernel_record.expected()) == 1 + 16
    monkeypatch.setattr(kernel_record, "digest", lambda case: "1 later")
    assert kernel_record.main(["--add"]) == 0
    assert sum(found == "1 later" for found in kernel_record.expected().values()) == 4
