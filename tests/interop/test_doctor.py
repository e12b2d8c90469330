"""torch's part of `python -m pallas_norm`."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pallas_norm import __main__ as program
from pallas_norm import _compat, _golden, _selfcheck
from pallas_norm import _doctor as of_jax
from pallas_norm._spec import Spec
from pallas_norm.plans import few_rows
from pallas_norm.plans.fitting import forward_plan_on
from pallas_norm.plans.hardware import H200, Gpu
from pallas_norm_torch import _doctor, cache, direct, explain, launch, ops, statements

ROOT = Path(__file__).parents[2]
CASES = tuple(_golden.case(128, dtype) for dtype in _golden.DTYPES)
CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few cases on a CPU, and nothing but torch's; the environment is as it was afterwards."""
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(_selfcheck, "XLA_CASES", CASES)
    monkeypatch.setattr(of_jax, "checked_devices", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("quick")
def test_the_report_has_torchs_version_way_and_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main([]) == 0
    text = capsys.readouterr().out
    assert f"torch {torch.__version__} sees " in text
    assert f"pallas_norm_torch, n = 4096 on cpu: {explain(4096, torch.bfloat16, CPU)}\n" in text
    way = "torch's own statements in torch's order"
    assert f"ok     torch on cpu, n = 128, {way}: bits and gradients in bfloat16, float16, float32\n" in text
    assert text.splitlines()[-1].startswith("Everything that was checked is right.")


@pytest.mark.usefixtures("quick")
def test_a_norm_that_rounds_once_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = statements.forward

    def once(x: Any, residual: Any, weight: Any, spec: Spec, **options: Any) -> Any:
        return right(x, residual, weight, dataclasses.replace(spec, cast_before_scale=False), **options)

    monkeypatch.setattr(statements, "forward", once)
    assert program.main([]) == 1
    text = capsys.readouterr().out
    for name in ("rms_norm", "rms_norm in place", "add_rms_norm"):
        where = f"torch on cpu, torch's own statements in torch's order: {name}, 69 x 128 float16"
        pattern = rf"^WRONG  {where}: y: .* before the weight is missing$"
        assert re.search(pattern, text, re.MULTILINE)
    assert text.splitlines()[-1].endswith(f"say WRONG. Next: {of_jax.REPORT}")


def test_a_call_in_place_that_writes_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.rms_norm

    def deaf(*operands: Any, out: torch.Tensor | None = None) -> torch.Tensor:
        y = right(*operands)
        return y if out is None else out

    monkeypatch.setattr(ops, "rms_norm", deaf)
    (wrong,) = _doctor.check_case(CASES[0], CPU)
    assert wrong.startswith("rms_norm in place, 69 x 128 bfloat16: y: ")


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = statements.backward
    monkeypatch.setattr(statements, "backward", lambda *a, **o: tuple(2 * gradient for gradient in right(*a, **o)))
    wrong = _doctor.check_case(CASES[0], CPU)
    assert [sentence.split(": ")[:2] for sentence in wrong] == [
        [f"{name}, 69 x 128 bfloat16", gradient]
        for name in ("rms_norm", "add_rms_norm")
        for gradient in ("dx", "dweight")
    ]


@pytest.mark.usefixtures("quick")
def test_a_check_that_raises_is_a_wrong_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no such device here")

    monkeypatch.setattr(ops, "add_rms_norm", fails)
    assert program.main([]) == 1
    text = capsys.readouterr().out
    case = "torch's own statements in torch's order: 69 x 128 bfloat16"
    assert f"WRONG  torch on cpu, {case}: NotImplementedError: no such device here\n" in text
    assert "Traceback" not in text


def test_a_kernel_that_turns_out_not_to_launch_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = iter([("", "direct launch"), ("", "torch's own statements, because of this")])
    monkeypatch.setattr(_doctor, "_ways", lambda device: [of_jax.Line(*next(ways))])
    monkeypatch.setattr(_selfcheck, "XLA_CASES", CASES[:1])
    first, right, last = _doctor.self_check(CPU)
    assert (first.text, right.mark) == ("direct launch", "ok")
    assert last == ("note", "torch's own statements, because of this (found out by the check)", of_jax.REPORT)


def test_an_older_torch_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    _, line = _doctor.version()
    assert line == ("note", "torch 2.10.1 is older than 2.11, the oldest tested", "pip install 'torch>=2.11'")


@pytest.mark.parametrize(("preallocates", "notes"), [(True, 1), (False, 0)])
def test_memory_that_jax_would_take_is_a_note(
    *, preallocates: bool, notes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_compat, "cuda_capabilities", lambda: [(9, 0)])
    lines = list(_doctor.memory(preallocates=preallocates))
    assert [line.mark for line in lines] == ["note"] * notes


def test_the_disk_cache_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert list(_doctor.disk()) == []
    assert list(cache.folder().iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (line,) = _doctor.disk()
    assert line.mark == "note"
    assert str(cache.folder()) in line.text


def test_kernels_are_held_to_bits_and_what_torch_adds_up_to_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    case, gpu = _golden.case(32768, "bfloat16"), torch.device("cuda", 0)
    assert _doctor._promised(case, CPU, residual=False) == {}
    monkeypatch.setattr(_doctor, "_launches", lambda *_: True)
    monkeypatch.setattr(launch, "gpu_of", lambda _: H200)
    assert _doctor._promised(case, gpu, residual=True) == _golden.bits(case, residual=True)
    monkeypatch.setattr(launch, "gpu_of", lambda _: Gpu((8, 0), 166912, 108))  # no clusters: torch's backward pass
    assert _doctor._promised(case, gpu, residual=True).keys() == {"s", "rstd", "y"}


def test_a_kernel_with_another_order_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's statements stand in for it: they are within every bound."""
    case = _golden.case(1000, "float32")
    assert _doctor.check_case(case, CPU) == []
    monkeypatch.setattr(_doctor, "_promised", lambda case, device, *, residual: _golden.bits(case, residual=residual))
    wrong = _doctor.check_case(case, CPU)
    for name in ("rms_norm", "add_rms_norm"):
        for value in ("rstd", "dx"):
            assert f"{name}, {case}: {value}: {_selfcheck.OTHER_BITS}" in wrong
    assert f"rms_norm in place, {case}: y: {_selfcheck.OTHER_BITS}" in wrong


def test_the_cases_reach_a_warp_one_warpgroup_several_and_a_cluster() -> None:
    for dtype in _golden.DTYPES:
        cases = [case for case in _doctor.KERNEL_CASES if case.dtype == dtype]
        plans = [_selfcheck.forward_plan_of(case) for case in cases]
        shapes = {(plan.regime.value, plan.warpgroups > 1, plan.cluster > 1) for plan in plans}
        assert shapes >= {("warp", False, False), ("cta", False, False), ("cta", True, False), ("cta", True, True)}
        for n in {case.n for case in cases}:  # with either schedule
            many = forward_plan_on(H200, n, dtype)
            few = few_rows.of(many, _golden.DTYPES[dtype].itemsize, H200)
            assert {plan for plan in plans if plan.n == n} == {many, many if few is None else few[1]}


@pytest.mark.gpu
def test_on_a_gpu_every_kind_of_kernel_is_launched_and_right(tmp_path: Path) -> None:
    if (reason := direct.unavailable(4096, 0, torch.bfloat16)) is not None:
        pytest.skip(f"needs a direct launch: {reason}")
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "interop")))
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, "-m", "pallas_norm"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for case in _doctor.KERNEL_CASES:
        shape, kind = _selfcheck.shape_of(case), re.escape(_selfcheck.kind_of(case))
        pattern = rf"^ok     torch on cuda:0, {shape}, direct launch \({kind}\): bits and .*{case.dtype}"
        assert re.search(pattern, shown.stdout, re.MULTILINE), shown.stdout
