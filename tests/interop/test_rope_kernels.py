"""The kernel of rms_norm_rope: what it reads as it lies, when it is left out, and how it is tried and lowered, by fake
kernels; on a GPU its launch, which gives the bits of the steps."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import pallas_norm
from pallas_norm.kernels.launch_arguments import COUNT
from pallas_norm.kernels.rope import NUMBERS
from pallas_norm.plans.hardware import H200
from pallas_norm_torch import direct, launch, rms_norm_rope
from pallas_norm_torch._kernels import Rope
from pallas_norm_torch.launch import arguments, lowering, proof
from pallas_norm_torch.programs import Program
from tests.interop.cases import DTYPES
from tests.interop.fake_kernels import FakeKernel
from tests.interop.fake_kernels import made as made
from tests.interop.rope_cases import check, operands
from tests.interop.test_launch import launches, text_of

Tensor = torch.Tensor


@pytest.mark.parametrize("n", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_reads_q_and_k_where_they_lie(made: dict[Program, FakeKernel], dtype: torch.dtype, n: int) -> None:
    q, k, cos, sin, *weights = operands(n, dtype)
    check(q, k, cos, sin, *weights)  # tokens of both axes lie at one stride
    check(q[1], k[1], cos, sin, *weights)
    check(q[:, :, :1], k[..., :1, :], cos, sin)
    (kernel, bare) = [kernel for kernel in made.values() if kernel.program.kind == "rope"]
    stream, _, named = kernel.launches[0]
    assert stream == 99
    for name, x in (("q", q), ("k", k)):  # nothing was copied
        assert named[name] + named[f"{name}_offset"] // COUNT * x.element_size() == x.data_ptr()
    assert len(kernel.launches) == 2
    assert len(bare.launches) == 1
    rms_norm_rope(q[:0], k[:0], cos, sin, *weights)
    assert len(kernel.launches) == 2  # no rows, no launch


@pytest.mark.usefixtures("made")
def test_heads_on_one_side_only_are_computed_there() -> None:
    """A launch that was left out returned the memory of the others as it was."""
    q, k, cos, sin, *weights = operands(64, torch.bfloat16)
    for heads in ((0, 2), (2, 0), (0, 0)):
        check(q[..., : heads[0], :], k[..., : heads[1], :], cos, sin, *weights)
        check(q[..., : heads[0], :], k[..., : heads[1], :], cos, sin)


def test_what_a_kernel_cannot_read_as_it_lies_is_copied(made: dict[Program, FakeKernel]) -> None:
    q, k, cos, sin, *weights = operands(64, torch.bfloat16, tokens=(3, 4))
    check(q[:, 1:], k[:, 1:], cos[1:], sin[1:], *weights)  # tokens at two strides
    check(q[..., ::2], k[..., ::2], cos[..., ::2], sin[..., ::2], *(one[::2] for one in weights))
    shifted = [torch.cat([one.new_zeros(3), one.flatten()])[3:].view(one.shape) for one in (q, k, cos, sin, *weights)]
    check(*shifted)
    (kernel,) = [kernel for kernel in made.values() if kernel.program.kind == "rope" and kernel.program.n == 64]
    assert len(kernel.launches) == 2
    _, _, named = kernel.launches[-1]
    assert named["q"] % 16 == 0  # a copy begins at a vector
    assert named["q_offset"] == 0


def test_heads_that_no_kernel_rotates_are_normalised_by_one(made: dict[Program, FakeKernel]) -> None:
    given = operands(80, torch.bfloat16)
    rms_norm_rope(*given)
    assert {program.kind for program in made} == {"forward"}
    check(*given)


def test_a_kernel_that_is_not_what_it_should_be_is_replaced(
    made: dict[Program, FakeKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(program: Program, device: int) -> Any:
        raise launch.Unavailable("planted")

    given = operands(64, torch.bfloat16)
    monkeypatch.setattr(launch, "kernel", refused)
    check(*given)
    assert not made


def test_the_norms_kernel_outlives_that_of_the_rotation(
    made: dict[Program, FakeKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, own = list[Program](), launch.kernel

    def refused(program: Program, device: int) -> Any:
        asked.append(program)
        if program.kind == "rope":
            raise launch.Unavailable("planted")
        return own(program, device)

    monkeypatch.setattr(launch, "kernel", refused)
    for _ in range(2):
        check(*operands(64, torch.bfloat16))
    assert {program.kind for program in made} == {"forward"}
    assert sum(program.kind == "rope" for program in asked) == 1  # it is remembered
    assert not any(direct._refused.values())
    assert sum(len(kernel.launches) for kernel in made.values()) == 8  # of q and k, by themselves and in the steps


@pytest.mark.usefixtures("made")  # for CPU addresses
def test_a_trial_run_finds_a_wrong_kernel_and_only_that() -> None:
    spec = pallas_norm._spec.Spec()
    for n, weight in ((64, None), (128, torch.bfloat16), (96, torch.float32), (256, torch.bfloat16)):
        program = Rope(n, torch.bfloat16, weight, spec).program(H200)
        for off, right in ((0.0, True), (1.0, False)):
            kernel: Any = FakeKernel(program, off=off)
            verdict = proof.CHECKS["rope"](kernel, program, torch.device("cpu"), 0)
            assert verdict == {"q_out": right, "k_out": right}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32, None], ids=str)
@pytest.mark.parametrize("n", [64, 96, 128, 256])
def test_a_program_lowers_to_one_kernel(n: int, weight: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_without_backends", lambda gpu: contextlib.nullcontext())  # as in test_launch
    program = Rope(n, torch.bfloat16, weight, pallas_norm._spec.Spec()).program(H200)
    module, addresses = lowering.module_of(program)
    assert addresses == (4 if weight is None else 6) + len(NUMBERS) + 2
    text = text_of(module)
    # A check that knew of rows, not of those of q and of k, refused every kernel.
    assert launches(module) == [arguments.nominal_grid(program)]
    assert "memref.load" not in "".join(line for line in text.splitlines() if "memref<1xi32>" in line)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_the_launched_kernel_gives_the_bits_of_the_steps(dtype: torch.dtype, n: int) -> None:
    q, k, cos, sin, *weights = operands(n, dtype, tokens=(3, 37), device="cuda")
    check(q, k, cos, sin, *weights)
    check(q[:, 5:], k[:, 5:], cos[5:], sin[5:], *weights)
    check(q[0, :1], k[0, :1], cos[:1], sin[:1])
    program = Rope(n, dtype, dtype, pallas_norm._spec.Spec()).program(launch.gpu_of(0))
    assert launch.kernel(program, 0) is not None  # not refused
