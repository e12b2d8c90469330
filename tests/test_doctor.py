"""`python -m pallas_norm`: what it prints, how it exits, and what it says of a machine's GPUs, JAX and torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import __main__ as program
from pallas_norm import _compat, _doctor, _selfcheck
from tests.doctor_report import PREALLOCATE, quick, report  # noqa: F401  a fixture

ROOT = Path(__file__).parents[1]


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-m", "pallas_norm", *words], os.environ | environment
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick")
def test_the_report_has_versions_devices_paths_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = report(capsys)
    assert status == 0
    for package in (f"pallas-norm {pallas_norm.__version__}", f"jax {jax.__version__}", f"numpy {np.__version__}"):
        assert package in text
    assert "JAX sees" in text
    for n in _doctor.SHOWN_LENGTHS:
        path = pallas_norm.explain(jax.ShapeDtypeStruct((1, n), jnp.bfloat16))
        assert f"pallas_norm, n = {n}: {path}\n" in text
    assert "ok     JAX on cpu, n = 128, XLA: bits and gradients in bfloat16, float16, float32\n" in text
    assert text.splitlines()[-1].startswith("Everything that was checked is right.")


def test_help_says_what_it_prints_and_checks_nothing() -> None:
    shown = run("--help", CUDA_VISIBLE_DEVICES="")
    assert shown.returncode == 0
    assert "Exits with 0" in shown.stdout
    assert "JAX sees" not in shown.stdout


def test_a_backend_that_does_not_start_is_a_wrong_line_and_no_traceback() -> None:
    shown = run(JAX_PLATFORMS="nonsense")
    assert shown.returncode == 1
    assert re.search(r"^WRONG  devices: RuntimeError: .*nonsense", shown.stdout, re.MULTILINE)
    assert shown.stdout.count("WRONG") == 2  # and the last line
    assert shown.stdout.splitlines()[-1].endswith("Next: unset JAX_PLATFORMS, or install a JAX for these devices")


@pytest.mark.usefixtures("quick")
def test_a_guard_of_the_user_s_against_transfers_is_no_fault(capsys: pytest.CaptureFixture[str]) -> None:
    jax.config.update("jax_transfer_guard", "disallow")
    try:
        assert report(capsys)[0] == 0
    finally:
        jax.config.update("jax_transfer_guard", None)


@pytest.mark.parametrize("given", [None, "true"])
def test_memory_is_not_preallocated_unless_the_user_says_so(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(_doctor, "examine", lambda *, preallocates: asked.append(preallocates) or iter(()))
    monkeypatch.setenv(PREALLOCATE, "true")
    if given is None:
        monkeypatch.delenv(PREALLOCATE)
    assert program.main([]) == 0
    assert os.environ[PREALLOCATE] == (given or "false")
    assert asked == [given is None]


@pytest.mark.gpu
def test_on_a_gpu_every_kind_of_kernel_is_launched_and_right() -> None:
    shown = run()
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for case in _selfcheck.kernel_cases():
        shape, kind = _selfcheck.shape_of(case), _selfcheck.kind_of(case)
        pattern = rf"^ok     JAX on gpu, {shape}, kernel \({kind}\): bits and gradients in .*{case.dtype}"
        assert re.search(pattern, shown.stdout, re.MULTILINE), shown.stdout
    assert "ok     JAX on cpu" in shown.stdout
    assert "WRONG" not in shown.stdout


# --- the machine ------------------------------------------------------------------------------------------------------


NO_PLUGIN = ": no CUDA plugin of JAX is installed"
FIX = f"pip install 'jax[cuda13]=={jax.__version__}'; jax.devices('cuda') raises JAX's reason"


@pytest.mark.parametrize(
    ("plugins", "platforms", "cuda", "line"),
    [
        ("", "", 13, ("note", NO_PLUGIN, "pip install 'pallas-norm[cuda13]'")),
        ("", "", 12, ("note", NO_PLUGIN, "pip install 'pallas-norm[cuda12]'")),
        ("cuda13", "cpu", 13, ("note", ": JAX_PLATFORMS is cpu", "unset JAX_PLATFORMS, if the GPU is to be used")),
        ("cuda13", "cuda,cpu", 13, ("WRONG", ", although jax-cuda13-plugin 0.1 is installed", FIX)),
    ],
)
def test_a_gpu_that_only_the_driver_sees(
    plugins: str, platforms: str, cuda: int, line: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_compat, "cuda_capabilities", list)
    monkeypatch.setattr(_doctor, "driver", lambda: _doctor.Driver(1, cuda))
    monkeypatch.setattr(_doctor, "_version", lambda package: "0.1" if plugins and plugins in package else None)
    monkeypatch.setattr(_doctor, "_platforms", lambda: platforms)
    _, found = _doctor.devices()
    mark, text, next_step = line
    assert found == (mark, f"the NVIDIA driver sees 1 GPU, JAX none{text}", next_step)
    last, status = _doctor.verdict([found])
    assert status == (mark == "WRONG")
    assert last.endswith(f"Next: {next_step}")


def test_an_older_gpu_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    class Turing:
        platform, device_kind, compute_capability = "gpu", "Tesla T4", "7.5"

    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(_compat, "cuda_devices", lambda: [Turing()])
    _, line = _doctor.devices()
    assert line.mark == "note"
    assert line.text == (
        "a GPU has compute capability 7.5; the kernels need 8.0 (Ampere) or newer; "
        "XLA compiles the reference, with the same rounding"
    )
    assert _doctor.verdict([line]) == ("Everything that was checked is right.", 0)


def test_a_jax_outside_the_tested_range_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "kernels_unavailable", lambda: "jax 7.0 is outside the range")
    _, line = _doctor.versions()
    assert line.mark == "note"
    assert line.text.startswith("jax 7.0 is outside the range: no kernel runs")
    assert line.next_step.startswith("pip install 'jax>=0.10,<0.13'")


@pytest.mark.parametrize("absent", ["torch", "pallas_norm_torch"])
def test_without_torch_its_part_is_left_out(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor.importlib.util, "find_spec", lambda name: None if name == absent else object())
    (line,) = _doctor._torch_lines(preallocates=True)
    assert line == ("", f"{absent} is not installed: the way from PyTorch is not checked", "")
