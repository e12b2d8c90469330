"""The text of the kernels that Mosaic compiles, as hashes: where a change of the sources is to change no kernel, these
show that it changed none.

One row length of each plan, in every form that a call can take, and the forms whose numbers come with the launch.
Printed without locations, the text is reproducible and does not depend on where a line of source is. Needs no GPU.
"""

# ruff: noqa: T201

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.interpreters import mlir
from jax._src.lib import mosaic_gpu_dialect
from jax.experimental.mosaic.gpu import core
from jaxlib.mlir import ir, passmanager

from pallas_norm import add_rms_norm, rms_norm
from pallas_norm._spec import Spec
from pallas_norm.plans.lengths import LARGEST_N, SMALLEST_N
from pallas_norm.plans.plan import Plan
from pallas_norm.regimes import backward_plan_for, plan_for

HERE = Path(__file__).parent
DATA = HERE / "data"
NUMBER = re.compile(r', mosaic_gpu.dump_basename = "kernel_\d+"')  # 0.11's, of the kernels of this process
PROGRAMS = HERE.parent / "interop" / "pallas_norm_torch" / "programs.py"
ROWS = 1033  # full blocks of every plan, and rows that fill none


class Case(NamedTuple):
    form: str
    dtype: str
    n: int

    def __str__(self) -> str:
        return f"{self.form} {self.dtype} {self.n}"


# --- which row lengths ------------------------------------------------------------------------------------------------


def _shape(plan: Plan) -> tuple[Any, ...]:
    """The numbers of a plan that n alone does not give: rows of one shape differ in constants and in repetitions."""
    return dataclasses.replace(plan, n=0), plan.overlap > 0


def _kind(plan: Plan) -> tuple[Any, ...]:
    """What decides which statements a kernel has."""
    shared = plan.warpgroups > 1, plan.cluster > 1
    kept = plan.rows_in_registers, getattr(plan, "keeps_weight", None)
    return plan.regime, *shared, plan.block > 1, plan.overlap > 0, plan.source, *kept


@functools.cache
def lengths(itemsize: int, dy_itemsize: int, key: Callable[[Plan], tuple[Any, ...]], *, residual: bool) -> list[int]:
    """The smallest row length of each plan, forward and backward, that `key` tells from the others."""
    dtype, dy_dtype = ({2: "bfloat16", 4: "float32"}[size] for size in (itemsize, dy_itemsize))
    seen: set[tuple[Any, ...]] = set()
    found: list[int] = []
    for n in range(SMALLEST_N, LARGEST_N + 1):
        forward = plan_for(n, dtype, residual=residual)
        backward = backward_plan_for(n, dtype, dy_dtype=dy_dtype, residual=residual)
        keys = {("forward", *key(forward)), ("backward", *key(backward))}
        if not keys <= seen:
            found.append(n)
            seen |= keys
    return found


# --- in which forms ---------------------------------------------------------------------------------------------------


def _array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _both_ways(case: Case, *, rows: int = ROWS, weight_dtype: Any = None, **options: Any) -> Iterator[bytes]:
    x, weight = _array(rows, case.n, dtype=case.dtype), _array(case.n, dtype=weight_dtype or case.dtype)
    norm = functools.partial(rms_norm, return_rstd=True, **options)
    dy, _ = jax.eval_shape(norm, x, weight)

    def gradients(x: Any, weight: Any, dy: Any) -> Any:
        (y, rstd), pullback = jax.vjp(norm, x, weight)
        return y, rstd, pullback((dy, jnp.zeros_like(rstd)))

    yield from modules(gradients, x, weight, dy)


def _with_residual(case: Case) -> Iterator[bytes]:
    x, weight = _array(ROWS, case.n, dtype=case.dtype), _array(case.n, dtype=case.dtype)

    def gradients(x: Any, residual: Any, weight: Any, dy: Any) -> Any:
        results, pullback = jax.vjp(functools.partial(add_rms_norm, return_rstd=True), x, residual, weight)
        return results, pullback((dy, x, jnp.zeros_like(results[-1])))

    yield from modules(gradients, x, x, weight, x)


