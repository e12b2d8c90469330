"""Kernels that synchronise, in the interpreter with its race detector: no races, and each barrier is needed.

The detector sees warpgroups and the copy engine, not the warps of one warpgroup nor the CTAs of a cluster; what orders
those is counted in the lowered kernels (test_barriers.py) and taken away on a GPU (test_gpu_mutants.py).

Property 22.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_norm._spec import Spec
from pallas_norm.kernels import mosaic
from pallas_norm.plans.plan import Regime, Source
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import rewrites, test_barriers
from tests.race_detection import race_detection
from tests.rewrites import Rewrite
from tests.test_barriers import ARRIVED, FILLED_EARLY

# Row lengths whose chunks do not overlap: writing the same value twice is right, and a race to the detector.
IN_WARPS, N, PIPED = 128, 1024, 2048
ROWS = 4
SHARED = {"regime": Regime.CTA, "lanes": 32, "block": 1, "vec": 4, "warpgroups": 2}


def ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.bfloat16)


def forward(n: int = N, *, rows: int = ROWS, **changes: object) -> None:
    kernel = sys.modules["pallas_norm.kernels.forward"].forward  # of a mutant
    plan = dataclasses.replace(plan_for(n, "bfloat16"), **changes)
    options = {"plan": plan, "spec": Spec(), "with_rstd": True, "interpret": True}
    jax.block_until_ready(kernel({"x": ones(rows, n), "weight": ones(n)}, **options))


def backward(n: int = N, *, rows: int = ROWS, **changes: object) -> None:
    """In one program, so that the next row's sums follow at once and every stage of a pipeline is filled again.

    Without the second kernel, which adds up the parts of dweight: the detector tells of the last kernel that ran.
    """
    kernel = sys.modules["pallas_norm.kernels.backward"].partial_dweights
    plan = dataclasses.replace(backward_plan_for(n, "bfloat16"), programs=1, **changes)
    operands = {"x": ones(rows, n), "dy": ones(rows, n), "weight": ones(n), "rstd": jnp.ones((rows,), jnp.float32)}
    options = {"plan": plan, "spec": Spec(), "with_dweight": True, "interpret": True}
    jax.block_until_ready(kernel(operands, **options))


KERNELS: dict[str, Callable[[], None]] = {
    "forward in warps": lambda: forward(IN_WARPS),
    "forward, a warpgroup": forward,
    "forward, shared": lambda: forward(**SHARED),
    "forward, shared by four": lambda: forward(**SHARED | {"warpgroups": 4, "vec": 2}),
    "forward, shared and read twice": lambda: forward(**SHARED, source=Source.MEMORY),
    "backward in warps": lambda: backward(IN_WARPS),
    "backward, shared, from registers": lambda: backward(**SHARED, source=Source.REGISTERS, stages=0),
    "backward, shared, from memory": lambda: backward(**SHARED, source=Source.MEMORY, stages=0),
    "pipeline": lambda: backward(PIPED, rows=6, stages=2, rows_in_registers=False),
    "pipeline of three stages": lambda: backward(PIPED, rows=7, stages=3, rows_in_registers=False),
    "pipeline, rows kept": lambda: backward(PIPED, rows=6, stages=2, rows_in_registers=True),
    "pipeline, shared": lambda: backward(PIPED, rows=6, **SHARED, stages=2, rows_in_registers=False),
    "pipeline, shared, rows kept": lambda: backward(PIPED, rows=6, **SHARED, stages=2, rows_in_registers=True),
    "pipeline in warps": lambda: backward(512, rows=25, stages=2),
    "pipeline in warps, rows kept": lambda: backward(512, rows=25, stages=2, rows_in_registers=True),
    "forward, pipeline, shared, rows kept": lambda: forward(
        PIPED, rows=6, **SHARED, source=Source.PIPELINE, stages=2, rows_in_registers=True, programs=1
    ),
}


@pytest.fixture(autouse=True)
def fenced_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy fence before each copy into shared memory, for the detector only.

    It takes a copy's write to be ordered after what the copy engine knows, and that learns of the warps' reads from
    such a fence alone. The compiled kernel does without, as other users of the engine do: the reads have returned
    before the barrier, and it is a fence for writes that the engine has to see.
    """

    def copy(source: object, destination: object, barrier: object) -> None:
        plgpu.commit_smem()
        plgpu.copy_gmem_to_smem(source, destination, barrier)

    monkeypatch.setattr(mosaic, "copy_to_smem", copy)


