"""Two worlds, one kernel: the bits by each way, the memory that is shared, and the time of a call."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import torch

import pallas_norm
import pallas_norm_torch
from demo.activations import Case, activations

CALLS = 50
BATCHES = 7


class Way(NamedTuple):
    name: str
    same_bits: bool  # as JAX's, by jax.jit on JAX's own copy of the operands
    call_us: float  # median host time; on a GPU without waiting for the device


class Bridge(NamedTuple):
    shape: tuple[int, int]
    explanation: str
    ways: list[Way]
    pointers_kept: bool  # to_jax and to_torch

    def failures(self) -> list[str]:
        found = [f"{way.name}: other bits than JAX's" for way in self.ways if not way.same_bits]
        return found if self.pointers_kept else [*found, "to_jax or to_torch copied what they were to share"]


def _call_us(call: Callable[[], Any]) -> float:
    def batch() -> float:
        started = time.perf_counter()
        for _ in range(CALLS):
            result = call()
        spent = (time.perf_counter() - started) / CALLS * 1e6
        if isinstance(result, jax.Array):
            result.block_until_ready()
        elif torch.cuda.is_available():
            torch.cuda.synchronize()
        return spent

    call()
    return sorted(batch() for _ in range(BATCHES))[BATCHES // 2]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def bridge(case: Case, rows: int) -> Bridge:
    """The first `rows` rows of a case, in torch's memory, through every way that a torch program has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, weight = (tensor.to(device) for tensor in activations(case))
    x = x[:rows].clone()
    norm = jax.jit(functools.partial(pallas_norm.rms_norm, eps=case.eps))
    arrays = [pallas_norm_torch.to_jax(tensor, copy=True) for tensor in (x, weight)]
    expected = pallas_norm_torch.to_torch(norm(*arrays))

    ways: dict[str, Callable[[], Any]] = {
        "pallas_norm.rms_norm under jax.jit": lambda: norm(*arrays),
        "pallas_norm_torch.rms_norm": lambda: pallas_norm_torch.rms_norm(x, weight, case.eps),
        "pallas_norm_torch.call_jax, through DLPack": lambda: pallas_norm_torch.call_jax(norm, x, weight),
    }
    found = []
    for name, call in ways.items():
        result = call()
        result = pallas_norm_torch.to_torch(result) if isinstance(result, jax.Array) else result
        found.append(Way(name, torch.equal(_bits(result), _bits(expected)), _call_us(call)))
    shared = pallas_norm_torch.to_jax(x)
    back = pallas_norm_torch.to_torch(shared)
    kept = shared.unsafe_buffer_pointer() == x.data_ptr() == back.data_ptr()
    return Bridge((rows, case.n), pallas_norm_torch.explain(case.n, x.dtype, x.device), found, kept)
