"""`python -m pallas_norm`: what it prints, how it exits, and that its self-check can fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import __main__ as program
from pallas_norm import _compat, _doctor, _selfcheck, reference
from pallas_norm.plans.fitting import forward_plan_on
from pallas_norm.plans.forward import TABLE
from pallas_norm.plans.hardware import Gpu
from pallas_norm.plans.plan import Source
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import oracle, rewrites

ROOT = Path(__file__).parents[1]
PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
CASES = tuple(_selfcheck.Case(128, dtype, 5) for dtype in _selfcheck.DTYPES)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few cases on a CPU, and no torch; the environment is as it was afterwards."""
    monkeypatch.setenv(PREALLOCATE, "true")
    monkeypatch.setattr(_selfcheck, "XLA_CASES", CASES)
    monkeypatch.setattr(_doctor, "checked_devices", lambda: jax.local_devices(backend="cpu")[:1])
    monkeypatch.setattr(_doctor, "_torch_lines", lambda **_: iter(()))


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = program.main([])
    return status, capsys.readouterr().out


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


# --- what is wrong is found -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_programs() -> Iterator[None]:
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("quick", "fresh_programs")
def test_a_norm_that_rounds_once_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.forward
    monkeypatch.setattr(reference, "forward", lambda *a, **o: right(*a, **o | {"cast_before_scale": False}))
    status, text = report(capsys)
    assert status == 1
    for dtype in ("bfloat16", "float16"):
        pattern = rf"^WRONG  JAX on cpu, XLA: rms_norm, 5 x 128 {dtype}: y: \d+ of 640 elements have .* missing$"
        assert re.search(pattern, text, re.MULTILINE)
        assert f"add_rms_norm and its gradients, 5 x 128 {dtype}: y: " in text
    assert "ok     JAX on cpu, n = 128, XLA: bits and gradients in float32\n" in text  # of which there is one rounding
    assert text.splitlines()[-1].endswith(
        f"say WRONG. Next: install a jax that docs/compatibility.md calls tested, and {_doctor.REPORT}"
    )


@pytest.mark.usefixtures("fresh_programs")
def test_a_rounding_that_is_dropped_is_found() -> None:
    """As XLA's CPU code drops g's in the large program where the sums have no order and the roundings are casts."""
    large = max(_selfcheck.XLA_CASES, key=lambda case: case.rows)
    with rewrites.rewritten(rewrites.REFERENCE["xla: g not rounded"]):
        found = _doctor.check_case(large, jax.local_devices(backend="cpu")[0])
    assert any(sentence.startswith("rms_norm and its gradients, 4096 x 1024 bfloat16: dx: ") for sentence in found)


@pytest.mark.usefixtures("quick")
def test_a_check_that_raises_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("no\n  memory " + "x" * 600)

    monkeypatch.setattr(_doctor, "results", out_of_memory)
    status, text = report(capsys)
    assert status == 1
    assert f"WRONG  JAX on cpu, XLA: 5 x 128 bfloat16: RuntimeError: no memory {'x' * 490} ...\n" in text
    assert f"       -> {_doctor.REPORT}\n" in text
    assert text.count("WRONG") == len(CASES) + 1  # and the last line


# --- the replay -------------------------------------------------------------------------------------------------------


def right(given: dict[str, np.ndarray], *, residual: bool, **rounding: bool) -> dict[str, np.ndarray]:
    """What the tests' own oracle says, with sums in float64."""
    x, weight, dy = oracle.add(given["x"], given["residual"]) if residual else given["x"], given["weight"], given["dy"]
    rstd = oracle.rstd64(x, _selfcheck.EPS).astype(np.float32)
    dx = oracle.input_gradient64(x, weight, rstd, dy, 1, **rounding)[0].astype(x.dtype)
    dweight = oracle.weight_gradient64(x, rstd, dy, x.dtype)[0].astype(x.dtype)
    found = {"y": oracle.replay(x, weight, rstd), "rstd": rstd, "dx": dx, "dweight": dweight}
    return found | {"s": x, "dx": oracle.add(dx, given["ds"])} if residual else found


def changed(values: np.ndarray, at: int, change: Callable[[np.ndarray], object]) -> np.ndarray:
    values = values.copy()
    values.reshape(-1)[at] = change(values.reshape(-1)[at])
    return values


def last_bit(values: np.ndarray) -> np.ndarray:
    return changed(values, -1, lambda value: np.nextafter(value, values.dtype.type(9)))


def one_nan(values: np.ndarray) -> np.ndarray:
    return changed(values, 0, lambda _: np.nan)


def without_eps(rstd: np.ndarray) -> np.ndarray:
    return (1 / np.sqrt(1 / rstd.astype(np.float64) ** 2 - _selfcheck.EPS)).astype(np.float32)


MUTANTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "a last bit of y": ("y", last_bit),
    "a last bit of s": ("s", last_bit),
    "a row of y missing": ("y", lambda y: y[:-1]),
    "y in another dtype": ("y", lambda y: y.astype(np.float64)),
    "no eps": ("rstd", without_eps),
    "rstd NaN": ("rstd", one_nan),
    "rows of dx exchanged": ("dx", lambda dx: dx[::-1].copy()),
    "dx doubled": ("dx", lambda dx: dx + dx),
    "dweight of half": ("dweight", lambda dweight: dweight / dweight.dtype.type(2)),
    "dweight NaN": ("dweight", one_nan),
}


@pytest.mark.parametrize("by_kernel", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", _selfcheck.DTYPES)
def test_what_is_right_passes_and_each_mutant_is_named(dtype: str, *, residual: bool, by_kernel: bool) -> None:
    given = _selfcheck.operands(_selfcheck.Case(128, dtype, 5))
    found = right(given, residual=residual)
    assert _selfcheck.check(given, found, by_kernel=by_kernel) == []
    for mutant, (name, change) in MUTANTS.items():
        if name in found:
            wrong = _selfcheck.check(given, found | {name: change(found[name])}, by_kernel=by_kernel)
            assert any(sentence.startswith((f"{name}: ", f"{name} is ")) for sentence in wrong), mutant


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_without_a_rounding_are_named(dtype: str, *, residual: bool) -> None:
    given = _selfcheck.operands(_selfcheck.Case(1024, dtype, 5))
    found, unrounded = (right(given, residual=residual, cast_before_scale=cast) for cast in (True, False))
    (wrong,) = _selfcheck.check(given, found | {"dx": unrounded["dx"]}, by_kernel=True)
    assert wrong.startswith("dx: ")


@pytest.mark.parametrize("dtype", _selfcheck.DTYPES)
def test_slack_takes_another_order_of_a_sum_and_no_missing_rounding(dtype: str) -> None:
    given = _selfcheck.operands(_selfcheck.Case(1024, dtype, 5))
    x, weight, rstd = given["x"], given["weight"], right(given, residual=False)["rstd"]
    moved = (rstd.view(np.int32) + np.int32([0, 3, -3, 32, -32])).view(np.float32)
    y = _selfcheck.output(x, weight, moved)
    assert _selfcheck.check_output("y", y, x, weight, rstd, slack=32) == []
    if dtype == "float32":
        assert _selfcheck.check_output("y", y, x, weight, rstd, slack=31) != []
    else:
        once = _selfcheck.rounded_once(x, weight, moved)
        (sentence,) = _selfcheck.check_output("y", once, x, weight, rstd, slack=32)
        assert sentence.endswith("the one before the weight is missing")


def test_the_cases_reach_every_row_of_the_table_and_every_source() -> None:
    cases = _selfcheck.kernel_cases()
    plans = [plan_for(case.n, case.dtype) for case in cases]
    reached = {(plan.regime, plan.warpgroups, plan.cluster, plan.source) for plan in plans}
    assert reached >= {(row.regime, row.warpgroups, row.cluster, row.source) for row in TABLE}
    for dtype in _selfcheck.DTYPES:
        backward = [backward_plan_for(case.n, case.dtype) for case in cases if case.dtype == dtype]
        assert {plan.source for plan in backward} == set(Source)
    assert all(case.rows > plan.block for case, plan in zip(cases, plans, strict=True))


def test_before_hopper_the_cases_are_those_that_have_a_kernel_there() -> None:
    a100 = Gpu((8, 0), 166912, 108)
    cases = _selfcheck.kernel_cases(a100)
    plans = [forward_plan_on(a100, case.n, case.dtype) for case in cases]  # raises where there is none
    assert {plan.source for plan in plans} == {Source.REGISTERS, Source.MEMORY}
    assert {(case.n, case.dtype) for case in cases} >= {(128, "float16"), (4096, "bfloat16"), (32760, "bfloat16")}
    assert max(case.n for case in cases) == 65528


def test_gradients_of_rows_without_a_backward_kernel_have_the_bound_of_any_order() -> None:
    """Before Hopper the backward pass of 32768 elements is XLA's, or torch's, which add up in an order of their own."""
    a100 = Gpu((8, 0), 166912, 108)
    assert _selfcheck._additions(32768, "bfloat16", a100, residual=False) == (plan_for(32768, "bfloat16").depth, 32768)
    assert _selfcheck._additions(4096, "bfloat16", a100, residual=True)[1] == backward_plan_for(4096, "bfloat16").depth


@pytest.mark.gpu
def test_on_a_gpu_every_kind_of_kernel_is_launched_and_right() -> None:
    shown = run()
    assert shown.returncode == 0, shown.stdout + shown.stderr
    for case in _selfcheck.kernel_cases():
        kind = _selfcheck.kind(plan_for(case.n, case.dtype))
        pattern = rf"^ok     JAX on gpu, n = {case.n}, kernel \({kind}\): bits and gradients in .*{case.dtype}"
        assert re.search(pattern, shown.stdout, re.MULTILINE), shown.stdout
    assert "ok     JAX on cpu" in shown.stdout
    assert "WRONG" not in shown.stdout
