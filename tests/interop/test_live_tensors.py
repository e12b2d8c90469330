"""Calls of every kind, in any order, on tensors that share memory, while others live on and die: all bytes stay those
of a replay on plain copies."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pallas_norm_torch import add_rms_norm, call_jax, rms_norm, to_jax, to_torch
from tests.interop.cases import assert_same
from tests.interop.tensors import N, filled, plain
from tests.strategies import examples

Tensor = torch.Tensor
DTYPES = (torch.bfloat16, torch.float32)
LENGTH = 6 * N  # of a buffer
# Shape, strides, offset: whole rows, a part of them, every other one, columns of wider ones, transposed, expanded.
VIEWS = (
    ((6, N), (N, 1), 0),
    ((3, N), (N, 1), 2 * N),
    ((3, N), (2 * N, 1), N),
    ((2, N), (3 * N, 1), 5),
    ((3, N), (1, 3), 0),
    ((3, N), (0, 1), N),
)
DISTINCT = VIEWS[:-1]
seeds, views, distinct = st.integers(0, 2**16), st.sampled_from(VIEWS), st.sampled_from(DISTINCT)
which = st.integers(0, 7)


class LiveTensors(RuleBasedStateMachine):
    """`live` holds buffers and results, `shadows` what they must be: fresh memory that no call of ours sees."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Tensor] = []
        self.shadows: list[Tensor] = []

    @initialize(dtype=st.sampled_from(DTYPES), weight_dtype=st.sampled_from(DTYPES), seed=seeds)
    def start(self, dtype: torch.dtype, weight_dtype: torch.dtype, seed: int) -> None:
        self.weight = filled(N, weight_dtype, seed)
        self.make(dtype, seed)

    def keep(self, tensor: Tensor, expected: Tensor) -> None:
        self.live.append(tensor)
        self.shadows.append(expected)

    def buffer(self, index: int) -> tuple[Tensor, Tensor]:
        """One that all of VIEWS fit into, and its shadow."""
        found = [pair for pair in zip(self.live, self.shadows, strict=True) if pair[0].numel() == LENGTH]
        return found[index % len(found)]

    @precondition(lambda self: len(self.live) < 12)
    @rule(dtype=st.sampled_from(DTYPES), seed=seeds)
    def make(self, dtype: torch.dtype, seed: int) -> None:
        self.keep(filled(LENGTH, dtype, seed), filled(LENGTH, dtype, seed))

    @rule(index=which, view=views, weighted=st.booleans())
    def norm(self, index: int, view: tuple, weighted: bool) -> None:  # noqa: FBT001
        live, shadow = self.buffer(index)
        weight = self.weight if weighted else None
        y = rms_norm(live.as_strided(*view), weight)
        self.keep(y, rms_norm(plain(shadow.as_strided(*view)), weight).clone())

    @rule(index=which, view=views, other=views)
    def add(self, index: int, view: tuple, other: tuple) -> None:
        live, shadow = self.buffer(index)
        if view[0] != other[0]:
            return
        results = add_rms_norm(live.as_strided(*view), live.as_strided(*other), self.weight)
        copies = (plain(shadow.as_strided(*where)) for where in (view, other))
        for found, expected in zip(results, add_rms_norm(*copies, self.weight), strict=True):
            self.keep(found, expected.clone())

    @rule(index=which, view=distinct)
    def in_place(self, index: int, view: tuple) -> None:
        live, shadow = self.buffer(index)
        x = live.as_strided(*view)
        assert rms_norm(x, out=x) is x
        there = shadow.as_strided(*view)
        there.copy_(rms_norm(plain(there)))

    @rule(index=which, into=which, view=views, place=distinct)
    def out(self, index: int, into: int, view: tuple, place: tuple) -> None:
        (live, shadow), (target, target_shadow) = self.buffer(index), self.buffer(into)
        if live is target or live.dtype != target.dtype or view[0] != place[0]:
            return
        rms_norm(live.as_strided(*view), out=target.as_strided(*place))
        target_shadow.as_strided(*place).copy_(rms_norm(plain(shadow.as_strided(*view))))

    @rule(index=which, view=views, seed=seeds, overwritten=st.booleans())
    def gradients(self, index: int, view: tuple, seed: int, overwritten: bool) -> None:  # noqa: FBT001
        live, shadow = self.buffer(index)
        x, weight = live.as_strided(*view).requires_grad_(), self.weight.clone().requires_grad_()
        y = rms_norm(x, weight)
        dy = filled(y.numel(), y.dtype, seed).view(y.shape)
        if overwritten and view in DISTINCT:  # what backward needs has gone, and autograd has to say so
            rows = x.detach()
            rms_norm(rows, out=rows)
            shadow.as_strided(*view).copy_(rms_norm(plain(shadow.as_strided(*view))))
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(y, (x, weight), dy)
            return
        found = torch.autograd.grad(y, (x, weight), dy)
        copies = plain(shadow.as_strided(*view)).requires_grad_(), self.weight.clone().requires_grad_()
        expected = torch.autograd.grad(rms_norm(*copies), copies, dy.clone())
        for gradient, right in zip(found, expected, strict=True):
            self.keep(gradient, right.clone())

    @rule(index=which)
    def to_jax_and_back(self, index: int) -> None:
        live = self.live[index % len(self.live)]
        back = to_torch(to_jax(live, copy=True))
        self.keep(back, self.shadows[index % len(self.live)].clone())

    @rule(index=which)
    def through_a_function_of_arrays(self, index: int) -> None:
        found = call_jax(lambda array: array + array, self.live[index % len(self.live)])
        shadow = self.shadows[index % len(self.shadows)]
        self.keep(found, shadow + shadow)

    @precondition(lambda self: len(self.live) > 1)
    @rule(index=which)
    def delete(self, index: int) -> None:
        at = 1 + index % (len(self.live) - 1)  # the first is a buffer, which the other rules want
        del self.live[at], self.shadows[at]
        gc.collect()

    @invariant()
    def every_byte_is_that_of_the_replay(self) -> None:
        for live, shadow in zip(self.live, self.shadows, strict=True):
            nan = live.isnan() & shadow.isnan()
            assert_same(live.masked_fill(nan, 0), shadow.masked_fill(nan, 0))


TestLiveTensors = LiveTensors.TestCase
# Every mix of shape and dtypes compiles, so there are few dtypes and few examples, of many steps.
TestLiveTensors.settings = settings(examples(0.06), stateful_step_count=20)
