"""The trial run of a kernel of the norm: a right one passes, one that computes something else or nothing does not."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm.gated_reference import Form
from pallas_norm.plans.hardware import H200
from pallas_norm_torch import launch
from pallas_norm_torch._kernels import Gated, GatedBackward, Quantized, Rope, RopeBackward
from pallas_norm_torch.launch import proof
from pallas_norm_torch.programs import Program
from tests.interop.fake_kernels import FORWARD, FakeKernel

PROGRAMS = [
    *(Program("forward", n, (("x", dtype), ("weight", dtype)), ("y",), spec, strided=strided)
      for n in (33, 128, 4096, 131072) for dtype in ("bfloat16", "float32") for strided in (False, True)
      for spec in (Spec(), Spec(eps=0.3, cast_before_scale=False, weight_offset=0.1))),
    Program("forward", 1000, (("x", "float16"), ("residual", "float16"), ("weight", "float32")), ("y", "s", "rstd"), Spec()),  # noqa: E501
    Program("forward", 576, (("x", "bfloat16"),), ("y",), Spec(eps=0.0)),
    *(Program("backward", n, (("x", dtype), ("rstd", "float32"), ("dy", dtype), ("weight", dtype), ("ds", dtype)),
              ("dx", "dweight"), spec)
      for n in (33, 128, 1000, 4096, 32768) for dtype in ("bfloat16", "float16", "float32")
      for spec in (Spec(), Spec(cast_before_scale=False, weight_offset=0.1))),
    Program("backward", 640, (("x", "bfloat16"), ("rstd", "float32"), ("dy", "bfloat16")), ("dx",), Spec()),
    *(Program("column_sum", n, (("parts", "float32"),), ("dweight",), Spec(), dweight_dtype=dtype)
      for n in (33, 4096) for dtype in ("bfloat16", "float32")),
]  # fmt: skip

BF16, GATE = torch.bfloat16, Form("silu", norm_before_gate=True, group=64)
FORMS = [
    Rope(64, BF16, BF16, Spec()),
    RopeBackward(64, BF16, BF16, Spec()),
    Quantized(128, BF16, BF16, Spec(), None, torch.int8, 128, with_y=True),
    Gated(64, BF16, BF16, BF16, Spec(), GATE, with_rstd=True),
    GatedBackward(64, BF16, BF16, BF16, Spec(), GATE, with_dweight=True),
]


def verdict(program: Program, **changes: Any) -> dict[str, bool]:
    check = proof.CHECKS[program.kind]
    made: Any = FakeKernel(program, **changes)
    return check(made, program, torch.device("cpu"), 0)


@pytest.fixture
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pallas_norm_torch.rows.ALIGNMENT", 64)


@pytest.mark.sampled(4)
@pytest.mark.usefixtures("aligned")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"{program.kind}-{program.n}")
def test_a_right_kernel_passes_its_trial(program: Program) -> None:
    assert all(verdict(program).values())


@pytest.mark.sampled(8)
@pytest.mark.usefixtures("aligned")
@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.kind != "column_sum"], ids=lambda p: f"{p.kind}-{p.n}")
def test_a_kernel_that_computes_something_else_does_not(program: Program) -> None:
    assert not all(verdict(program, off=0.125).values())


@pytest.mark.sampled(8)
@pytest.mark.usefixtures("aligned")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: f"{program.kind}-{program.n}")
def test_a_kernel_that_writes_nothing_does_not(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one in another device's context: its launch fails, or it writes elsewhere."""
    monkeypatch.setattr(FakeKernel, "launch", lambda *_: None)
    assert not any(verdict(program).values())


class Watchful(FakeKernel):
    """Computes nothing; tells which operands and results lie in memory that no tensor holds at the launch."""

    def launch(self, stream: int, grid: int, values: Sequence[int]) -> None:
        del stream, grid
        held = [one.untyped_storage() for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
        addresses = dict(zip((*self.program.inputs, *self.program.outputs), values, strict=True))
        for name in (*(name for name, _ in self.program.dtypes), *self.program.outputs):
            at = addresses[name]
            assert any(one.data_ptr() <= at < one.data_ptr() + one.nbytes() for one in held), f"nobody holds {name}"


@pytest.mark.usefixtures("aligned")
@pytest.mark.parametrize("kind", proof.CHECKS)
def test_what_a_trial_launches_on_is_held_until_then(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy on the GPU whose address alone was kept had gone when the kernel read it."""
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *where: to(self, *where, copy=True))  # as to another device
    programs = [*PROGRAMS, *(form.program(H200) for form in FORMS)]
    of_kind = [program for program in programs if program.kind == kind and program.n <= 4096]
    assert of_kind
    for program in of_kind:
        made: Any = Watchful(program)
        proof.CHECKS[kind](made, program, torch.device("cpu"), 0)


def test_a_refusal_names_the_kernel_and_what_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Any = FakeKernel(FORWARD, device=1)
    stream = type("Stream", (), {"cuda_stream": 0})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setitem(proof.CHECKS, "forward", lambda *_: {"y": False, "s": True, "rstd": False})
    with pytest.raises(launch.Unavailable) as caught:
        proof.prove(made, FORWARD)
    assert str(caught.value) == (
        "the forward kernel for n = 4096 is not used on cuda:1: in its trial run y and rstd came out wrong; report it "
        "with the output of python -m pallas_norm"
    )

    def fails(*_: Any) -> Any:
        raise RuntimeError("CUDA_ERROR_400")

    monkeypatch.setitem(proof.CHECKS, "forward", fails)
    with pytest.raises(launch.Unavailable, match=r"is not used on cuda:1: its trial run failed \(CUDA_ERROR_400\)$"):
        proof.prove(made, FORWARD)
