"""Each kernel a thousand times on the same operands: a race shows as a bit that moves.

`python -m tests.gpu_proof.reruns --runs 1000`. Several waves of programs; compared on the device. Prints a summary as
JSON, fails if an element ever differed from the first run's.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_norm.kernels import backward as backward_kernel
from pallas_norm.kernels import dweight_sum
from pallas_norm.kernels import forward as forward_kernel
from tests.gpu_proof import kernels, operands
from tests.gpu_proof.kernels import Backward, ColumnSum, Forward
from tests.oracle import DTYPES

ELEMENTS = 1 << 21  # at least, of each array of rows
PARTS = 660  # of a column sum: those of the largest persistent grid, and more


def rows_of(plan: Any, elements: int) -> int:
    """Several waves, and rows left over; of a persistent grid, more blocks than two for each program."""
    persistent = 2 * (getattr(plan, "programs", None) or 0) if elements == ELEMENTS else 4
    return max(-(-elements // plan.n), persistent * plan.block) + (plan.block + 1) // 2


def program(case: Any, elements: int, *, interpret: bool) -> tuple[Callable[..., Any], dict[str, Any]]:
    """(a kernel, its operands)."""
    if isinstance(case, ColumnSum):
        parts, _ = operands.column_sum(case, PARTS, PARTS)
        kernel = functools.partial(dweight_sum.column_sum, rows=PARTS, dtype=DTYPES[case.dtype], interpret=interpret)
        return lambda given: {"dweight": kernel(given["parts"])}, {"parts": parts}
    options: dict[str, Any] = {"plan": case.plan, "spec": operands.SPEC, "interpret": interpret}
    rows = rows_of(case.plan, elements)
    if isinstance(case, Forward):
        return functools.partial(forward_kernel.forward, with_rstd=True, **options), operands.forward(case, rows)
    given = rough(case, operands.backward(case, rows)[0])
    used = backward_kernel.partial_dweight_rows(case.plan, rows)
    kernel = functools.partial(backward_kernel.partial_dweights, with_dweight=case.dweight, **options)

    def with_used_parts(given: dict[str, Any]) -> dict[str, Any]:
        results = kernel(given)
        return results | ({"dweight": results["dweight"][:used]} if case.dweight else {})

    return with_used_parts, given


def rough(case: Backward, given: dict[str, Any]) -> dict[str, Any]:
    """dy whose sums are not exact, so that another order of additions shows too."""
    dy = given["dy"]
    factor = np.random.default_rng(1).standard_normal(dy.shape, dtype=np.float32)
    return given | {"dy": (dy.astype(np.float32) * factor).astype(dy.dtype)}


def differing(
    kernel: Callable[..., Any], given: dict[str, Any], runs: int, *, disturb: Callable[[Any], Any] = lambda first: first
) -> int:
    """Elements that differed from the first run's, in all. `disturb` changes what the runs are compared with."""
    held = {name: jnp.asarray(value) for name, value in given.items()}
    first = disturb(jax.jit(kernel)(held))

    @jax.jit
    def again(given: Any, first: Any, count: jax.Array) -> jax.Array:
        def raw(value: jax.Array) -> jax.Array:
            return value.view(jnp.uint16 if value.dtype.itemsize == 2 else jnp.uint32)

        results = kernel(given)
        return count + sum(jnp.sum(raw(results[name]) != raw(first[name]), dtype=jnp.int32) for name in first)

    count = jnp.int32(0)
    for _ in range(runs):
        count = again(held, first, count)
    return int(count)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_proof.reruns", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--elements", type=int, default=ELEMENTS)
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--rehearsal", action="store_true", help="without a GPU")
    given = parser.parse_args(arguments)
    if jax.default_backend() != "gpu" and not given.rehearsal:
        parser.error("there is no GPU; --rehearsal does without, and proves nothing")
    implementation = "mosaic_gpu" if jax.default_backend() == "gpu" else "interpret"
    cases = [*kernels.forwards(), *kernels.backwards(), *kernels.column_sums()]
    found, started = {}, time.monotonic()
    for case in (case for case in cases if given.only in str(case)):
        print(f"case: {case}", flush=True)
        kernel, values = program(case, given.elements, interpret=implementation == "interpret")
        found[str(case)] = differing(kernel, values, given.runs)
    wrong = {name: count for name, count in found.items() if count}
    summary = {
        "device": jax.devices()[0].device_kind,
        "implementation": implementation,
        "runs": given.runs,
        "kernels": len(found),
        "differing_elements": wrong,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(summary, indent=1))
    print(f"{len(found)} kernels, {given.runs} runs each: {len(wrong)} kernels with a bit that moved")
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
