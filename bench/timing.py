"""Device time of GPU kernels with a cold L2, and host time of calls: interleaved variants of one process, every sample
kept."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import cupti, pinned

FLUSH_BYTES = 256 << 20  # several times the 50 MB (H100) or 60 MB (H200) of L2
BATCH_S = 0.05
BATCH = 20  # calls in a row: JAX waits for the device where more than 32 are under way


class LostKernelsError(RuntimeError):
    """The record of kernels does not fit the calls."""


@dataclasses.dataclass(frozen=True)
class Timing:
    samples_us: list[float]
    kernels: int = 0  # of one call; the most, where calls differ. 0: no kernels were counted

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def spread_us(self) -> float:
        return spread(self.samples_us)

    def row(self) -> dict[str, Any]:
        return {
            "median_us": round(self.median_us, 3),
            "spread_us": round(self.spread_us, 3),
            "kernels": self.kernels,
            "samples_us": [round(sample, 3) for sample in self.samples_us],
        }


def spread(samples: Sequence[float]) -> float:
    """Half the distance between the quartiles; 0 for a single sample."""
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / 2


def geometric_mean(ratios: Sequence[float]) -> float:
    return statistics.geometric_mean(ratios)


def wait(value: Any) -> None:
    for leaf in jax.tree.leaves(value):
        if hasattr(leaf, "block_until_ready"):
            leaf.block_until_ready()
        elif hasattr(leaf, "is_cuda") and leaf.is_cuda:
            import torch

            torch.cuda.synchronize(leaf.device)


class Flush:
    """Empties L2: releases what a kernel asked to keep there, then writes and reads FLUSH_BYTES. Its kernels are the
    marks between the calls in a CUPTI record.

    A cosine, because XLA names kernels by what they compute, and no norm computes one.
    """

    def __init__(self) -> None:
        self._buffer = jnp.zeros((FLUSH_BYTES // 4,), jnp.float32)
        self._step = jax.jit(jnp.cos, donate_argnums=0)
        self()
        found: list[tuple[str, float]] = []
        with cupti.gpu_kernels(found):
            self()
        self.names = frozenset(name for name, _ in found)

    def __call__(self) -> None:
        pinned.release()
        self._buffer = self._step(self._buffer)
        self._buffer.block_until_ready()


def measure(variants: Mapping[str, Callable[[], Any]], *, repetitions: int, flush: Flush) -> dict[str, Timing]:
    """Device time of all kernels of a call. Each variant once per repetition, in turn, each after a flush; warmed up
    (compiled) first. Copies and memsets are no kernels."""
    for call in variants.values():
        for _ in range(2):
            wait(call())
    found: list[tuple[str, float]] = []
    with cupti.gpu_kernels(found):
        for _ in range(repetitions):
            for call in variants.values():
                flush()
                wait(call())
    return split(found, list(variants), flush.names, repetitions)


def split(
    found: Sequence[tuple[str, float]], names: Sequence[str], marks: frozenset[str], repetitions: int
) -> dict[str, Timing]:
    """A record of kernels, of `names` in turn, each call after a mark."""
    calls: list[list[float]] = []
    for name, time_us in found:
        if name in marks:
            calls.append([])
        elif calls:
            calls[-1].append(time_us)
        else:
            raise LostKernelsError(f"the kernel {name} was recorded before any flush")
    if len(calls) != repetitions * len(names):
        raise LostKernelsError(f"{len(calls)} flushes were recorded, {repetitions * len(names)} were run")
    timings = {}
    for i, name in enumerate(names):
        own = calls[i :: len(names)]
        if not all(own):
            raise LostKernelsError(f"no kernel of {name} was recorded in {own.count([])} of {len(own)} calls")
        timings[name] = Timing([sum(call) for call in own], max(map(len, own)))
    return timings


def measure_wall(variants: Mapping[str, Callable[[], Any]], *, repetitions: int) -> dict[str, Timing]:
    """Where there is no GPU: the time from a call to its result, variants in turn. No kernels, no cold cache."""
    for call in variants.values():
        wait(call())
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, call in variants.items():
            start = time.perf_counter_ns()
            wait(call())
            samples[name].append((time.perf_counter_ns() - start) / 1e3)
    return {name: Timing(times) for name, times in samples.items()}


def host_times(variants: Mapping[str, Callable[[], Any]], *, batches: int = 9, calls: int = BATCH) -> dict[str, Timing]:
    """Host time of one call, in batches without a wait between the calls: what a program pays that runs ahead of the
    device. One sample a batch, variants in turn; slow ones make fewer calls, so that a batch ends in BATCH_S."""
    counts = {}
    for name, call in variants.items():
        wait(call())
        start = time.perf_counter()
        wait(call())
        counts[name] = max(1, min(calls, int(BATCH_S / (time.perf_counter() - start))))
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(batches):
        for name, call in variants.items():
            start = time.perf_counter_ns()
            for _ in range(counts[name] - 1):
                call()
            last = call()
            samples[name].append((time.perf_counter_ns() - start) / 1e3 / counts[name])
            wait(last)
    return {name: Timing(times) for name, times in samples.items()}
