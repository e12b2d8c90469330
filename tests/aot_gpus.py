"""What the assembler says of every family of kernels, for a GPU that is not here: registers, spills, shared memory, and
in how many waves a grid runs.

    python -m tests.aot_gpus A100 [forward|backward [N ...]]    a line of JSON for each kernel
    python -m tests.aot_gpus H200 heads                         the same of the gradients of rotated heads
    python -m tests.aot_gpus write                              all of TARGETS, to bench/results/aot_gpus.json
    python -m tests.aot_gpus waves                              the table of docs/gpus.md, from that file

One process for each architecture: the assembler keeps the first one. Needs what tests/gpus.py needs, and ptxas on PATH.
"""

# ruff: noqa: T201

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import core
from jax.sharding import SingleDeviceSharding

from pallas_norm import _dispatch, _target
from pallas_norm._spec import Spec
from pallas_norm.kernels import backward, forward, rope_backward
from pallas_norm.plans.fitting import Misfit
from pallas_norm.plans.plan import BackwardPlan, Plan
from pallas_norm.plans.rope import rope_backward_plan_on
from pallas_norm.regimes import backward_plan_for
from tests import gpus

ROWS = (1 << 17) + 3  # many more than programs, some left over
REGISTERS = 65536  # of an SM
F32 = "float32"
HEADS = (32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 640)  # elements of one
SPEC = Spec()
WIDTHS = {
    "bfloat16": (
        *(64, 127, 128, 200, 512, 576, 768, 896, 1000, 1024, 2048, 2880, 4096, 5120, 7168, 8191, 8192, 16384),
        32768,
    ),
    "float16": (128, 4096),
    "float32": (64, 128, 576, 1000, 1024, 2048, 4096, 8192, 16384),
}


# A card of each architecture, and what the assembler calls that.
TARGETS = {"A100": "sm_80", "A10": "sm_86", "L40S": "sm_89", "H200": "sm_90a", "B200": "sm_100a", "RTX 5090": "sm_120a"}
RESULTS = Path(__file__).parents[1] / "bench" / "results" / "aot_gpus.json"
SHOWN = ("A100", "A10", "RTX 3090", "L4", "L40S", "RTX 4090", "H200", "B200", "RTX 5090")  # in the table of waves


class Kernel(NamedTuple):
    """One of a program; of a grid that is not persistent programs and waves are 0."""

    form: str
    n: int
    dtype: str
    source: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    programs: int
    resident: int  # CTAs that an SM holds
    waves: float


def missing() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    if (reason := gpus.missing()) is not None:
        return reason
    return None if shutil.which("ptxas") else "compiling for a GPU needs ptxas on PATH (wheel nvidia-cuda-nvcc)"


def forms(operation: str) -> list[tuple[str, ...]]:
    """The names of the operands."""
    if operation == "forward":
        return [("x", "weight"), ("x", "residual", "weight")]
    return [("x", "rstd", "dy", "weight"), ("x", "rstd", "dy", "weight", "ds")]


def _structs(names: tuple[str, ...], n: int, dtype: str, sharding: Any) -> dict[str, jax.ShapeDtypeStruct]:
    shapes, dtypes = {"weight": (n,), "rstd": (ROWS,)}, {"rstd": F32}
    return {
        name: jax.ShapeDtypeStruct(shapes.get(name, (ROWS, n)), dtypes.get(name, dtype), sharding=sharding)
        for name in names
    }


class Compiled(NamedTuple):
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int


def compiled(function: Callable[..., Any], structs: dict[str, Any], sharding: Any) -> list[Compiled]:
    """Each kernel of the program, from the assembler's own report, in the order in which they are compiled."""
    sizes: list[int] = []
    size_of = core._smem_tree_size
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(core, "_smem_tree_size", lambda tree: sizes.append(size_of(tree)) or sizes[-1]),
        mock.patch.dict(os.environ, {"MOSAIC_GPU_DUMP_TO": folder}),
    ):
        jitted = jax.jit(function, in_shardings=sharding, out_shardings=sharding)
        jitted.trace(structs).lower(lowering_platforms=("cuda",)).compile()
        found = []
        for report in sorted(Path(folder).glob("*.ptxas")):
            text, ptx = report.read_text(), report.with_suffix(".ptx").read_text()
            registers = max(map(int, re.findall(r"Used (\d+) registers", text)))
            spills = max(map(int, re.findall(r"(\d+) bytes spill stores", text)))
            found.append(Compiled(re.findall(r"\.target (\w+)", ptx)[0], registers, spills, max(sizes)))
    return found