# What 0.12's detector raises where it finds a race; and a warpgroup that ran ahead of the others by a whole row.
OUT_OF_STEP = ("RACE DETECTED", "but barrier is already at phase")


def has_races(kernel: Callable[[], None], races_found: Callable[[], bool]) -> bool:
    try:
        kernel()
    except Exception as error:
        assert any(sign in str(error) for sign in OUT_OF_STEP)  # noqa: PT017
        return True
    return races_found()


@pytest.mark.sampled(16)
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_has_no_races(name: str) -> None:
    with race_detection() as races_found:
        assert not has_races(KERNELS[name], races_found)


def test_every_kind_of_kernel_that_synchronises_is_among_them() -> None:
    """Warpgroups that share a row read it from each source; a warpgroup alone meets the copy engine."""
    assert {source.value for source in Source} <= {name.split()[-1] for name in KERNELS} | {"pipeline"}
    alone, in_warps = backward_plan_for(PIPED, "bfloat16"), backward_plan_for(512, "bfloat16")
    assert (alone.source, alone.regime, alone.warpgroups) == (Source.PIPELINE, Regime.CTA, 1)
    assert (in_warps.source, in_warps.regime) == (Source.PIPELINE, Regime.WARP)
    assert backward_plan_for(IN_WARPS, "bfloat16").regime is Regime.WARP


MEET = Rewrite("cta", test_barriers.MEET, "pass")
ONE_SLOT = Rewrite("cta", "SLOTS = 2", "SLOTS = 1")
# As many waits and copies as before, so nothing hangs: the wait for a stage follows its reads, a copy precedes them.
READ_UNWAITED = Rewrite(
    "pipeline",
    f"        {ARRIVED}\n",
    "",
    also=("        read = step if", f"        {ARRIVED}\n        read = step if"),
)
# Where rows are kept the warpgroups meet before the stage is refilled, and read it afterwards. Without that meeting a
# warpgroup may find the barrier of its stage two phases on: it fails, the other one waits for it, and nothing ends.
REFILLED_UNREAD = Rewrite(
    "rows",
    "kept = self._read(block) if plan.rows_in_registers",
    "mosaic.arrive_and_wait(block.exchange.barrier)\n        self.pipeline.refill(self.step)\n"
    "        kept = self._read(block) if plan.rows_in_registers",
    also=("        if self.pipeline.plan.regime is Regime.CTA:\n            self.pipeline.refill(self.step)\n", ""),
)
REFILLED_EARLY = Rewrite("pipeline", "read = step if self.plan.rows_in_registers else step - 1", "read = step")
WITHOUT = {
    "forward sum": (MEET, "forward, shared"),
    "forward sum of four": (MEET, "forward, shared by four"),
    "backward sum": (MEET, "backward, shared, from memory"),
    "backward sum, from registers": (MEET, "backward, shared, from registers"),
    "one slot": (ONE_SLOT, "backward, shared, from memory"),
    "pipeline's sum": (MEET, "pipeline, shared"),
    "a stage read before it has arrived": (READ_UNWAITED, "pipeline"),
    "a stage read before it has arrived, shared": (READ_UNWAITED, "pipeline, shared"),
    "a stage refilled a row early": (REFILLED_EARLY, "pipeline"),
    "a stage refilled a row early, shared": (REFILLED_EARLY, "pipeline, shared"),
    "a stage refilled before all have read it": (FILLED_EARLY, "pipeline, shared"),
    "a stage refilled before all have read it, forward": (REFILLED_UNREAD, "forward, pipeline, shared, rows kept"),
    "a stage refilled before it is read, rows kept": (FILLED_EARLY, "pipeline, rows kept"),
    "a stage refilled before all have read it, rows kept": (REFILLED_UNREAD, "pipeline, shared, rows kept"),
}


@pytest.mark.sampled(14)
@pytest.mark.parametrize("name", WITHOUT)
def test_without_one_of_its_barriers_it_has(name: str) -> None:
    rewrite, kernel = WITHOUT[name]
    with rewrites.rewritten(rewrite), race_detection() as races_found:
        assert has_races(KERNELS[kernel], races_found)
