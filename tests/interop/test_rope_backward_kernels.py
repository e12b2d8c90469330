"""The kernel of the gradients of rms_norm_rope: what it reads as it lies, when it is left out, and how it is tried and
lowered, by fake kernels; on a GPU its launch, which gives dx with the bits of the steps."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import pallas_norm
from pallas_norm.kernels.launch_arguments import COUNT
from pallas_norm.kernels.rope_backward import NUMBERS
from pallas_norm.plans.hardware import H200
from pallas_norm_torch import launch, rms_norm, rms_norm_rope
from pallas_norm_torch._kernels import RopeBackward
from pallas_norm_torch.launch import arguments, lowering, proof
from pallas_norm_torch.programs import Program
from tests.interop.cases import DTYPES, assert_same
from tests.interop.fake_kernels import FakeKernel
from tests.interop.fake_kernels import made as made
from tests.interop.rope_cases import operands, rotated
from tests.interop.test_launch import launches, text_of

Tensor = torch.Tensor
SPEC = pallas_norm._spec.Spec()


def of_attention(q: Tensor, k: Tensor) -> list[Tensor]:
    """Gradients whose heads come before their tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(*x.shape[:-3], x.shape[-2], x.shape[-3], x.shape[-1], generator=generator)
        .to(x.device, x.dtype)
        .transpose(-2, -3)
        for x in (q, k)
    ]


def check(given: list[Tensor], dr: list[Tensor], *weights: Tensor) -> None:
    """dq and dk have the bits of the steps; dweight is as near as its rounding and another order of additions allow."""
    q, k, cos, sin = given
    leaves = [one.detach().clone().requires_grad_() for one in (q, k, *weights)]
    of_weights = leaves[2:] or (None, None)
    views = [one.view_as(one) for one in leaves[:2]]
    found = torch.autograd.grad(rms_norm_rope(*views, cos, sin, *of_weights), leaves, dr)
    y = [rms_norm(x, weight) for x, weight in zip(leaves[:2], of_weights, strict=True)]
    expected = torch.autograd.grad([rotated(one, cos, sin) for one in y], leaves, dr)
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert_same(one, other)
    for one, other in zip(found[2:], expected[2:], strict=True):
        unit = 2.0**-7 if one.dtype == torch.bfloat16 else 2.0**-10
        assert (one.float() - other.float()).abs().max() <= unit * other.float().abs().max()


def of_kind(made: dict[Program, FakeKernel], kind: str) -> list[FakeKernel]:
    return [kernel for kernel in made.values() if kernel.program.kind == kind]


