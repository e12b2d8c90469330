"""The proof run's own parts, without a GPU: that each finds what it is there to find, and fails then."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracle, rewrites, test_gpu_mutants
from tests.gpu_proof import every_kernel, kernels, operands, planted, reruns, sanitizers
from tests.gpu_proof.kernels import Backward, ColumnSum, Forward, kind_of_plan
from tests.gpu_proof.sanitizers import Run, cases_with_reports, judge, reported

pytestmark = pytest.mark.slow

# --- every kernel -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cases", "every"), [("forwards", "every_forward"), ("backwards", "every_backward")])
def test_every_distinct_plan_of_any_width_has_a_case(cases: str, every: str) -> None:
    found = {kind_of_plan(case.plan) for case in getattr(kernels, cases)()}
    assert found == {kind_of_plan(case.plan) for case in getattr(kernels, every)()}


def test_the_cases_have_every_form_in_every_regime() -> None:
    for cases, fields in ((kernels.forwards(), ("weight", "residual")), (kernels.backwards(), ("weight", "dweight"))):
        for regime in {case.plan.regime for case in cases}:
            for field in fields:
                assert {getattr(case, field) for case in cases if case.plan.regime is regime} == {True, False}
    assert any(case.residual for case in kernels.backwards())
    assert {case.kind for case in kernels.column_sums()} == {ColumnSum(n, "bf16").kind for n in kernels.ALL_WIDTHS}


@pytest.mark.parametrize(
    ("run", "case"),
    [
        ("forward", Forward(33, "bf16", residual=True)),
        ("forward", Forward(1024, "f32", residual=False, weight=False)),
        ("backward", Backward(64, "bf16", "f32", residual=True)),
        ("backward", Backward(1024, "f32", "f32", residual=False, weight=False)),
        ("column_sum", ColumnSum(50, "bf16")),
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_the_right_kernels_pass(run: str, case: Any, implementation: str) -> None:
    getattr(every_kernel, run)(case, implementation)


def test_a_wrong_result_is_found_and_the_next_case_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(every_kernel, "where", lambda: "gpu")
    ran: list[str] = []

    def wrong() -> None:
        operands.assert_equal(np.array([1.0, 2.5]), np.array([1.0, 2.0]))

    assert every_kernel.run([("wrong", wrong), ("right", lambda: ran.append("right"))]) == 1
    out = capsys.readouterr().out
    assert ran == ["right"]
    assert "case: wrong\n" in out
    assert "1 of 2 differ; at (1,)" in out
    assert out.endswith("every kernel on gpu: 2 cases, 1 failed\n")


def test_the_gradients_that_are_known_before_are_those_of_float64() -> None:
    case = Backward(200, "f32", "f32", residual=False)
    given, dx, terms = operands.backward(case, 5)
    exact, bound = oracle.input_gradient64(given["x"], given["weight"], given["rstd"], given["dy"], 0)
    oracle.assert_within(dx, exact, bound)
    oracle.assert_within(
        terms.sum(axis=0), *oracle.weight_gradient64(given["x"], given["rstd"], given["dy"], oracle.F32)
    )


@pytest.mark.parametrize("tool", sanitizers.TOOLS)
def test_the_planted_defects_are_kernels(tool: str) -> None:
    x = jax.ShapeDtypeStruct((8 * planted.CHUNK,), jnp.float32)
    assert planted.DEFECTS[tool]
    for name, defect in planted.DEFECTS[tool].items():
        if tool == "racecheck":
            assert name in test_gpu_mutants.WITHOUT
        else:
            lowered = defect.trace(x).lower(lowering_platforms=("cuda",)).as_text()
            assert lowered.count("custom_call @mosaic_gpu") == 1


def test_a_planted_race_is_a_kernel_less_a_barrier(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names, seen = iter(planted.DEFECTS["racecheck"]), []

    def differing(kernel: str, **_: int) -> None:
        rewrite, of = test_gpu_mutants.WITHOUT[next(names)]
        mutated = rewrites.module_of(rewrite).__spec__ is None
        seen.append((kernel == of, mutated))

    monkeypatch.setattr(test_gpu_mutants, "differing", differing)
    planted.run("racecheck")
    assert seen == [(True, True)] * len(planted.DEFECTS["racecheck"])
    assert capsys.readouterr().out.startswith("case: backward sum\n")


# --- the sanitizers' reports ------------------------------------------------------------------------------------------

CLEAN = "case: a\nevery kernel on gpu: 1 cases, 0 failed\n========= ERROR SUMMARY: 0 errors\n"
PLANTED = "case: a read past the end\n========= Invalid __global__ read\n========= ERROR SUMMARY: 128 errors\n"
BARRIERS = (
    "case: an arrival at no barrier\n========= Barrier error detected. Missing init.\n"
    "========= ERROR SUMMARY: 128 errors\n"
)
RACE = (
    "case: a\ncase: b\n========= Error: Race reported between Write access at kernel_mosaic_gpu_kernel+0x90\n"
    "case: c\nevery kernel on gpu: 3 cases, 0 failed\n"
    "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n"
)


def test_the_summaries_are_read() -> None:
    assert reported("========= ERROR SUMMARY: 0 errors\n") == 0
    assert reported("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n") == 1
    assert reported("========= ERROR SUMMARY: 12 errors\n========= ERROR SUMMARY: 2 errors were not printed\n") == 12
    assert reported("case: ERROR SUMMARY: 0 errors\n") is None
    assert cases_with_reports(RACE, sanitizers.TOOLS["racecheck"].report) == ["b"]
    _, _, unnamed = PLANTED.partition("\n")
    assert cases_with_reports(unnamed, sanitizers.TOOLS["memcheck"].report) == ["before the first case"]


@pytest.mark.parametrize(
    ("run", "status", "log", "wrong"),
    [
        (Run("memcheck", "launch"), 0, CLEAN, None),
        (Run("memcheck", "launch"), None, CLEAN, "did not end in time"),
        (Run("memcheck", "launch"), 3, CLEAN, "exit status 3"),
        (Run("memcheck", "launch"), 0, CLEAN.replace("1 cases", "0 cases"), "not every case ran and was right"),
        (Run("memcheck", "launch"), 1, CLEAN.replace("0 failed", "1 failed"), "not every case ran and was right"),
        (Run("racecheck", "jax: "), 99, RACE, "2 reported, in b"),
        (Run("memcheck", None), 99, PLANTED, None),
        (Run("memcheck", None), 0, CLEAN, "not reported, of what was planted: a read past the end"),
        (Run("synccheck", None), 99, BARRIERS, None),
        (Run("synccheck", None), 99, BARRIERS.replace("Barrier error", "An error", 1), "planted: an arrival at no"),
        (
            Run("memcheck", None),
            255,
            "========= Error: Device not supported.\n",
            "no summary: ========= Error: Device not",
        ),
        (Run("memcheck", None), 1, "", "no summary: exit status 1"),
    ],
)
def test_a_run_is_judged_by_its_log(run: Run, status: int | None, log: str, wrong: str | None) -> None:
    found = judge(run, status, log)
    assert found is None if wrong is None else wrong in str(found)


FAKE = """#!/usr/bin/env bash
[ "$1" = --version ] && echo "Version 1.2.3" && exit
tool=$2
case "$*" in *"kernel_substring=mosaic_gpu"*) ;; *) echo no filter && exit 1 ;; esac
summary="ERROR SUMMARY: 0 errors"
[ "$tool" = racecheck ] && summary="RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
case "$*" in
  *gpu_proof.planted*)
    PLANTED
    echo "========= ${summary/ 0/ 3}" && exit 99 ;;
