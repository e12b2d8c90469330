"""Every kernel once or a few times, on few rows, for tools that slow each launch down a hundred times.

`python -m tests.gpu_proof.every_kernel`: by jax.jit, and where torch has a GPU by the direct launch. Each result is
compared with the host's. Names what it runs before it does, so that a tool's reports are between the names.

All operands come from the host, for initcheck: it knows of memory what copies and checked kernels wrote, not what the
kernels of XLA and torch did. Without a GPU the same rows go through XLA's path: a rehearsal.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_norm import _dispatch
from pallas_norm.kernels import backward as backward_kernel
from pallas_norm.kernels import dweight_sum
from pallas_norm.kernels import forward as forward_kernel
from tests.gpu_proof import kernels, operands
from tests.gpu_proof.kernels import Backward, ColumnSum, Forward
from tests.oracle import DTYPES

GPU = "mosaic_gpu"
FEW_PROGRAMS = 2  # of a persistent grid, so that each takes several rows, and a pipeline fills every stage again


def few(plan: Any) -> Any:
    return dataclasses.replace(plan, programs=FEW_PROGRAMS) if getattr(plan, "programs", None) else plan


def rows_of(plan: Any) -> int:
    """Two full blocks and some rows left over; of a persistent grid, more blocks than its stages hold."""
    blocks = FEW_PROGRAMS * (getattr(plan, "stages", 0) + 2) if getattr(plan, "programs", None) else 2
    return blocks * plan.block + (1 if plan.block == 1 else 3)


def forward(case: Forward, implementation: str) -> None:
    plan = few(case.plan)
    given = operands.forward(case, rows_of(plan))
    if implementation == "xla":
        kernel = functools.partial(_dispatch.forward, spec=operands.SPEC, with_rstd=True)
    else:
        interpret = implementation == "interpret"
        options = {"plan": plan, "spec": operands.SPEC, "interpret": interpret}
        kernel = functools.partial(forward_kernel.forward, with_rstd=True, **options)
    results = jax.jit(kernel)({name: jnp.asarray(value) for name, value in given.items()})
    operands.check_forward(case, given, results, results["rstd"])


def backward(case: Backward, implementation: str) -> None:
    """Without the column sum, of which a sum of less than 32 parts reads, and leaves out, parts that nobody wrote."""
    plan = few(case.plan)
    given, dx, terms = operands.backward(case, rows_of(plan))
    if implementation == "xla":
        dtype, used = "float32" if case.dweight else None, None
        kernel = functools.partial(_dispatch.backward, spec=operands.SPEC, dweight_dtype=dtype)
    else:
        options: dict[str, Any] = {"spec": operands.SPEC, "with_dweight": case.dweight}
        interpret, used = implementation == "interpret", backward_kernel.partial_dweight_rows(plan, len(terms))
        kernel = functools.partial(backward_kernel.partial_dweights, plan=plan, interpret=interpret, **options)
    results = jax.jit(kernel)({name: jnp.asarray(value) for name, value in given.items()})
    operands.assert_equal(results["dx"], dx)
    if case.dweight:
        dweight = np.asarray(results["dweight"])
        operands.assert_equal(dweight if used is None else dweight[:used].sum(axis=0), terms.sum(axis=0))


def column_sum(case: ColumnSum, implementation: str) -> None:
    for rows in (7, 33, 133):
        parts, total = operands.column_sum(case, rows, max(rows, dweight_sum.TILE))
        if implementation == "xla":
            kernel = functools.partial(lambda parts, rows: parts[:rows].sum(axis=0), rows=rows)
        else:
            options = {"dtype": DTYPES[case.dtype], "interpret": implementation == "interpret"}
            kernel = functools.partial(dweight_sum.column_sum, rows=rows, **options)
        operands.assert_equal(jax.jit(kernel)(jnp.asarray(parts)), total)


def every_case() -> list[tuple[str, Callable[[], None]]]:
    """(name, what runs it) of both ways in."""
    implementation = GPU if jax.default_backend() == "gpu" else "xla"
    ways: list[tuple[Callable[[Any, str], None], list[Any]]] = [
        (forward, kernels.forwards()),
        (backward, kernels.backwards()),
        (column_sum, kernels.column_sums()),
    ]
    found = [(f"jax: {case}", functools.partial(run, case, implementation)) for run, cases in ways for case in cases]
    try:
        from tests.gpu_proof import every_launch
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        print("without torch: no direct launches")
        return found
    return found + every_launch.every_case()


def where() -> str:
    """cpu also where torch alone sees no GPU: its cases ran on a CPU then."""
    torch = sys.modules.get("torch")
    return "cpu" if torch is not None and not torch.cuda.is_available() else jax.default_backend()


def run(cases: list[tuple[str, Callable[[], None]]]) -> int:
    """How many of them failed, which it tells."""
    failed = 0
    for name, case in cases:
        print(f"case: {name}", flush=True)
        try:
            case()
        except Exception:
            traceback.print_exc(file=sys.stdout)
            failed += 1
    print(f"every kernel on {where()}: {len(cases)} cases, {failed} failed", flush=True)
    return failed


if __name__ == "__main__":
    only = sys.argv[1] if len(sys.argv) > 1 else ""
    sys.exit(1 if run([case for case in every_case() if only in case[0]]) else 0)
