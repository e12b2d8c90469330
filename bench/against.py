"""python -m bench.against FOLDER ...: kernel times of this package beside those of the packages in folders, in one
process.

    mkdir .before && git archive main pallas_norm | tar -x -C .before
    python -m bench.against .before --out against.json

They take turns, each call after L2 is emptied, so that a clock that changes changes all. Exits with 1 where this
package is slower than the first folder's by more than LARGEST and both spreads.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

import pallas_norm

from . import timing
from .measuring import failure
from .operands import EPS, Operands, on_gpu
from .suite import ITEMSIZE, MANY_ROWS, Case
from .table import columns

LARGEST = 0.02
REPETITIONS = 21
THREADS = 8
BYTES = 64 << 20  # of x, where a case has many rows: as fast as with more of them, and sooner done
HERE = "here"

NARROW = (64, 80, 96, 128, 192, 256, 512, 640, 768, 896, 1000)
WIDE = (1024, 1536, 2048, 2880, 4096, 5120, 8192, 16384, 32768, 131072)


def cases() -> list[Case]:
    """Few rows of some widths, and many of each, the narrow ones first."""
    many = [
        Case(operation, min(MANY_ROWS, BYTES // (n * ITEMSIZE[dtype])), n, dtype)
        for operation, dtype, widths in (
            ("backward", "bfloat16", NARROW),
            ("forward", "bfloat16", NARROW),
            ("backward", "float32", (64, 128, 896, 4096)),
            ("backward", "bfloat16", WIDE),
            ("forward", "float32", (64, 128, 896, 4096)),
            ("forward", "bfloat16", WIDE),
            ("add", "bfloat16", (128, 4096)),
        )
        for n in widths
    ]
    few = [
        Case("forward", rows, n) for rows, n in ((1, 4096), (64, 4096), (256, 128), (4096, 128), (64, 896), (1, 131072))
    ]
    return [*few, Case("backward", 256, 4096), Case("backward", 4096, 128), *many]


def other_package(folder: Path) -> Any:
    """The package pallas_norm of `folder`, under another name, beside the one that is imported."""
    name = "pallas_norm_of_" + re.sub(r"\W", "_", str(folder))
    spec = importlib.util.spec_from_file_location(
        name, folder / "pallas_norm" / "__init__.py", submodule_search_locations=[str(folder / "pallas_norm")]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def call_of(package: Any, case: Case, inputs: dict[str, jax.Array]) -> Callable[[], Any]:
    """One kernel: in the backward pass the first of the two, with its parts of dweight."""
    name = package.__name__
    regimes = importlib.import_module(f"{name}.regimes")
    spec = importlib.import_module(f"{name}._spec").Spec(eps=EPS)
    if case.operation == "backward":
        kernel = importlib.import_module(f"{name}.kernels.backward").partial_dweights
        plan, options = regimes.backward_plan_for(case.n, case.dtype), {"with_dweight": True}
    else:
        kernel = importlib.import_module(f"{name}.kernels.forward").forward
        plan = regimes.plan_for(case.n, case.dtype, residual=case.operation == "add")
        options = {"with_rstd": False}

    def run(operands: dict[str, jax.Array]) -> Any:
        return kernel(operands, plan=plan, spec=spec, interpret=False, **options)

    compiled = jax.jit(run).lower(inputs).compile()
    return lambda: compiled(inputs)


def calls_of(case: Case, packages: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    inputs = dict(Operands(case).arrays)
    if case.operation == "backward":
        inputs["rstd"] = jax.numpy.ones(case.rows, "float32")
    return {which: call_of(package, case, inputs) for which, package in packages.items()}


def measured(case: Case, calls: dict[str, Callable[[], Any]], flush: timing.Flush) -> dict[str, Any]:
    """HERE and the folders, the first of which is what the others are compared with."""
    found = timing.measure(calls, repetitions=REPETITIONS, flush=flush)
    first = next(iter(found.values()))
    here = found[HERE]
    slower = here.median_us > first.median_us * (1 + LARGEST) + first.spread_us + here.spread_us
    ratios = {name: round(timed.median_us / first.median_us, 4) for name, timed in found.items()}
    return {"case": case.label, "slower": slower, "ratios": ratios, "times": {k: v.row() for k, v in found.items()}}


def report(rows: list[dict[str, Any]]) -> str:
    first, *others = rows[0]["ratios"]
    shown = [
        ["case", f"{first}, us", *(f"{name}, us" for name in others), *(f"{name} / {first}" for name in others), ""]
    ]
    for row in rows:
        us = [f"{timed['median_us']:.2f} +- {timed['spread_us']:.2f}" for timed in row["times"].values()]
        ratios = [f"{row['ratios'][name]:.3f}" for name in others]
        shown.append([row["case"], *us, *ratios, "SLOWER" if row["slower"] else ""])
    return columns(shown)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="no case is begun later")
    given = parser.parse_args(words)
    if not on_gpu():
        raise RuntimeError("kernel times are those of a GPU, and this process has none")
    packages = {str(folder): other_package(folder) for folder in given.folders} | {HERE: pallas_norm}
    flush = timing.Flush()
    began = time.monotonic()
    rows: list[dict[str, Any]] = []
    threads = ThreadPoolExecutor(THREADS)  # to compile, which takes longer than to measure
    compiling = [(case, threads.submit(calls_of, case, packages)) for case in cases()]
    for case, calls in compiling:
        if time.monotonic() - began > given.seconds:
            threads.shutdown(cancel_futures=True)
            break
        try:
            rows.append(measured(case, calls.result(), flush))
        except Exception as error:
            print(f"{case.label}: {failure(error)}", flush=True)
        given.out.write_text(
            json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}, indent=1)
        )
    print(report(rows))
    print(f"{len(rows)} of {len(cases())} cases, on {jax.devices()[0].device_kind}, jax {jax.__version__}")
    return int(any(row["slower"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