esac
[ "$XLA_PYTHON_CLIENT_ALLOCATOR$PYTORCH_NO_CUDA_MEMORY_CACHING" = platform1 ] || exit 1
echo "case: one"
echo "every kernel on gpu: 1 cases, 0 failed"
echo "========= $summary"
"""
REPORTS = {
    "memcheck": "Invalid __global__ read of size 4 bytes",
    "racecheck": "Error: Race reported between Write access",
    "initcheck": "Uninitialized __global__ memory read of size 4 bytes",
    "synccheck": "Barrier error detected. Missing init.",
}
FAKE = FAKE.replace(
    "PLANTED",
    "\n    ".join(
        f'[ $tool = {tool} ] && echo "case: {name}" && echo "========= {REPORTS[tool]}"'
        for tool, defects in planted.DEFECTS.items()
        for name in defects
    ),
)


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("", ""), "12 of 12 runs of compute-sanitizer as they must be"),
        (("Invalid", "Some"), "memcheck-planted     not reported, of what was planted: a read past the end"),
        (
            ("Barrier error", "Something"),
            "synccheck-planted    not reported, of what was planted: an arrival at no barrier",
        ),
        (("1 cases, 0 failed", "1 cases, 1 failed"), "racecheck-launch     not every case ran and was right"),
        (("on gpu:", "on cpu:"), "racecheck-launch     not every case ran and was right"),
        (("= platform1 ]", "= other ]"), "initcheck-jax        the tool gave no summary"),
        (('echo "case: one"', "sleep 30"), "memcheck-jax         did not end in time"),
    ],
)
def test_each_tool_must_find_its_defect_and_nothing_in_the_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str], told: str
) -> None:
    sanitizer = executable(tmp_path / "sanitizer", FAKE.replace(*change) if change[0] else FAKE)
    status = sanitizers.main([str(tmp_path / "logs"), "--sanitizer", sanitizer, "--seconds", "5"])
    out = capsys.readouterr().out
    assert told in out
    assert out.startswith("Version 1.2.3\n")
    assert status == (0 if change == ("", "") else 1)


def test_without_the_tool_the_proof_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sanitizers.main([str(tmp_path), "--sanitizer", str(tmp_path / "absent")]) == 1
    assert "is not on the PATH" in capsys.readouterr().out


# --- runs that are compared with the first ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", [Forward(50, "f32", residual=False), ColumnSum(50, "bf16")], ids=str)
def test_a_moved_bit_is_counted_in_every_run(case: Any) -> None:
    kernel, given = reruns.program(case, 100, interpret=True)

    def disturb(first: dict[str, jax.Array]) -> dict[str, jax.Array]:
        name = next(iter(first))
        return first | {name: first[name].at[(-1,) * first[name].ndim].multiply(-1)}

    assert reruns.differing(kernel, given, 3) == 0
    assert reruns.differing(kernel, given, 3, disturb=disturb) == 3


# --- a million calls --------------------------------------------------------------------------------------------------


def test_each_kind_of_call_is_compared_and_a_planted_element_is_found() -> None:
    pytest.importorskip("torch", reason="needs torch")
    import random

    from tests.gpu_proof import batches
    from tests.gpu_proof.expected import Case

    pattern = batches.Pattern.of(Case.of(64, "bf16", 4), random.Random(0), ragged=False)
    comparer, kept = batches.Comparer(pattern.case.x.device), {}
    for kind in batches.KINDS:
        for planted_one in (False, True):
            batches.run(kind, pattern, kept, comparer, planted=planted_one)
        assert comparer.elements[kind] >= 2 * 4 * 64
    assert {kind: int(wrong) for kind, wrong in comparer.wrong.items()} == dict.fromkeys(batches.KINDS, 1) | {
        "graph": 0
    }


def test_a_rehearsal_of_the_stress_passes_and_fails_where_it_is_too_slow(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="needs torch")
    from tests.gpu_proof import stress

    assert stress.main(["--rehearsal", "--calls", "6000", "--threads", "2"]) == 0
    out = capsys.readouterr().out
    assert '"planted_found": 1,' in out
    assert out.endswith("calls, 0 graph replays, 0 elements wrong\n")
    assert stress.main(["--rehearsal", "--calls", "6000", "--threads", "2", "--seconds", "0"]) == 1


def test_memory_that_calls_keep_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="needs torch")
    from tests.gpu_proof import growth

    calm = [{"host": 100, "allocated": 5}] * 14
    assert growth.too_much(growth.grown(calm)) == {}
    assert growth.too_much(growth.grown([*calm[:-1], {"host": 99, "allocated": 6}])) == {"allocated": 1}
    monkeypatch.setattr(growth, "MOST", {"host": 1 << 40})
    assert growth.main(["--rehearsal", "--calls", "700"]) == 0
    kept: list[Any] = []
    calls = growth.calls
    monkeypatch.setattr(growth, "MOST", {"host": 64 << 20})
    monkeypatch.setattr(growth, "calls", lambda *of: kept.append(planted.pages(16 << 20)) or calls(*of))
    assert growth.main(["--rehearsal", "--calls", "700"]) == 1
    assert "too much: ['host']" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit):
        reruns.main(["--only", "forward 33"])
    assert reruns.main(["--rehearsal", "--only", "column sum 33", "--runs", "2"]) == 0