def resident(card: gpus.Card, plan: Plan, registers: int, shared_bytes: int) -> int:
    """CTAs of that plan that an SM holds at a time."""
    threads = 128 * plan.warpgroups
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_memory = (card.shared_bytes + 1024) // (shared_bytes + 1024)
    return min(by_registers, by_memory, card.threads // threads, card.ctas)


def kernel_of(card: gpus.Card, operation: str, names: tuple[str, ...], n: int, dtype: str) -> Kernel | None:
    """None where the GPU has none. Of the backward pass without the sum of the partial dweights."""
    call = _dispatch.Call(operation, names, SPEC, with_rstd=True, with_dweight=True)
    (device,) = gpus.described(gpus.name_of(card))
    sharding = SingleDeviceSharding(device)
    structs = _structs(names, n, dtype, sharding)
    try:
        plan = call.plan_on(card.gpu, structs)
    except Misfit:
        return None

    def kernel(operands: dict[str, jax.Array]) -> Any:
        options: dict[str, Any] = {"spec": SPEC, "interpret": False}
        if isinstance(plan, BackwardPlan):
            return backward.partial_dweights(operands, plan=plan, with_dweight=True, **options)
        return forward.forward(operands, plan=plan, with_rstd=True, **options)

    with _target.in_mosaic(_target.Target(card.gpu, device)):
        (found,) = compiled(kernel, structs, sharding)
    held, programs = resident(card, plan, found.registers, found.shared_bytes), plan.programs or 0
    waves = programs * plan.cluster / (held * card.multiprocessors) if held else math.inf
    form = operation + ("+" if {"residual", "ds"} & {*names} else "")
    return Kernel(form, n, dtype, plan.source.value, *found, programs, held, round(waves, 2))


def every_kernel(card: gpus.Card, operations: tuple[str, ...], widths: tuple[int, ...] = ()) -> Iterator[Kernel]:
    for operation in operations:
        for names in forms(operation):
            for dtype, known in WIDTHS.items():
                for n in widths or known:
                    if (found := kernel_of(card, operation, names, n, dtype)) is not None:
                        yield found


def of_heads(card: gpus.Card) -> Iterator[Kernel]:
    """The gradients of rotated heads, without the sums of dweight; `form` has the dtype of the gradient."""
    (device,) = gpus.described(gpus.name_of(card))
    sharding = SingleDeviceSharding(device)
    for dtype, dy in (("bfloat16", "bfloat16"), ("bfloat16", F32), ("float16", "float16"), (F32, F32)):
        for n in HEADS:
            try:
                plan = rope_backward_plan_on(card.gpu, n, dtype, dy_dtype=dy)
            except Misfit:
                continue
            shapes = {"q": (ROWS, 8, n), "k": (ROWS, 2, n)}
            given = {name: (shape, dtype) for name, shape in shapes.items()}
            given |= {f"d{name}_out": (shape, dy) for name, shape in shapes.items()}
            given |= {"cos": ((ROWS, n), dy), "sin": ((ROWS, n), dy), "q_weight": ((n,), dy), "k_weight": ((n,), dy)}
            structs = {
                name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, (shape, kind) in given.items()
            }
            dtypes = SPEC.dtypes(jnp.dtype(dtype), weight=jnp.dtype(dy))
            options: dict[str, Any] = {"dtypes": dtypes, "spec": SPEC, "heads": None, "interpret": False}
            with _target.in_mosaic(_target.Target(card.gpu, device)):
                kernel = functools.partial(rope_backward.partial_dweights, plan=plan, **options)
                (found,) = compiled(kernel, structs, sharding)
            held = resident(card, plan, found.registers, found.shared_bytes)
            waves = round(plan.programs / (held * card.multiprocessors), 2) if held else math.inf
            yield Kernel(f"heads {dy}", n, dtype, plan.source.value, *found, plan.programs, held, waves)


@functools.cache
def report(name: str, *words: str) -> tuple[Kernel, ...]:
    """every_kernel of that card, or of_heads, from a process of its own."""
    command = [sys.executable, "-m", "tests.aot_gpus", name, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(Kernel(**json.loads(line)) for line in done.stdout.splitlines())


def recorded() -> dict[str, list[Kernel]]:
    """By card."""
    return {name: [Kernel(*row) for row in rows] for name, rows in json.loads(RESULTS.read_text())["cards"].items()}


def write(reports: dict[str, tuple[Kernel, ...]]) -> None:
    assembler = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True).stdout.split()[-1]
    head = {"jax": jax.__version__, "ptxas": assembler, "fields": Kernel._fields}
    with RESULTS.open("w") as file:
        print(json.dumps(head)[:-1] + ', "cards": {', file=file)
        for name, rows in reports.items():
            lines = ",\n".join(json.dumps(list(row)) for row in rows)
            print(f'"{name}": [\n{lines}]{"" if name == list(reports)[-1] else ","}', file=file)
        print("}}", file=file)


def waves() -> Iterator[str]:
    """Of the backward kernels with dweight, bfloat16; cards of one architecture have the same kernels."""
    found = recorded()
    yield f"| n | programs | {' | '.join(SHOWN)} |"
    yield f"|{'---|' * (len(SHOWN) + 2)}"
    for n in WIDTHS["bfloat16"]:
        row: list[str] = []
        for card in (gpus.CARDS[name] for name in SHOWN):
            like = next(name for name in found if gpus.CARDS[name].capability == card.capability)
            own = [one for one in found[like] if (one.form, one.n, one.dtype) == ("backward", n, "bfloat16")]
            row += [f"{one.programs / (one.resident * card.multiprocessors):.2f}" for one in own] or ["-"]
        programs = backward_plan_for(n, "bfloat16")
        if programs.cluster == 1:
            yield f"| {n} | {programs.programs} | {' | '.join(row)} |"


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    if name == "write":
        write({card: report(card) for card in TARGETS})
        sys.exit()
    if name == "waves":
        print("\n".join(waves()))
        sys.exit()
    if rest == ["heads"]:
        for kernel in of_heads(gpus.CARDS[name]):
            print(json.dumps(kernel._asdict()), flush=True)
        sys.exit()
    chosen = tuple(word for word in rest if word in ("forward", "backward")) or ("forward", "backward")
    for kernel in every_kernel(gpus.CARDS[name], chosen, tuple(int(word) for word in rest if word.isdigit())):
        print(json.dumps(kernel._asdict()), flush=True)
