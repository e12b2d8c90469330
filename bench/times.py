"""Kernel times against the copy kernel of the same bytes and the peers that are installed, each in turn, cold L2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_norm

from .copy_kernel import copy
from .suite import TIMES, Case
from .timing import Flush, measure

EPS = 1e-6
Calls = dict[str, Callable[[], Any]]


def _operands(case: Case) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(case.n), 4)
    dtype = jnp.dtype(case.dtype)

    def draw(key: jax.Array, *shape: int) -> jax.Array:
        return jax.random.normal(key, shape, jnp.float32).astype(dtype)

    names = {"forward": ["x"], "add": ["x", "residual"], "backward": ["x", "dy"]}[case.operation]
    operands = {name: draw(key, case.rows, case.n) for name, key in zip(names, keys, strict=False)}
    return operands | {"weight": draw(keys[3], case.n)}


def _jax_calls(case: Case, operands: dict[str, jax.Array]) -> Calls:
    """Ours and XLA's compilation of the same formula."""
    calls: Calls = {}
    for provider, implementation in (("pallas-norm", "mosaic_gpu"), ("XLA", "xla")):
        norm = functools.partial(pallas_norm.rms_norm, eps=EPS, implementation=implementation)
        if case.operation == "backward":
            # rstd is an operand here, as it is in training: the residual that the forward pass saved.
            _, pullback = jax.vjp(norm, operands["x"], operands["weight"])
            calls[provider] = functools.partial(jax.jit(lambda pullback, dy: pullback(dy)), pullback, operands["dy"])
        elif case.operation == "add":
            add = functools.partial(pallas_norm.add_rms_norm, eps=EPS, implementation=implementation)
            calls[provider] = functools.partial(jax.jit(add), operands["x"], operands["residual"], operands["weight"])
        else:
            calls[provider] = functools.partial(jax.jit(norm), operands["x"], operands["weight"])
    return calls


def _torch_calls(case: Case, operands: dict[str, jax.Array]) -> Calls:
    try:
        import torch
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
    except ImportError:
        return {}
    if case.operation != "forward":
        return {}
    x, weight = (torch.from_dlpack(operands[name]) for name in ("x", "weight"))
    module = LlamaRMSNorm(case.n, eps=EPS).to(device=x.device, dtype=x.dtype)
    module.weight.data.copy_(weight)

    def without_grad(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return function()

        return call

    return {
        "HF eager": without_grad(lambda: module(x)),
        "F.rms_norm": without_grad(lambda: torch.nn.functional.rms_norm(x, (case.n,), weight, EPS)),
    }


def _bytes(case: Case) -> int:
    passes = {"forward": 2, "add": 4, "backward": 3}[case.operation]
    return passes * case.rows * case.n * jnp.dtype(case.dtype).itemsize


def time_case(case: Case, flush: Flush, repetitions: int) -> list[dict[str, Any]]:
    operands = _operands(case)
    inputs = [value for name, value in operands.items() if name != "weight"]
    outputs = 2 if case.operation == "add" else 1
    copies = jax.jit(functools.partial(copy, outputs=outputs))
    calls = {"copy": lambda: copies(inputs)} | _jax_calls(case, operands) | _torch_calls(case, operands)
    timings = measure(calls, repetitions=repetitions, flush=flush)
    return [
        {
            **case._asdict(),
            "provider": provider,
            "bytes": _bytes(case),
            "kernels": timing.kernels,
            "median_us": round(timing.median_us, 2),
            "samples_us": [round(sample, 2) for sample in timing.samples_us],
        }
        for provider, timing in timings.items()
    ]


def run(repetitions: int = 21) -> list[dict[str, Any]]:
    flush, rows = Flush(), []
    for case in TIMES:
        own = time_case(case, flush, repetitions)
        rows += own
        times = {row["provider"]: row["median_us"] for row in own}
        share = times["copy"] / times["pallas-norm"]
        print(f"{case.operation:8} {case.rows:7} x {case.n:6} {case.dtype:8} {share:5.3f} of copy  {times}", flush=True)
    return rows
