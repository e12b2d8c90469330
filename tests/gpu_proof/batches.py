"""Batches of direct-launch calls whose every result is compared on the device, in one comparison a batch.

The results of a batch are held until they were compared on the stream of their calls; only then their memory is given
back.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch

from pallas_norm_torch import add_rms_norm, rms_norm
from tests.gpu_proof.expected import HEADS, Case, bits
from tests.gpu_proof.operands import EPS

CALLS = 64  # of a batch
BACKWARDS = 16  # two launches each, and more host time

Tensors = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Row counts of a batch's calls, and views made once: of the operands, and of what must come of them."""

    case: Case
    counts: Sequence[int]
    xs: Tensors
    residuals: Tensors
    heads: Tensors

    @classmethod
    def of(cls, case: Case, draw: random.Random, *, ragged: bool) -> Pattern:
        counts = [draw.randint(1, case.rows) if ragged else case.rows for _ in range(CALLS)]
        xs, residuals = ([whole[:count] for count in counts] for whole in (case.x, case.residual))
        heads = [case.heads[: max(1, count // HEADS)] for count in counts]
        return cls(case, counts, xs, residuals, heads)

    def rows_of(self, whole: torch.Tensor) -> Tensors:
        return [whole[:count] for count in self.counts]


# --- kinds of calls: results, and what they must be -------------------------------------------------------------------

Made = tuple[Tensors, Callable[[], Tensors]]


def fresh(pattern: Pattern) -> Made:
    """A prepared call, into memory of its own."""
    weight = pattern.case.weight
    return [rms_norm(x, weight, EPS) for x in pattern.xs], lambda: pattern.rows_of(pattern.case.y)


def temporary(pattern: Pattern) -> Made:
    """Of operands that are freed at once, and whose memory the next call's operand takes."""
    weight = pattern.case.weight
    return [rms_norm(x.clone(), weight, EPS) for x in pattern.xs], lambda: pattern.rows_of(pattern.case.y)


def into_out(pattern: Pattern) -> Made:
    weight = pattern.case.weight
    found = [rms_norm(x, weight, EPS, out=torch.empty_like(x)) for x in pattern.xs]
    return found, lambda: pattern.rows_of(pattern.case.y)


def in_place(pattern: Pattern) -> Made:
    weight, found = pattern.case.weight, [x.clone() for x in pattern.xs]
    for y in found:
        rms_norm(y, weight, EPS, out=y)
    return found, lambda: pattern.rows_of(pattern.case.y)


def add(pattern: Pattern) -> Made:
    weight, found = pattern.case.weight, []
    for x, residual in zip(pattern.xs, pattern.residuals, strict=True):
        found += add_rms_norm(x, residual, weight, EPS)
    case = pattern.case

    def expected() -> Tensors:
        return [whole[:count] for count in pattern.counts for whole in (case.y_of_s, case.s)]

    return found, expected


def strided(pattern: Pattern) -> Made:
    """Heads of a fused projection, read where they lie."""
    case = pattern.case
    found = [rms_norm(heads, case.weight, EPS) for heads in pattern.heads]
    return [y.view(-1, case.n) for y in found], lambda: [case.y[: len(heads) * HEADS] for heads in pattern.heads]


def backward(pattern: Pattern) -> Made:
    case, counts = pattern.case, pattern.counts[:BACKWARDS]
    found: Tensors = []
    for count in counts:
        dx, dweight = case.backward(count)
        found += [dx, dweight[None]]

    def expected() -> Tensors:
        g = case.gradient
        return [part for count in counts for part in (g["dx"][:count], g["dweight"][count - 1 : count])]

    return found, expected


# kind -> (what makes a batch, calls of a batch, share of the batches)
KINDS: dict[str, tuple[Callable[[Pattern], Made], int, int]] = {
    "fresh": (fresh, CALLS, 50),
    "temporary operand": (temporary, CALLS, 14),
    "out": (into_out, CALLS, 10),
    "in place": (in_place, CALLS, 10),
    "residual": (add, CALLS, 10),
    "strided": (strided, CALLS, 3),
    "backward": (backward, BACKWARDS, 3),
}


class Comparer:
    """Counts wrong elements on the device; keeps what each pattern and kind must give, as one tensor."""

    def __init__(self, device: torch.device) -> None:
        self.wrong = {kind: torch.zeros((), dtype=torch.int64, device=device) for kind in (*KINDS, "graph")}
        self.elements = dict.fromkeys(self.wrong, 0)

    def compare(self, kind: str, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert found.shape == expected.shape
        self.wrong[kind] += (bits(found) != bits(expected)).sum()
        self.elements[kind] += found.numel()


def plant(results: Tensors) -> None:
    """One wrong bit in one element of one result."""
    raw = bits(results[len(results) // 2].view(-1))
    raw[-1:] ^= 1


def run(
    kind: str, pattern: Pattern, kept: dict[tuple[str, int], torch.Tensor], comparer: Comparer, *, planted: bool
) -> Tensors:
    """One batch; its results. `kept`: what was expected before of a kind and a pattern."""
    make = KINDS[kind][0]
    results, expected = make(pattern)
    if planted:
        plant(results)
    key = (kind if kind in ("residual", "strided", "backward") else "y", id(pattern))
    if key not in kept:
        kept[key] = torch.cat(expected())
    comparer.compare(kind, torch.cat(results), kept[key])
    return results