def _without_dweight(case: Case) -> Iterator[bytes]:
    x, weight = _array(ROWS, case.n, dtype=case.dtype), _array(case.n, dtype=case.dtype)

    def gradient(x: Any, weight: Any, dy: Any) -> Any:
        return jax.vjp(lambda x: rms_norm(x, weight), x)[1](dy)

    def with_ds(x: Any, residual: Any, weight: Any, dy: Any) -> Any:
        return jax.vjp(lambda x: add_rms_norm(x, residual, weight), x)[1]((dy, x))

    yield from modules(gradient, x, weight, x)
    yield from modules(with_ds, x, x, weight, x)


def _without_weight(case: Case) -> Iterator[bytes]:
    x = _array(ROWS, case.n, dtype=case.dtype)
    yield from modules(lambda x, dy: jax.vjp(rms_norm, x)[1](dy), x, x)
    yield from modules(lambda x: rms_norm(x), x)


@functools.cache
def _programs() -> Any:
    """The module that describes the direct launch's kernels; its package would import torch."""
    spec = importlib.util.spec_from_file_location("_programs_of_the_direct_launch", PROGRAMS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _launched(case: Case) -> Iterator[bytes]:
    """The kernels of the direct launch, whose row counts and strides come with the launch."""
    program, dtype, f32 = _programs().Program, case.dtype, "float32"
    x, weight, residual = ("x", dtype), ("weight", dtype), ("residual", dtype)
    rstd, dy, ds = ("rstd", f32), ("dy", dtype), ("ds", dtype)
    for strided in (False, True):
        yield from _launch(program("forward", case.n, (x, weight), ("y", "rstd"), Spec(), strided))
        yield from _launch(program("forward", case.n, (x, residual, weight), ("y", "s"), Spec(), strided))
    yield from _launch(program("backward", case.n, (x, rstd, dy, weight), ("dx", "dweight"), Spec(eps=0.0)))
    yield from _launch(program("backward", case.n, (x, rstd, dy, weight, ds), ("dx",), Spec(eps=0.0)))
    parts = (("parts", f32),)
    yield from _launch(program("column_sum", case.n, parts, ("dweight",), Spec(), dweight_dtype=dtype))


def _launch(program: Any) -> Iterator[bytes]:
    yield from modules(program.function(), *program.structs)


# Of each plan; and where what differs is the statements around it, of each kind of plan. A float16 has the plans of a
# bfloat16.
Form = Callable[[Case], Iterator[bytes]]
EVERY_PLAN: dict[str, tuple[Form, tuple[str, ...]]] = {
    "gradients": (_both_ways, ("bfloat16", "float32")),
    "residual": (_with_residual, ("bfloat16", "float32")),
}
EVERY_KIND: dict[str, tuple[Form, tuple[str, ...]]] = {
    "half": (_both_ways, ("float16",)),
    "no-dweight": (_without_dweight, ("bfloat16", "float32")),
    "no-weight": (_without_weight, ("bfloat16", "float32")),
    "float32-weight": (functools.partial(_both_ways, weight_dtype="float32"), ("bfloat16",)),  # and so dy is one
    "rounded-once": (functools.partial(_both_ways, cast_before_scale=False, weight_offset=1.0), ("bfloat16",)),
    "full-blocks": (functools.partial(_both_ways, rows=1024), ("bfloat16",)),
    "one-row": (functools.partial(_both_ways, rows=1), ("bfloat16",)),
    "launch": (_launched, ("bfloat16", "float32")),
}
FORMS = EVERY_PLAN | EVERY_KIND


def cases(*, kinds_only: bool = False) -> Iterator[Case]:
    for form, (_, dtypes) in FORMS.items():
        for dtype in dtypes:
            key = _shape if form in EVERY_PLAN and not kinds_only else _kind
            itemsize = jnp.dtype(dtype).itemsize
            dy_itemsize = 4 if form == "float32-weight" else itemsize
            for n in lengths(itemsize, dy_itemsize, key, residual=form == "residual"):
                yield Case(form, dtype, n)


def modules_of(case: Case) -> Iterator[bytes]:
    return FORMS[case.form][0](case)


# --- their text -------------------------------------------------------------------------------------------------------


def modules(function: Callable[..., Any], *operands: Any) -> list[bytes]:
    """Each Mosaic GPU kernel in the program that `function` becomes for CUDA."""
    lowered = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).compiler_ir()
    found: list[bytes] = []

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            found.append(operation.attributes["mhlo.backend_config"]["module"].value_bytes)
        return ir.WalkResult.ADVANCE

    with lowered.context:
        lowered.operation.walk(visit)
    return found


