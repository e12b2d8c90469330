"""Kernels whose warpgroups meet, in the interpreter with its race detector: no races, and each barrier is needed.

Not the bulk-copy pipeline: to the detector a refill of a stage is ordered after the reads of the row before only by
commit_smem, a fence that the kernel, like other users of the copy engine, does without. It is judged by bits.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_norm import _compat
from pallas_norm._spec import Spec
from pallas_norm.regimes import Source, backward_plan_for, plan_for
from tests import mutants
from tests.mutants import Rewrite

# A row length whose chunks do not overlap: writing the same value twice is right, and a race to the detector.
SHARED = 12288  # two warpgroups
ROWS = 4


def forward(n: int) -> None:
    x, weight = jnp.ones((ROWS, n), jnp.bfloat16), jnp.ones((n,), jnp.bfloat16)
    kernel = sys.modules["pallas_norm._forward"].forward
    operands = {"x": x, "weight": weight}
    plan = plan_for(n, "bfloat16")
    jax.block_until_ready(kernel(operands, plan=plan, spec=Spec(), with_rstd=True, interpret=True))


def backward(n: int) -> None:
    x, weight = jnp.ones((ROWS, n), jnp.bfloat16), jnp.ones((n,), jnp.bfloat16)
    operands = {"x": x, "dy": x, "weight": weight, "rstd": jnp.ones((ROWS,), jnp.float32)}
    # One program, so that the next row's sums follow at once; the row read twice, not from the pipeline.
    plan = dataclasses.replace(backward_plan_for(n, "bfloat16"), programs=1)
    if plan.source is Source.PIPELINE:
        plan = dataclasses.replace(plan, source=Source.MEMORY, stages=0, warpgroups=2)
    kernel = sys.modules["pallas_norm._backward"].backward
    jax.block_until_ready(kernel(operands, plan=plan, spec=Spec(), with_dweight=True, interpret=True))


@pytest.mark.parametrize(("kernel", "n"), [(forward, 128), (forward, SHARED), (backward, 128), (backward, SHARED)])
def test_a_kernel_has_no_races(kernel, n: int) -> None:
    with _compat.race_detection() as races_found:
        kernel(n)
        assert not races_found()


@pytest.mark.parametrize(
    ("kernel", "n", "rewrite"),
    [
        (forward, SHARED, Rewrite("_blocks", "_compat.arrive_and_wait(self.exchange.barrier)", "pass")),
        (backward, SHARED, Rewrite("_blocks", "_compat.arrive_and_wait(self.exchange.barrier)", "pass")),
        (backward, SHARED, Rewrite("_launch", "SLOTS = 2", "SLOTS = 1")),
    ],
    ids=["forward sum", "backward sum", "one slot"],
)
def test_without_one_of_its_barriers_it_has(kernel, n: int, rewrite: Rewrite) -> None:
    with mutants.rewritten(rewrite), _compat.race_detection() as races_found:
        try:
            kernel(n)
        except Exception as error:  # 0.12's detector raises where it finds one
            assert "RACE" in str(error)  # noqa: PT017
            return
        assert races_found()
