"""The checks of the run on two GPUs, without one: that each finds what it is there to find, and fails then."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pallas_norm_torch
from tests.interop.cases import assert_same
from tests.test_gpu_tests import ROOT
from tests.two_gpus import both_stress, checks, distances, first_call, fresh, known, one_process, state
from tests.two_gpus.distances import Training

pytestmark = pytest.mark.slow


# --- two processes ----------------------------------------------------------------------------------------------------

PLANTED = """
def fails_on_one(rank):
    assert rank.number == 0, "planted"
    return f"on {rank.device}"

CHECKS = [("passes", lambda rank: rank.gathered(__import__("torch").ones(2))[1].sum() == 2), ("fails", fails_on_one)]
"""


def run_ranks(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "interop"), str(folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", *arguments, "--rehearsal"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_a_check_that_fails_on_one_rank_fails_the_group(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    code = "import sys; from tests.two_gpus import ranks; sys.exit(ranks.main('planted'))"
    done = run_ranks(tmp_path, "-c", code)
    assert done.returncode == 1, done.stderr
    assert "rank 0: ok     fails: on cpu" in done.stdout
    assert "rank 1: FAILED fails" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("3 checks passed, 1 failed, 0 did not run")


def test_a_rank_that_dies_fails_the_group(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("import os\nCHECKS = [('dies', lambda rank: rank.number and os._exit(7))]\n")
    code = "import sys; from tests.two_gpus import ranks; sys.exit(ranks.main('planted'))"
    done = run_ranks(tmp_path, "-c", code)
    assert done.returncode == 1
    assert "terminated with exit code 7" in done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("group", ["ranks training", "jax_processes"])
def test_two_processes_on_a_cpu(group: str, tmp_path: Path) -> None:
    done = run_ranks(tmp_path, "-m", *f"tests.two_gpus.{group}".split())
    assert done.returncode == 0, done.stdout + done.stderr


# --- the checks -------------------------------------------------------------------------------------------------------


def test_a_check_fails_by_raising_or_by_false_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        assert_same(torch.ones(3), torch.tensor([1.0, 1.0, 2.0]))

    found = checks.run([("wrong", wrong), ("no", lambda: False), ("right", lambda: "well")], label="rank 1: ")
    assert found == (1, 2)
    out = capsys.readouterr().out
    assert "rank 1: FAILED wrong" in out
    assert "1 of 3 elements differ" in out
    assert "rank 1: FAILED no" in out
    assert "rank 1: ok     right: well (" in out


@pytest.mark.parametrize(
    ("passed", "failed", "wanted", "status"), [(3, 0, 3, 0), (2, 1, 3, 1), (2, 0, 3, 1), (0, 0, 0, 1)]
)
def test_what_failed_or_never_ran_is_a_failure(passed: int, failed: int, wanted: int, status: int) -> None:
    assert checks.finish(passed, failed, wanted=wanted) == status


def test_the_last_line_names_the_cards(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checks, "cards", lambda: "2 x NVIDIA H200")
    assert checks.main([("right", lambda: None)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("1 checks passed, 0 failed, 0 did not run on 2 x NVIDIA H200 (jax ")


def test_the_right_results_are_those_that_were_known() -> None:
    for n in (16, 64, 1000):
        known.check_all(known.of("cpu", n, 12))


@pytest.mark.parametrize("what", ["y", "dx", "dweight"])
def test_wrong_bits_are_found(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = known.of("cpu", 64, 12)

    def wrong(x: torch.Tensor, weight: torch.Tensor, **options: Any) -> torch.Tensor:
        y = pallas_norm_torch.rms_norm(x, weight, **options)
        y = y * (1 + 2.0**-7) if what == "y" else y
        if y.requires_grad and what in ("dx", "dweight"):
            (x if what == "dx" else weight).register_hook(lambda gradient: gradient * 1.02)
        return y

    known.check_backward(case)
    monkeypatch.setattr(known, "rms_norm", wrong)
    with pytest.raises(AssertionError, match=r"elements differ|more than a rounding"):
        known.check_backward(case)


def test_the_one_process_checks_that_a_cpu_can_run() -> None:
    for check in (one_process.known_bits_whichever_device_is_current, one_process.the_same_bits_on_both):
        check()
    assert one_process.fresh_threads() == "1616 calls in 16 threads"
    one_process.backward_over_both()


def test_a_thread_s_failure_is_the_check_s(monkeypatch: pytest.MonkeyPatch) -> None:
    case = known.of("cpu", 64, 12)
    first_call.in_thread(case)
    monkeypatch.setattr(first_call, "rms_norm", lambda x, weight: torch.zeros_like(x))
    with pytest.raises(AssertionError, match="elements differ"):
        first_call.in_thread(case)


def test_the_stress_on_both_counts_and_finds_what_is_planted() -> None:
    cases = [both_stress.cases_of(device) for device in both_stress.DEVICES]
    made, _, wrong = both_stress.run(cases, 60, calls=10, planted=True)
    assert min(made) >= 10 * both_stress.THREADS
    assert wrong == 1
    assert both_stress.run(cases, 60, calls=10)[2] == 0


# --- fresh processes --------------------------------------------------------------------------------------------------


def test_every_way_of_a_first_call_is_started_on_both_gpus() -> None:
    names = [name for name, _ in (*fresh.alone(), *fresh.together())]
    assert len(set(names)) == len(names)
    for way in (*first_call.WAYS, "jax-first", "torch-first"):
        for gpu in (0, 1):
            assert any(way in name and f"cuda:{gpu}" in name for name in names), (way, gpu)
    assert first_call.elsewhere("all@elsewhere") == ("all", True)
    assert first_call.elsewhere("stream") == ("stream", False)


def test_a_child_that_fails_or_that_compiles_again_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="ended with 1"):
        fresh.with_environment("no such way", 0, CUDA_VISIBLE_DEVICES="", JAX_PLATFORMS="cpu")
    written = 0

    def writes(*arguments: str, cache: str) -> str:
        nonlocal written
        Path(cache, "pallas_norm").mkdir(exist_ok=True)
        Path(cache, "pallas_norm", f"{written}.kernel").touch()
        written += again
        return ""

    monkeypatch.setattr(fresh, "child", writes)
    again = 0
    assert fresh.uncached_and_cached("forward", 0) == ""
    again = 1
    with pytest.raises(AssertionError, match="the second process compiled"):
        fresh.uncached_and_cached("forward", 0)
    monkeypatch.setattr(fresh, "child", lambda *arguments, cache: "")
    with pytest.raises(AssertionError, match="stored no kernel"):
        fresh.uncached_and_cached("forward", 0)


def test_memory_of_a_gpu_that_nobody_uses_is_a_failure() -> None:
    check = functools.partial(state.assert_memory_untouched, used="a", most=300)
    assert check({"a": 600, "b": 4}, {"a": 640, "b": 4}) == "+40 MiB on its own GPU, 0 on the others"
    with pytest.raises(AssertionError, match="537 MiB of the GPU b"):
        check({"a": 600, "b": 4}, {"a": 640, "b": 541})
    with pytest.raises(AssertionError, match="of its own GPU, more than 300"):
        check({"a": 600, "b": 4}, {"a": 100_000, "b": 4})
    with pytest.raises(AssertionError, match="none of"):
        check({"b": 4}, {"b": 4})


def test_another_context_or_a_started_jax_is_a_failure() -> None:
    before = state.State(0, 17, (True, False), False)  # noqa: FBT003
    state.assert_unchanged(before, before)
    for after in (
        state.State(1, 17, (True, False), False),  # noqa: FBT003
        state.State(0, 18, (True, False), False),  # noqa: FBT003
        state.State(0, 17, (True, True), False),  # noqa: FBT003
        state.State(0, 17, (True, False), True),  # noqa: FBT003
    ):
        with pytest.raises(AssertionError, match="before the call"):
            state.assert_unchanged(before, after)


# --- distances --------------------------------------------------------------------------------------------------------


def training(loss: float, gradient: float) -> Training:
    return Training([loss, loss], {"norm": torch.full((4,), gradient)})


def test_a_distance_beyond_the_unpatched_model_s_own_is_a_failure() -> None:
    own, exact = training(6.34, 1.01), training(6.342, 1.0)
    assert "6.3410" in distances.assert_training_near(training(6.341, 0.99), own, exact)
    for wrong in (training(float("nan"), 1.0), training(6.5, 1.0)):
        with pytest.raises(AssertionError, match="the losses is"):
            distances.assert_training_near(wrong, own, exact)
    for wrong in (training(6.341, 1.2), training(6.341, float("nan"))):
        with pytest.raises(AssertionError, match="the gradient of norm is"):
            distances.assert_training_near(wrong, own, exact)
    with pytest.raises(AssertionError):
        distances.assert_training_near(Training([6.341, 6.341], {}), own, exact)
