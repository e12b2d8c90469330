"""Barriers taken away from the real kernels, on a GPU: the bits have to show it. And of the real kernels none moves.

Only those without which a thread reads what another has hardly begun to write. Of the others (before a chunk of
dweight, before a stage is filled again, at the end of a cluster, release and acquire) the hardware may let every launch
pass: test_barriers.py looks for their instructions, test_interpreter.py for their races.

Each in a process of its own, because a kernel out of step may also fault, and that ends a process's use of the GPU.
`-s` prints how many launches were wrong.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm._spec import Spec
from pallas_norm.plans import few_rows
from pallas_norm.plans.hardware import H200
from pallas_norm.plans.plan import BackwardPlan, Source, from_memory
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import rewrites
from tests.oracle import F32
from tests.rewrites import Rewrite
from tests.strategies import Case
from tests.test_barriers import AFTER_A_CHUNK, ARRIVED, MEET, NOTHING, RECEIVE

LAUNCHES = 200

# Four warpgroups, and a cluster, of rows that no bulk copy moves; a pipeline in a cluster, in one warpgroup, the same
# with rows kept, and in warps.
SHARED, CLUSTER, PIPED_CLUSTER, PIPELINE, KEPT, IN_WARPS = 32760, 131064, 131072, 2048, 1024, 512
# Powers of two, by which the mean of exact products is exact; of the second one rows are kept.
BACKWARD_CLUSTER, KEPT_CLUSTER = 32768, 4096
NOT_RECEIVED = Rewrite("cluster", RECEIVE, NOTHING)


def rows_of(n: int) -> int:
    """Several waves of programs."""
    return max(1000, 2**23 // n)


def forward(n: int) -> Callable[..., Any]:
    kernel = sys.modules["pallas_norm.kernels.forward"].forward  # of a mutant
    return functools.partial(kernel, plan=plan_for(n, "bfloat16"), spec=Spec(eps=0.0), with_rstd=True)


def forward_of_few(n: int) -> Callable[..., Any]:
    """Of many rows too: nothing of it depends on how many there are."""
    few = few_rows.of(plan_for(n, "bfloat16"), 2, H200)
    assert few is not None
    return functools.partial(forward(n), plan=few[1])


def plan_of(n: int) -> BackwardPlan:
    return backward_plan_for(n, "bfloat16", dy_dtype="float32")  # dy is a float32, as its weight is


def backward(n: int, plan: BackwardPlan | None = None) -> Callable[..., Any]:
    kernel = sys.modules["pallas_norm.kernels.backward"].backward
    return functools.partial(kernel, plan=plan or plan_of(n), spec=Spec(eps=0.0), with_dweight=True)


def backward_from_memory(n: int) -> Callable[..., Any]:
    return backward(n, from_memory(plan_of(n)))


KERNELS: dict[str, tuple[Callable[[int], Callable[..., Any]], int]] = {
    "forward, shared": (forward, SHARED),
    "forward, cluster": (forward, CLUSTER),
    "forward, pipeline, cluster": (forward, PIPED_CLUSTER),
    "forward, few rows, cluster": (forward_of_few, BACKWARD_CLUSTER),
    "backward, rows in warps": (backward, 128),
    "backward, rows in warps, two chunks": (backward, IN_WARPS),
    "backward, pipeline": (backward, PIPELINE),
    "backward, pipeline, rows kept": (backward, KEPT),
    "backward, pipeline, shared": (backward, 16384),
    "backward, cluster": (backward_from_memory, BACKWARD_CLUSTER),
    "backward, pipeline, cluster": (backward, BACKWARD_CLUSTER),
    "backward, pipeline, rows kept, cluster": (backward, KEPT_CLUSTER),
}

WITHOUT: dict[str, tuple[Rewrite, str]] = {
    "forward sum": (Rewrite("cta", MEET, "pass"), "forward, shared"),
    "backward sum": (Rewrite("cta", MEET, "pass"), "backward, pipeline, shared"),
    "forward, cluster": (NOT_RECEIVED, "forward, cluster"),
    "forward, few rows, cluster": (NOT_RECEIVED, "forward, few rows, cluster"),
    "backward, cluster": (NOT_RECEIVED, "backward, cluster"),
    "forward, pipeline, cluster": (NOT_RECEIVED, "forward, pipeline, cluster"),
    "backward, pipeline, cluster": (NOT_RECEIVED, "backward, pipeline, cluster"),
    "backward, pipeline, rows kept, cluster": (NOT_RECEIVED, "backward, pipeline, rows kept, cluster"),
    "after a chunk of dweight": (Rewrite("warp", AFTER_A_CHUNK, "rows"), "backward, rows in warps"),
    "after each of two chunks": (
        Rewrite("warp", AFTER_A_CHUNK, "rows"),
        "backward, rows in warps, two chunks",
    ),
    "a stage's arrival": (Rewrite("pipeline", ARRIVED, "pass"), "backward, pipeline"),
    "a stage's arrival, rows kept": (Rewrite("pipeline", ARRIVED, "pass"), "backward, pipeline, rows kept"),
    "a stage's arrival, in warps": (
        Rewrite("pipeline", ARRIVED, "pass"),
        "backward, rows in warps, two chunks",
    ),
    "a stage's arrival, forward": (Rewrite("pipeline", ARRIVED, "pass"), "forward, pipeline, cluster"),
}


def differing(kernel: str, *, launches: int = LAUNCHES, rows: int | None = None, interpret: bool = False) -> int:
    """Launches of which some bit is not the exact result. The rows differ, so another row's sum is a wrong one."""
    make, n = KERNELS[kernel]
    case = Case(n, rows or rows_of(n), "bf16", "f32", "normal", seed=0)
    x, weight, dy = case.exact()
    # Each row of another power of two, and with it rstd; x and dy of one magnitude keep all sums exact.
    power = (2.0 ** (np.arange(len(x)) % 8 - 4))[:, None]
    x, rstd = (x.astype(F32) * power).astype(x.dtype), (1 / power[:, 0]).astype(F32)
    dy = (dy * (1 + np.arange(len(x)) % 5)[:, None]).astype(F32)
    unit = np.sign(x.astype(F32))
    if make in (forward, forward_of_few):
        operands, expected = {"x": x, "weight": weight}, {"y": unit * weight, "rstd": rstd}
    else:
        operands = {"x": x, "weight": weight, "dy": dy, "rstd": rstd}
        g = dy * weight
        mean = np.sum(g * unit, axis=1, keepdims=True, dtype=F32) / F32.type(n)
        expected = {"dx": (rstd[:, None] * (g - unit * mean)).astype(x.dtype), "dweight": (unit * dy).sum(axis=0)}
    run = jax.jit(functools.partial(make(n), interpret=interpret))
    given, right = ({k: jnp.asarray(v) for k, v in values.items()} for values in (operands, expected))

    @jax.jit
    def wrong(results: Any, right: Any) -> jax.Array:
        return jnp.any(jnp.array([jnp.any(results[name] != right[name]) for name in right]))

    return sum(int(wrong(run(given), right)) for _ in range(launches))


