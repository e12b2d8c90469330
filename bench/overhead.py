"""python -m bench overhead: what one call costs the host, by the ways to call, and what the first call costs.

The rows are few, so the device is never what a call waits for. `first_call_ms` is until the result is there, and
includes every compilation that no earlier row of the list has caused.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import pallas_norm

from . import baselines, peers, record, rounding, table, timing, torch_baselines
from .calls import AbsentError, Call, failure, module
from .operands import EPS, Operands
from .progress import Progress
from .suite import Case

CASE = Case("forward", 16, 4096)
BATCHES, CALLS = 25, 100


def _exchanged(operands: Operands) -> Call:
    """torch tensors through DLPack to the jitted JAX function, and back."""
    call_jax = torch_baselines.exported("call_jax")
    norm = jax.jit(functools.partial(pallas_norm.rms_norm, eps=EPS))
    return Call(functools.partial(call_jax, norm, operands.tensors["x"], operands.tensors["weight"]))


def _jax(operands: Operands, *, jitted: bool) -> Call:
    norm = functools.partial(pallas_norm.rms_norm, eps=EPS)
    return Call(functools.partial(jax.jit(norm) if jitted else norm, operands.arrays["x"], operands.arrays["weight"]))


def _with_out(operands: Operands) -> Call:
    norm, tensors = torch_baselines.exported("rms_norm"), operands.tensors
    y = module("torch").empty_like(tensors["x"])
    return Call(lambda: norm(tensors["x"], tensors["weight"], EPS, out=y))


def _empty_like(operands: Operands) -> Call:
    empty_like, x = module("torch").empty_like, operands.tensors["x"]
    return Call(lambda: empty_like(x), "no norm: what one output costs")


def _with_grad(factory: Callable[[Operands], Call], operands: Operands) -> Call:
    """The forward call that a training step makes, on leaves that require grad."""
    return factory(_leaves(operands))


def _grad(factory: Callable[[Operands], Call]) -> Callable[[Operands], Call]:
    return functools.partial(_with_grad, factory)


def _leaves(operands: Operands) -> Operands:
    """The same operands as leaves that require grad."""
    leaves = Operands(operands.case)
    leaves.arrays, leaves.tensors = operands.arrays, dict(operands.tensors)
    leaves.tensors["x"] = operands.tensors["x"].detach().requires_grad_()
    leaves.tensors["weight"] = module("torch").nn.Parameter(operands.tensors["weight"].detach())
    return leaves


def _both(factory: Callable[[Operands], Call]) -> Callable[[Operands], Call]:
    """The forward and the backward call of a training step: dx and dweight."""

    def make(operands: Operands) -> Call:
        leaves = _leaves(operands)
        forward, grad = factory(leaves), module("torch").autograd.grad
        inputs = leaves.tensors["x"], leaves.tensors["weight"]
        dy = module("torch").ones_like(operands.tensors["x"])
        return Call(lambda: grad(forward(), inputs, dy), "dx and dweight too")

    return make


def _in_place(operands: Operands) -> Call:
    norm, weight = torch_baselines.exported("rms_norm"), operands.tensors["weight"]
    x = operands.tensors["x"].clone()
    return Call(lambda: norm(x, weight, EPS, out=x), "x itself receives y")


def _add(operands: Operands) -> Call:
    norm, tensors = torch_baselines.exported("add_rms_norm"), operands.tensors
    return Call(lambda: norm(tensors["x"], tensors["x"], tensors["weight"], EPS), "two outputs")


def _strided(operands: Operands) -> Call:
    norm, columns = torch_baselines.exported("rms_norm"), _columns(operands)
    return Call(lambda: norm(columns, operands.tensors["weight"], EPS), "columns of a wider tensor")


def _functional_strided(operands: Operands) -> Call:
    norm, columns = module("torch").nn.functional.rms_norm, _columns(operands)
    return Call(lambda: norm(columns, columns.shape[-1:], operands.tensors["weight"], EPS), "columns of a wider tensor")


def _columns(operands: Operands) -> Any:
    x = operands.tensors["x"]
    rows, n = x.shape
    return x.new_empty(rows, n + 128)[:, :n].copy_(x)


WAYS: dict[str, Callable[[Operands], Call]] = {
    "torch.empty_like": _empty_like,
    "pallas-norm torch": torch_baselines.ours,
    "pallas-norm torch, out=": _with_out,
    "pallas-norm torch, in place": _in_place,
    "pallas-norm torch, add": _add,
    "pallas-norm torch, strided": _strided,
    "pallas-norm torch, grad": _grad(torch_baselines.ours),
    "pallas-norm torch, forward and backward": _both(torch_baselines.ours),
    "pallas-norm by DLPack": _exchanged,
    "pallas-norm, jax.jit": functools.partial(_jax, jitted=True),
    "pallas-norm, JAX without jit": functools.partial(_jax, jitted=False),
    "F.rms_norm": torch_baselines.functional,
    "F.rms_norm, strided": _functional_strided,
    "F.rms_norm, grad": _grad(torch_baselines.functional),
    "F.rms_norm, forward and backward": _both(torch_baselines.functional),
    "HF eager": torch_baselines.hugging_face,
    "HF eager, grad": _grad(torch_baselines.hugging_face),
    "torch.compile": torch_baselines.compiled,
    "XLA, jax.jit": baselines.BASELINES["XLA"],
    "Liger": peers.liger,
    "Liger, grad": _grad(peers.liger),
    "Liger, forward and backward": _both(peers.liger),
    "Liger functional": peers.liger_functional,
    "Quack": peers.quack,
    "SGLang": peers.sglang,
    "FlashInfer": peers.flashinfer,
}


FIRST_CALL = """
import time, torch, pallas_norm_torch
x, weight = torch.zeros(16, 4096, device="cuda").bfloat16(), torch.ones(4096, device="cuda").bfloat16()
torch.cuda.synchronize()
start = time.perf_counter()
pallas_norm_torch.rms_norm(x, weight)
torch.cuda.synchronize()
print(1e3 * (time.perf_counter() - start))
"""


def _first_calls(processes: int = 3) -> dict[str, list[float]]:
    """Milliseconds of the first call of a new process, after its imports: with nothing in the disk cache, and with
    the kernel there."""
    found: dict[str, list[float]] = {"empty": [], "filled": []}
    for _ in range(processes):
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"XDG_CACHE_HOME": folder}
            for cache in found:
                command = [sys.executable, "-c", FIRST_CALL]
                output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
                found[cache].append(round(float(output), 1))
    return found


def run(out: Path, *, commit: str | None = None, ways: dict[str, Callable[[Operands], Call]] | None = None) -> int:
    """Measures every way, in turn; 1 where one of ours failed."""
    ways = WAYS if ways is None else ways
    options = {"case": CASE.label, "batches": BATCHES, "calls": CALLS}
    out.unlink(missing_ok=True)  # first calls are first once in a process: nothing to continue
    file = record.begin(out, "overhead", record.HOST_TIME, options, commit)
    operands, progress = Operands(CASE), Progress(len(ways))
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name, factory in ways.items():
        row = rows[name] = {"key": CASE.label, "provider": name, "status": "measured"}
        try:
            call = factory(operands)
            start = time.perf_counter_ns()
            timing.wait(result := call())
            row["first_call_ms"] = round((time.perf_counter_ns() - start) / 1e6, 2)
            if call.note:
                row["note"] = call.note
            else:
                row |= rounding.judge(operands, rounding.outputs_of(operands, result))
            calls[name] = call
        except AbsentError as absent:
            row |= {"status": "absent", "reason": str(absent)}
        except Exception as error:
            row |= {"status": "failed", "reason": failure(error)}
        progress.step(name)
    progress.close()
    for name, found in timing.host_times(calls, batches=BATCHES, calls=CALLS).items():
        rows[name] |= found.row()
        del rows[name]["kernels"]
    if jax.default_backend() == "gpu" and "pallas-norm torch" in ways:
        file["first_call_of_a_process_ms"] = _first_calls()
    file["rows"] = list(rows.values())
    record.write(out, file)
    print(table.of_overhead(file))
    print(f"wrote {out}")
    return int(any(row["status"] == "failed" and name.startswith("pallas-norm") for name, row in rows.items()))