def text(module: bytes, *, raw: bool = False) -> str:
    """After the compiler's first steps, in which goes what is never used and what was computed before; or raw, as it is
    given to the compiler."""
    context = mlir.make_ir_context()
    mosaic_gpu_dialect.register_dialect(context)
    with context, ir.Location.unknown():
        context.allow_unregistered_dialects = True
        parsed = ir.Module.parse(module)
        if not raw:
            parsed = core._run_serde_pass(parsed, serialize=False)
            passmanager.PassManager.parse("builtin.module(canonicalize,cse)").run(parsed.operation)
        return NUMBER.sub("", str(parsed))


def digest(case: Case) -> str:
    """How many kernels the case has, and a hash of their text."""
    found = [text(module) for module in modules_of(case)]
    assert found, "the program has no kernel"
    joined = "\0".join(found).encode()
    return f"{len(found)} {hashlib.sha256(joined).hexdigest()[:12]}"


def recorded() -> Path:
    """What the kernels are with this JAX, a line a case."""
    return DATA / f"kernel_text_{jax.__version__}.txt"


def expected() -> dict[Case, str]:
    lines = (line.split(maxsplit=3) for line in recorded().read_text().splitlines())
    return {Case(form, dtype, int(n)): found for form, dtype, n, found in lines}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/kernel-text", description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="record the texts of this JAX in tests/data, of every plan that there is"
    )
    parser.add_argument(
        "--kinds", action="store_true", help="of --write: a row length of each kind of plan, not of each plan"
    )
    parser.add_argument("--every", type=int, default=1, metavar="K", help="only every K-th case of those recorded")
    parser.add_argument("--show", metavar="CASE", help='print the texts of one case, such as "launch bfloat16 4096"')
    parser.add_argument("--raw", action="store_true", help="of --show: as it is given to the compiler")
    given = parser.parse_args(words)
    if given.show is not None:
        form, dtype, n = given.show.split()
        for module in modules_of(Case(form, dtype, int(n))):
            print(text(module, raw=given.raw))
        return 0
    if given.write:
        # Put in its place when it is whole: two at once had made one file of both.
        begun = recorded().with_suffix(f".{os.getpid()}")
        with begun.open("w") as file:
            for case in cases(kinds_only=given.kinds):
                print(case, digest(case), file=file, flush=True)
        begun.replace(recorded())
    before = expected()
    chosen = list(before)[:: given.every]
    differ = list(differing(chosen, before))
    for case, digests in differ:
        print(f"{case}: {digests}, recorded was {before[case]}")
    kernels = sum(int(before[case].split()[0]) for case in chosen)
    print(
        f"jax {jax.__version__}: {len(chosen)} of {len(before)} cases recorded, {kernels} kernels, {len(differ)} differ"
    )
    return 1 if differ else 0


def differing(chosen: list[Case], before: dict[Case, str]) -> Iterator[tuple[Case, str]]:
    for case in chosen:
        found = digest(case)
        if before.get(case) != found:
            yield case, found


if __name__ == "__main__":
    sys.exit(main())