@pytest.mark.parametrize("n", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_read_where_attention_leaves_them(
    made: dict[Program, FakeKernel], dtype: torch.dtype, n: int
) -> None:
    q, k, cos, sin, *weights = operands(n, dtype, tokens=(1, 7))
    dr = of_attention(q, k)
    check([q, k, cos, sin], dr, *weights)
    check([q, k, cos, sin], dr)
    kernel, bare = of_kind(made, "rope_backward")
    ((stream, grid, named),) = kernel.launches
    assert stream == 99
    assert grid == sum(named[f"{name}_programs"] // COUNT for name in "qk")
    for name, one in zip("qk", dr, strict=True):  # nothing was copied
        offset = named[f"{name}_dr_offset"] // COUNT * one.element_size()
        assert named[f"d{name}_out"] + offset == one.data_ptr()
        assert named[f"{name}_dr_inner"] // COUNT == 7 * n
    assert len(bare.launches) == 1
    (sums,) = of_kind(made, "column_sum")
    assert len(sums.launches) >= 2


def test_what_a_kernel_cannot_read_as_it_lies_is_copied(made: dict[Program, FakeKernel]) -> None:
    q, k, cos, sin, *weights = operands(64, torch.bfloat16, tokens=(3, 4))
    check([q, k, cos, sin], of_attention(q, k), *weights)  # tokens at two strides
    ones = [torch.ones((), dtype=q.dtype).expand(x.shape) for x in (q, k)]  # as of a sum
    check([q, k, cos, sin], ones, *weights)
    check([one[1:] for one in (q, k)] + [cos, sin], [one[1:] for one in ones], *weights)
    (kernel,) = of_kind(made, "rope_backward")
    assert len(kernel.launches) == 3


def test_no_rows_are_no_launch(made: dict[Program, FakeKernel]) -> None:
    q, k, cos, sin, *weights = operands(64, torch.bfloat16)
    leaves = [one.detach().clone().requires_grad_() for one in (q[:0], k[:0], *weights)]
    found = torch.autograd.grad(rms_norm_rope(*leaves[:2], cos, sin, *leaves[2:]), leaves, [q[:0], k[:0]])
    assert not any(one.any() for one in found)
    assert not of_kind(made, "rope_backward")


def test_heads_without_such_a_kernel_take_the_steps(made: dict[Program, FakeKernel]) -> None:
    """80 elements have no kernel that rotates; the gradients of 224 are added up in another order than the heads."""
    for n in (80, 224):
        q, k, cos, sin, *weights = operands(n, torch.bfloat16)
        check([q, k, cos, sin], of_attention(q, k), *weights)
    assert {program.kind for program in made} == {"rope", "forward", "backward", "column_sum"}


def test_a_kernel_that_is_refused_is_replaced_by_the_steps_and_remembered(
    made: dict[Program, FakeKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, own = list[str](), launch.kernel

    def refused(program: Program, device: int) -> Any:
        asked.append(program.kind)
        if program.kind == "rope_backward":
            raise launch.Unavailable("planted")
        return own(program, device)

    monkeypatch.setattr(launch, "kernel", refused)
    q, k, cos, sin, *weights = operands(64, torch.bfloat16)
    for _ in range(2):
        check([q, k, cos, sin], of_attention(q, k), *weights)
    assert asked.count("rope_backward") == 1
    assert {"rope", "backward"} <= {program.kind for program in made}


@pytest.mark.usefixtures("made")  # for CPU addresses
@pytest.mark.parametrize(
    ("n", "weight"), [(64, None), (128, torch.bfloat16), (96, torch.float32), (256, torch.bfloat16)]
)
def test_a_trial_run_finds_a_wrong_kernel_and_only_that(n: int, weight: torch.dtype | None) -> None:
    program = RopeBackward(n, torch.bfloat16, weight, SPEC).program(H200)
    for off, right in ((0.0, True), (1.0, False)):
        kernel: Any = FakeKernel(program, off=off)
        verdict = proof.CHECKS["rope_backward"](kernel, program, torch.device("cpu"), 0)
        assert {verdict.pop(name) for name in ("dq", "dk")} == {right}
        assert set(verdict) == ({"q_dweight", "k_dweight"} if weight else set())
        assert all(verdict.values())


@pytest.mark.usefixtures("made")
def test_a_trial_run_finds_parts_of_dweight_that_were_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    program = RopeBackward(64, torch.bfloat16, torch.bfloat16, SPEC).program(H200)
    kernel: Any = FakeKernel(program)
    monkeypatch.setattr(FakeKernel, "launch", lambda *_: None)
    verdict = proof.CHECKS["rope_backward"](kernel, program, torch.device("cpu"), 0)
    assert verdict == dict.fromkeys(("dq", "dk", "q_dweight", "k_dweight"), False)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32, None], ids=str)
@pytest.mark.parametrize("n", [64, 96, 128, 256])
def test_a_program_lowers_to_one_kernel(n: int, weight: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_without_backends", lambda gpu: contextlib.nullcontext())  # as in test_launch
    program = RopeBackward(n, torch.bfloat16, weight, SPEC).program(H200)
    module, addresses = lowering.module_of(program)
    assert addresses == (6 if weight is None else 8) + len(NUMBERS) + (2 if weight is None else 4)
    text = text_of(module)
    assert launches(module) == [arguments.nominal_grid(program)]
    assert "memref.load" not in "".join(line for line in text.splitlines() if "memref<1xi32>" in line)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu_the_launched_kernel_gives_the_gradients_of_the_steps(dtype: torch.dtype, n: int) -> None:
    for tokens in ((1, 7), (3, 1037)):
        q, k, cos, sin, *weights = operands(n, dtype, tokens=tokens, device="cuda")
        check([q, k, cos, sin], of_attention(q, k), *weights)
        check([q, k, cos, sin], of_attention(q, k))
    for weight in (dtype, None):
        program = RopeBackward(n, dtype, weight, SPEC).program(launch.gpu_of(0))
        assert launch.kernel(program, 0) is not None  # not refused


@pytest.mark.gpu
def test_on_a_gpu_a_graph_replays_it() -> None:
    q, k, cos, sin, *weights = operands(128, torch.bfloat16, tokens=(1, 64), device="cuda")
    arguments_ = q, k, cos, sin, *weights, *of_attention(q, k), 1e-6, True, 0.0
    expected = torch.ops.pallas_norm.rms_norm_rope_backward(*arguments_)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.ops.pallas_norm.rms_norm_rope_backward(*arguments_)
    for one in found:
        one.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)
