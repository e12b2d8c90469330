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

from pallas_norm._plan import Source
from pallas_norm._spec import Spec
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import rewrites
from tests.oracle import F32
from tests.rewrites import Rewrite
from tests.strategies import Case
from tests.test_barriers import AFTER_A_CHUNK, ARRIVED, CLUSTER_ARRIVE, CLUSTER_WAIT, MEET

LAUNCHES = 200

# Four warpgroups; a pipeline in a cluster, a row that no bulk copy moves; a pipeline in one warpgroup, and in warps.
SHARED, PIPED_CLUSTER, CLUSTER, PIPELINE, IN_WARPS = 32768, 131072, 131064, 2048, 512
# Backward powers of two, by which the mean of exact products is exact; with a float32 dy the longest is no pipeline.
BACKWARD_PIPED_CLUSTER, BACKWARD_CLUSTER = 32768, 131072
NO_MEETING = ("_shared_row", CLUSTER_ARRIVE, "")


def rows_of(n: int) -> int:
    """Several waves of programs."""
    return max(1000, 2**23 // n)


def forward(n: int) -> Callable[..., Any]:
    kernel = sys.modules["pallas_norm._forward"].forward  # of a mutant
    return functools.partial(kernel, plan=plan_for(n, "bfloat16"), spec=Spec(eps=0.0), with_rstd=True)


def backward(n: int) -> Callable[..., Any]:
    kernel = sys.modules["pallas_norm._backward"].backward
    plan = backward_plan_for(n, "bfloat16", dy_dtype="float32")  # dy is a float32, as its weight is
    return functools.partial(kernel, plan=plan, spec=Spec(eps=0.0), with_dweight=True)


KERNELS: dict[str, tuple[Callable[[int], Callable[..., Any]], int]] = {
    "forward, shared": (forward, SHARED),
    "forward, cluster": (forward, CLUSTER),
    "forward, pipeline, cluster": (forward, PIPED_CLUSTER),
    "backward, rows in warps": (backward, 128),
    "backward, rows in warps, two chunks": (backward, IN_WARPS),
    "backward, pipeline": (backward, PIPELINE),
    "backward, pipeline, shared": (backward, 16384),
    "backward, cluster": (backward, BACKWARD_CLUSTER),
    "backward, pipeline, cluster": (backward, BACKWARD_PIPED_CLUSTER),
}

WITHOUT: dict[str, tuple[Rewrite, str]] = {
    "forward sum": (Rewrite("_shared_row", MEET, "pass"), "forward, shared"),
    "backward sum": (Rewrite("_shared_row", MEET, "pass"), "backward, pipeline, shared"),
    "forward, cluster": (Rewrite(*NO_MEETING, also=(CLUSTER_WAIT, "")), "forward, cluster"),
    "backward, cluster": (Rewrite(*NO_MEETING, also=(CLUSTER_WAIT, "")), "backward, cluster"),
    "forward, pipeline, cluster": (Rewrite(*NO_MEETING, also=(CLUSTER_WAIT, "")), "forward, pipeline, cluster"),
    "backward, pipeline, cluster": (Rewrite(*NO_MEETING, also=(CLUSTER_WAIT, "")), "backward, pipeline, cluster"),
    "after a chunk of dweight": (Rewrite("_blocks", AFTER_A_CHUNK, "rows"), "backward, rows in warps"),
    "after each of two chunks": (Rewrite("_blocks", AFTER_A_CHUNK, "rows"), "backward, rows in warps, two chunks"),
    "a stage's arrival": (Rewrite("_pipeline", ARRIVED, "pass"), "backward, pipeline"),
    "a stage's arrival, in warps": (Rewrite("_pipeline", ARRIVED, "pass"), "backward, rows in warps, two chunks"),
    "a stage's arrival, forward": (Rewrite("_pipeline", ARRIVED, "pass"), "forward, pipeline, cluster"),
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
    if make is forward:
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


@pytest.mark.parametrize("name", ["forward, shared", "backward, rows in warps", "backward, pipeline"])
def test_what_is_compared_on_a_gpu_is_right(name: str) -> None:
    """Here in the interpreter: the expectation, and that every rewrite finds its text."""
    assert differing(name, launches=1, rows=2, interpret=True) == 0
    for rewrite, kernel in WITHOUT.values():
        assert kernel in KERNELS
        with rewrites.rewritten(rewrite):
            pass


def test_the_row_lengths_reach_the_barriers() -> None:
    assert plan_for(SHARED, "bfloat16").warpgroups == 4
    of_float32 = functools.partial(backward_plan_for, dtype="bfloat16", dy_dtype="float32")
    for plan in (plan_for(CLUSTER, "bfloat16"), of_float32(BACKWARD_CLUSTER)):
        assert plan.cluster > 1
        assert plan.source is not Source.PIPELINE
    ahead, piped = plan_for(PIPED_CLUSTER, "bfloat16"), of_float32(BACKWARD_PIPED_CLUSTER)
    assert (ahead.source, ahead.cluster, ahead.ahead) == (Source.PIPELINE, 4, True)
    assert (piped.source, piped.cluster) == (Source.PIPELINE, 2)
    for n in (PIPELINE, IN_WARPS):
        assert backward_plan_for(n, "bfloat16", dy_dtype="float32").source is Source.PIPELINE
    shared = backward_plan_for(16384, "bfloat16")
    assert (shared.source, shared.warpgroups) == (Source.PIPELINE, 4)
    assert [backward_plan_for(n, "bfloat16").chunks for n in (128, 512)] == [1, 2]