def in_a_process(call: str) -> str:
    """What it prints, or how it failed."""
    root = Path(__file__).parents[1]
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", f"from tests import test_gpu_mutants as t; print(t.{call})"]
    try:
        options = {"cwd": root, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(command, check=False, **options)
    except subprocess.TimeoutExpired:
        return "never ended"
    return done.stdout.split()[-1] if done.returncode == 0 else f"failed: {done.stderr.strip().splitlines()[-1]}"


def without(name: str) -> int:
    rewrite, kernel = WITHOUT[name]
    with rewrites.rewritten(rewrite):
        return differing(kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_no_launch_of_the_real_kernel_is_wrong(name: str) -> None:
    assert in_a_process(f"differing({name!r})") == "0"


@pytest.mark.gpu
@pytest.mark.parametrize("name", WITHOUT)
def test_without_a_barrier_some_launch_is_wrong(name: str) -> None:
    found = in_a_process(f"without({name!r})")
    print(f"\nwithout the barrier {name!r}: {found} of {LAUNCHES} launches wrong")  # noqa: T201
    # Wrong launches, a hang, or a fault of the GPU; another failure, say to compile, shows nothing.
    assert found == "never ended" or "cuda" in found or (found.isdigit() and int(found) > 0), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward, shared", "backward, rows in warps", "backward, pipeline"])
def test_what_is_compared_on_a_gpu_is_right(name: str) -> None:
    """Here in the interpreter: the expectation, and that every rewrite finds its text."""
    assert differing(name, launches=1, rows=2, interpret=True) == 0
    for rewrite, kernel in WITHOUT.values():
        assert kernel in KERNELS
        with rewrites.rewritten(rewrite):
            pass


def test_the_row_lengths_reach_the_barriers() -> None:
    shared = plan_for(SHARED, "bfloat16")
    assert (shared.source, shared.warpgroups, shared.cluster) == (Source.REGISTERS, 4, 1)
    cluster = plan_for(CLUSTER, "bfloat16")
    assert cluster.cluster > 1
    assert cluster.source is not Source.PIPELINE
    piped = plan_for(PIPED_CLUSTER, "bfloat16")
    assert (piped.source, piped.cluster, piped.rows_in_registers) == (Source.PIPELINE, 8, True)
    piped = plan_of(BACKWARD_CLUSTER)
    assert (piped.source, piped.cluster) == (Source.PIPELINE, 2)
    kept = {n: plan_of(n).rows_in_registers for n in (PIPELINE, KEPT, IN_WARPS) if plan_of(n).source is Source.PIPELINE}
    assert kept == {PIPELINE: False, KEPT: True, IN_WARPS: False}
    kept = plan_of(KEPT_CLUSTER)
    assert (kept.source, kept.cluster, kept.rows_in_registers) == (Source.PIPELINE, 2, True)
    shared = plan_of(16384)
    assert (shared.source, shared.warpgroups) == (Source.PIPELINE, 4)
    assert [backward_plan_for(n, "bfloat16").chunks for n in (128, 512)] == [1, 2]
