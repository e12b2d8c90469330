"""The kernels of rms_norm_gated: what they are launched with, when they are left out, and how they are tried and
lowered, by fake kernels; on a GPU by the launch, where the bits are the oracle's."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm.gated_reference import Form
from pallas_norm.plans.hardware import H200
from pallas_norm_torch import direct, launch, rms_norm, rms_norm_gated
from pallas_norm_torch._kernels import Gated, GatedBackward
from pallas_norm_torch.launch import proof
from pallas_norm_torch.programs import Program
from tests import gated_oracle, oracle
from tests.gated_oracle import Gate
from tests.interop.cases import assert_same, draw
from tests.interop.fake_kernels import FakeKernel
from tests.interop.fake_kernels import made as made
from tests.interop.gated_cases import FORMS, operands, trained
from tests.interop.test_quantized import as_numpy


@pytest.mark.sampled(4)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1024, 4096])
def test_kernels_are_launched_with_what_they_take(
    made: dict[Program, FakeKernel], n: int, form: str, groups: int
) -> None:
    x, gate, weight = operands(torch.bfloat16, n * groups)
    options = FORMS[form] | {"group_size": n}
    y, dx, dgate, dweight = trained(x, gate, weight, **options)
    assert_same(rms_norm_gated(x, gate, weight, **options), y)
    projected = torch.stack([gate, x], dim=-2).flatten(-2)  # of which Mamba2's gate is a part
    part = projected[..., : gate.shape[-1]]
    assert_same(rms_norm_gated(x, part, weight, **options), y)
    assert_same(rms_norm_gated(x[1:, 1:2], part[1:, 1:2], weight, **options), y[1:, 1:2])
    odd = torch.nn.functional.pad(gate, (1, 0))[..., 1:]  # at addresses that no vector is read from: copied first
    assert_same(rms_norm_gated(x, odd, weight, **options), y)
    kinds = sorted((program.kind, program.strided) for program in made)
    gated = [("gated", False), ("gated", False), ("gated", True)]
    assert kinds == [("column_sum", False), *gated, ("gated_backward", False)]
    (strided,) = (kernel for program, kernel in made.items() if program.strided)
    assert len(strided.launches) == 2
    assert all(kernel.launches and kernel.launches[0][0] == 99 for kernel in made.values())
    before = sum(len(kernel.launches) for kernel in made.values())
    none = trained(x[:0], gate[:0], weight, **options)
    assert not none[-1].any()
    assert sum(len(kernel.launches) for kernel in made.values()) == before  # no rows, no launch
    made_before = dict(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pallas_norm_torch._library.path", lambda x, n=None: None)
        for found, expected in zip((y, dx, dgate), trained(x, gate, weight, **options), strict=False):
            assert_same(found, expected)
        expected = trained(x, gate, weight, **options)[-1]
        assert (dweight - expected).abs().max() <= 2.0**-7 * expected.abs().max()
    assert made == made_before


def test_more_rows_than_programs_keep_their_groups(made: dict[Program, FakeKernel]) -> None:
    """The fake kernel adds row r to the part of program r mod programs, as the kernel's grid does."""
    x, gate = (draw(170, 5 * 1024, dtype=torch.float32, seed=seed) for seed in (0, 1))
    weight = draw(5 * 1024, dtype=torch.float32, seed=2)
    dweight = trained(x, gate, weight, group_size=1024)[-1]
    (backward,) = (program for program in made if program.kind == "gated_backward")
    assert backward.plan is not None
    assert backward.plan.programs is not None
    assert backward.plan.programs < 850
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pallas_norm_torch._library.path", lambda x, n=None: None)
        expected = trained(x, gate, weight, group_size=1024)[-1]
    assert (dweight - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_no_kernel_has_is_torchs(made: dict[Program, FakeKernel]) -> None:
    x, gate, weight = operands(torch.bfloat16, 1024)
    trained(x, gate, weight, group_size=128)
    assert not made
    trained(x, gate.float(), weight)
    assert [program.kind for program in made] == ["gated"]


def test_a_kernel_that_is_not_what_it_should_be_is_replaced(
    made: dict[Program, FakeKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is known it is not compiled again, and the norm of that length stays a kernel."""
    kernel, refused = launch.kernel, list[str]()

    def but_gated(program: Program, device: int) -> Any:
        if "gated" not in program.kind:
            return kernel(program, device)
        refused.append(program.kind)
        raise launch.Unavailable("planted")

    given = operands(torch.bfloat16, 1024)
    monkeypatch.setattr(launch, "kernel", but_gated)
    found = trained(*given)
    for one, other in zip(found, trained(*given), strict=True):
        assert_same(one, other)
    assert refused == ["gated", "gated_backward"]
    assert not made
    assert not direct._refused
    rms_norm(given[0], given[2])
    assert [program.kind for program in made] == ["forward"]
    monkeypatch.setattr("pallas_norm_torch._library.path", lambda x, n=None: None)
    for one, other in zip(found, trained(*given), strict=True):
        assert_same(one, other)


PROGRAMS = [
    (n, groups, form, dtype)
    for n, groups in ((128, 1), (1000, 1), (1024, 3), (16384, 2))
    for form in (Form("silu", False, n), Form("silu", True, n), Form("sigmoid", True, n))  # noqa: FBT003
    for dtype in (torch.bfloat16, torch.float32)
]


def programs(n: int, groups: int, form: Form, dtype: torch.dtype) -> list[Program]:
    spec = Spec(cast_before_scale=form.activation == "silu")
    forward = Gated(n * groups, dtype, dtype, dtype, spec, form, with_rstd=True)
    strided = forward._replace(with_rstd=False, strided=True)
    backward = GatedBackward(n * groups, dtype, dtype, dtype, spec, form, with_dweight=True)
    return [kernel.program(H200) for kernel in (forward, strided, backward)]


@pytest.mark.sampled(8)
@pytest.mark.usefixtures("made")  # for CPU addresses
@pytest.mark.parametrize(("n", "groups", "form", "dtype"), PROGRAMS)
def test_a_trial_run_finds_a_wrong_kernel_and_only_that(n: int, groups: int, form: Form, dtype: torch.dtype) -> None:
    for program, names in zip(programs(n, groups, form, dtype), (("y",), ("y",), ("dx", "dgate")), strict=True):
        for off in (0, 2**12):
            kernel: Any = FakeKernel(program, off=off)
            check = proof.CHECKS[program.kind]
            verdict = check(kernel, program, torch.device("cpu"), 0)
            assert all(verdict[name] == (not off) for name in names)
            assert verdict.get("dweight", True)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("n", "groups", "form", "dtype"), PROGRAMS[:3] + PROGRAMS[13:15])
def test_the_programs_lower_to_one_kernel_each(n: int, groups: int, form: Form, dtype: torch.dtype) -> None:
    for program in programs(n, groups, form, dtype):
        lowered = jax.jit(program.function()).trace(*program.structs).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("stablehlo.custom_call @mosaic_gpu") == 1
        assert len(lowered.out_info) == len(program.outputs)


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "groups"), [(128, 1), (384, 1), (1000, 1), (1024, 8), (4096, 1), (8192, 1), (16384, 2)])
def test_on_a_gpu_the_launched_kernels_give_the_oracles_bits(n: int, groups: int) -> None:
    x, gate, weight = operands(torch.bfloat16, n * groups, device="cuda")
    part = torch.cat([x, gate], dim=-1)[..., x.shape[-1] :]
    for form, options in FORMS.items():
        assert_same(*(rms_norm_gated(x, one, weight, group_size=n, **options) for one in (part, gate)))
        y, dx, dgate, dweight = trained(x, gate, weight, group_size=n, **options)
        dy = draw(*y.shape, dtype=y.dtype, seed=3)
        how = Gate(**options, group_size=n)
        expected = gated_oracle.results(*map(as_numpy, (x, gate, weight, dy)), how, 1e-6)
        for found, wanted in ((y, expected.y), (dx, expected.dx), (dgate, expected.dgate)):
            oracle.assert_same(as_numpy(found), wanted)
        assert expected.dweight is not None
        bound = expected.dweight_error + oracle.spacing(np.abs(expected.dweight), oracle.BF16)
        oracle.assert_within(as_numpy(dweight), expected.dweight, bound)
        program, *_ = programs(n, groups, Form(how.activation, how.norm_before_gate, n), torch.bfloat16)
        assert launch.kernel(program, 0) is not None, form  # not refused


@pytest.mark.gpu
def test_on_a_gpu_a_graph_replays_it() -> None:
    x, gate, weight = operands(torch.bfloat16, 4096, device="cuda")
    expected = rms_norm_gated(x, gate, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = rms_norm_gated(x, gate, weight)
    found.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(found, expected)
