"""Every family of kernels, compiled for each generation of GPUs where the wheels for that are installed: the assembler
takes them, for that architecture; what they take is there."""

from __future__ import annotations

import collections
from pathlib import Path

import pytest

from pallas_norm.plans.plan import Source
from tests import aot_gpus, gpus

compiles = pytest.mark.skipif(aot_gpus.missing() is not None, reason=str(aot_gpus.missing()))
# Bytes, at most, of kernels that just fit, with jax 0.11.2: a row kept in registers with a residual, pipelines of 255
# registers and of two stages in the place of three, and before Hopper rows that are read again by 1024 threads.
SPILLS = {
    ("forward+", 32768): 24,
    ("backward+", 7168): 12,
    ("backward", 8192): 4,
    ("backward", 16384): 12,
    ("backward+", 16384): 4,
}
STATIC = 1024  # bytes of shared memory that the compiler may add, and that a CTA takes beside its own


@compiles
@pytest.mark.parametrize("card", aot_gpus.TARGETS)
def test_every_family_compiles_within_what_the_card_has(card: str) -> None:
    found = aot_gpus.report(card)
    assert {kernel.target for kernel in found} == {aot_gpus.TARGETS[card]}
    forms = collections.Counter(kernel.form for kernel in found)
    assert set(forms) == {"forward", "forward+", "backward", "backward+"}
    assert min(forms.values()) >= 25
    for kernel in found:
        assert kernel.registers <= 255, kernel
        assert kernel.spill_bytes <= SPILLS.get((kernel.form, kernel.n), 0), kernel
        assert kernel.shared_bytes + STATIC <= gpus.CARDS[card].shared_bytes + 1024, kernel
        assert kernel.resident >= 1, kernel
    if not gpus.CARDS[card].gpu.clusters:
        assert Source.PIPELINE.value not in {kernel.source for kernel in found}
        assert max(kernel.shared_bytes for kernel in found) <= 8 << 10


@compiles
def test_the_gradients_of_heads_run_in_one_wave_on_the_gpu_that_their_programs_were_counted_on() -> None:
    """What `plans/rope.py` says of registers."""
    found = aot_gpus.report("H200", "heads")
    assert len(found) >= 35
    for kernel in found:
        assert kernel.spill_bytes == 0, kernel
        assert kernel.waves <= 1, kernel


def test_the_record_is_of_every_architecture_and_the_page_shows_its_waves() -> None:
    """Else: python -m tests.aot_gpus write; then the table of `python -m tests.aot_gpus waves` goes to docs/gpus.md."""
    found = aot_gpus.recorded()
    assert {card: {kernel.target for kernel in rows} for card, rows in found.items()} == {
        card: {target} for card, target in aot_gpus.TARGETS.items()
    }
    text = (Path(__file__).parents[1] / "docs" / "gpus.md").read_text()
    table = text.partition("<!-- waves -->\n")[2].partition("<!-- /waves -->")[0]
    assert table.splitlines() == list(aot_gpus.waves())


@compiles
@pytest.mark.parametrize("card", ["A100", "RTX 5090"])
def test_the_record_is_what_the_assembler_says(card: str) -> None:
    """Of the plans as they are; another assembler may count other registers."""
    shape = [(one.form, one.n, one.dtype, one.source, one.programs) for one in aot_gpus.report(card)]
    assert shape == [(one.form, one.n, one.dtype, one.source, one.programs) for one in aot_gpus.recorded()[card]]
