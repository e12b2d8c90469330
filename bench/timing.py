"""Device time of GPU kernels with a cold L2: interleaved variants of one process, every sample kept."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_norm import _compat

FLUSH_BYTES = 256 << 20  # several times the 50 MB (H100) or 60 MB (H200) of L2


@dataclasses.dataclass(frozen=True)
class Timing:
    samples_us: list[float]  # device time of all kernels of one call
    kernels: int  # of one call

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def spread_us(self) -> float:
        """Half the distance between the quartiles."""
        low, _, high = statistics.quantiles(self.samples_us, n=4)
        return (high - low) / 2


def _wait(value: Any) -> None:
    for leaf in jax.tree.leaves(value):
        if hasattr(leaf, "block_until_ready"):
            leaf.block_until_ready()
        elif hasattr(leaf, "is_cuda") and leaf.is_cuda:
            import torch

            torch.cuda.synchronize(leaf.device)


class Flush:
    """Empties L2: writes and reads FLUSH_BYTES. Its kernels are the marks between the calls in a CUPTI record."""

    def __init__(self) -> None:
        self._buffer = jnp.zeros((FLUSH_BYTES // 4,), jnp.float32)
        self._step = jax.jit(lambda buffer: buffer * 1.0001 + 1.0, donate_argnums=0)
        self()
        found: list[tuple[str, float]] = []
        with _compat.gpu_kernels(found):
            self()
        self.names = frozenset(name for name, _ in found)

    def __call__(self) -> None:
        self._buffer = self._step(self._buffer)
        self._buffer.block_until_ready()


def measure(variants: Mapping[str, Callable[[], Any]], *, repetitions: int, flush: Flush) -> dict[str, Timing]:
    """Each variant once per repetition, in turn, each after a flush. Variants are warmed up (compiled) first."""
    for call in variants.values():
        for _ in range(2):
            _wait(call())
    found: list[tuple[str, float]] = []
    with _compat.gpu_kernels(found):
        for _ in range(repetitions):
            for call in variants.values():
                flush()
                _wait(call())
    calls: list[list[float]] = []
    for name, time_us in found:
        if name in flush.names:
            calls.append([])
        else:
            calls[-1].append(time_us)
    if len(calls) != repetitions * len(variants):
        raise RuntimeError(f"{len(calls)} flushes were recorded, {repetitions * len(variants)} were run")
    timings = {}
    for i, name in enumerate(variants):
        own = calls[i :: len(variants)]
        counts = {len(call) for call in own}
        if len(counts) != 1:
            raise RuntimeError(f"{name}: {sorted(counts)} kernels in different calls")
        timings[name] = Timing([sum(call) for call in own], counts.pop())
    return timings
