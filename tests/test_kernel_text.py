"""A sample of scripts/kernel-text: the kernels are those recorded with this JAX, and a change of one shows."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest

from tests import kernel_text, rewrites

pytestmark = pytest.mark.skipif(
    not kernel_text.recorded().exists(),
    reason=f"tests/data has no record of the kernels with jax {jax.__version__} (scripts/kernel-text --write)",
)


def sample() -> list[kernel_text.Case]:
    return list(kernel_text.expected())[::12] if kernel_text.recorded().exists() else []


@pytest.mark.parametrize("case", sample(), ids=str)
def test_a_kernel_has_the_text_that_was_recorded(case: kernel_text.Case) -> None:
    assert list(kernel_text.differing([case], kernel_text.expected())) == []


def test_the_record_has_every_form() -> None:
    assert {case.form for case in kernel_text.expected()} == set(kernel_text.FORMS)


@pytest.mark.parametrize("name", ["mean over what is read", "backward: no projection", "left-over rows misplaced"])
def test_a_changed_kernel_is_seen(name: str) -> None:
    # An odd row, more of which is read than there is: where all of it is, the mean over what is read is the right one.
    ragged = (case for case in kernel_text.expected() if case.n > 1000 and case.n % 2)
    case = next(iter(kernel_text.expected())) if name.startswith("left") else next(ragged)
    with rewrites.rewritten(rewrites.SOURCE[name]):
        assert [found for found, _ in kernel_text.differing([case], kernel_text.expected())] == [case]


def test_a_record_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that were written at once into one file had lines of both, and zeros between them."""
    record = tmp_path / "kernel_text.txt"
    record.write_text("forward bfloat16 1 1 before\n")

    def digest(case: kernel_text.Case) -> str:
        assert record.read_text() == "forward bfloat16 1 1 before\n" or written
        return "1 0123456789ab"

    written: list[bool] = []
    cases = [kernel_text.Case("forward", "bfloat16", n) for n in (32, 64)]
    monkeypatch.setattr(kernel_text, "recorded", lambda: record)
    monkeypatch.setattr(kernel_text, "cases", lambda kinds_only: iter(cases))
    monkeypatch.setattr(kernel_text, "digest", digest)
    monkeypatch.setattr(kernel_text, "differing", lambda chosen, before: written.append(True) or iter(()))
    assert kernel_text.main(["--write"]) == 0
    assert [line.split()[2] for line in record.read_text().splitlines()] == ["32", "64"]
    assert [path.name for path in tmp_path.iterdir()] == [record.name]
