"""What becomes of a call whose kernel cannot be launched, or is refused: the other way, and `explain` says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm.plans.hardware import Gpu
from pallas_norm_torch import _library, direct, explain, launch, rms_norm, statements
from pallas_norm_torch.programs import Program
from tests.interop.cases import assert_same, draw
from tests.interop.fake_kernels import FakeKernel, expected, made  # noqa: F401 (made is a fixture)

pytestmark = pytest.mark.usefixtures("made")


def test_a_kernel_that_cannot_be_launched_takes_the_other_way_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only the form with rstd, or for strides, turns out not to be."""
    x, weight = draw(6, 128, dtype=torch.float32), draw(128, dtype=torch.float32)
    right = launch.kernel

    def refusing(program: Program, device: int) -> Any:
        if "rstd" in program.outputs or program.strided:
            raise launch.Unavailable("it is Sunday")
        return right(program, device)

    monkeypatch.setattr(launch, "kernel", refusing)
    assert_same(rms_norm(x, weight), expected(x, weight)[0])
    assert direct.calls
    leaf = x.clone().requires_grad_()
    rms_norm(leaf, weight).sum().backward()
    assert leaf.grad is not None
    assert direct._refused[128, -1, torch.bfloat16] == "it is Sunday"
    assert not direct.calls
    wide = draw(6, 256, dtype=torch.float32)[:, :128]
    rms_norm(x, weight)
    assert_same(rms_norm(wide, weight), expected(wide, weight)[0])


def test_what_explain_says_of_a_refused_backward_pass_is_true_of_the_next_forward_pass(
    made: dict[Program, FakeKernel],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The prepared forward call was launched on, while `explain` said that no kernel was."""
    leaf, weight = draw(6, 128, dtype=torch.float32).requires_grad_(), draw(128, dtype=torch.float32)
    right = launch.kernel

    def refusing(program: Program, device: int) -> Any:
        if "dx" in program.outputs:
            raise launch.Unavailable("it is Sunday")
        return right(program, device)

    monkeypatch.setattr(launch, "kernel", refusing)
    rms_norm(leaf, weight).sum().backward()
    assert leaf.grad is not None
    assert direct._refused[128, -1, torch.bfloat16] == "it is Sunday"
    assert not direct.calls
    before = sum(len(kernel.launches) for kernel in made.values())
    monkeypatch.setattr(_library, "path", lambda x: statements)  # as a refused length on a GPU
    rms_norm(leaf, weight)
    assert sum(len(kernel.launches) for kernel in made.values()) == before


@pytest.mark.parametrize("by_operator", [False, True])
def test_a_backward_pass_without_a_kernel_leaves_the_forward_pass_its_own(
    made: dict[Program, FakeKernel],  # noqa: F811
    by_operator: bool,  # noqa: FBT001  as in compiled programs
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On GPUs before Hopper, of rows that need a cluster in the backward pass first."""
    monkeypatch.setattr(launch, "gpu_of", lambda device: Gpu((8, 0), 166912, 108))
    x, weight, dy = (draw(*shape, dtype=torch.bfloat16) for shape in ((2, 20480), (20480,), (2, 20480)))
    leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    for _ in range(2):
        if by_operator:
            y, _ = torch.ops.pallas_norm.rms_norm(leaf, leaf_weight, 1e-6, True, 0.0)  # noqa: FBT003  its schema
        else:
            y = rms_norm(leaf, leaf_weight)
        dx, dweight = torch.autograd.grad(y, (leaf, leaf_weight), dy)
    _, _, rstd = statements.forward(x, None, weight, Spec(), with_rstd=True)
    assert rstd is not None
    expected_dx, expected_dweight = statements.backward(x, weight, rstd, dy, None, Spec(), with_dweight=True)
    assert_same(dx, expected_dx)
    assert_same(dweight, expected_dweight)
    assert {program.kind for program in made} == {"forward"}
    assert sum(len(kernel.launches) for kernel in made.values()) == 2
    assert direct._refused == {}


def test_explain_tells_what_was_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    direct.refuse(128, 0, "its trial run failed")
    assert explain(128, torch.bfloat16, "cuda:0").endswith("because its trial run failed")
