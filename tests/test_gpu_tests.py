"""scripts/gpu-tests with a Python that only pretends: which groups it starts, and what it makes of their ends."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PYTHON = """#!/usr/bin/env bash
# In the place of python: passes, unless an argument is the one that must fail.
echo "$*"
case "$*" in *@FAILING@*) echo "1 failed"; exit 1 ;; *@SLOW@*) exit 124 ;; esac
echo "==== 3 passed ===="
"""


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


def run_gpu_tests(
    folder: Path, what: str, *, failing: str = "nothing", slow: str = "nothing"
) -> tuple[int, list[list[str]]]:
    python = executable(folder.with_suffix(".python"), PYTHON.replace("@FAILING@", failing).replace("@SLOW@", slow))
    command = [str(ROOT / "scripts" / "gpu-tests"), str(folder), python, what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == (folder / "summary.txt").read_text()
    return done.returncode, [line.split() for line in done.stdout.splitlines()]


def test_the_summary_names_every_group_and_fails_with_one(tmp_path: Path) -> None:
    status, lines = run_gpu_tests(tmp_path / "all", "all")
    groups = {name: outcome for name, outcome, *_ in lines}
    assert status == 0
    assert set(groups.values()) == {"passed"}
    assert {
        *("kernels-bf16", "torch-launch", "others"),
        *("sanitizers", "stress", "memory", "reruns", "older-gpus", "as-ampere-jax", "as-ampere-torch"),
        *("order", "roots", "sigmoids"),
        *("properties-backward", "nightly-backward-1"),
    } <= set(groups)
    assert all(line[3:] == ["s", "3", "passed"] for line in lines)

    for part in (
        "gpu_proof.sanitizers",
        "gpu_proof.stress",
        "gpu_proof.growth",
        "gpu_proof.reruns",
        "gpu_proof.older_gpus",
        "gpu_proof.order",
        "gpu_proof.roots",
        "gpu_proof.sigmoids",
    ):
        status, lines = run_gpu_tests(tmp_path / "proof", "proof", failing=part)
        assert status == 1
        assert len(lines) == 10
        assert [line[1] for line in lines].count("failed") == 1
    status, lines = run_gpu_tests(tmp_path / "tests", "tests", slow="test_gpu_xla")
    assert status == 1
    assert [line[:3] for line in lines if line[0] == "xla"] == [["xla", "timed", "out"]]


def test_the_parts_may_be_several_commands_with_one_summary(tmp_path: Path) -> None:
    assert run_gpu_tests(tmp_path / "run", "tests", failing="test_gpu_xla")[0] == 1
    status, lines = run_gpu_tests(tmp_path / "run", "proof")
    assert status == 1
    assert {line[0] for line in lines} > {"xla", "stress"}


def test_every_file_with_gpu_tests_is_in_a_group(tmp_path: Path) -> None:
    """The last group takes all files that no other names."""
    run_gpu_tests(tmp_path / "run", "tests")
    others = (tmp_path / "run" / "others.log").read_text().split("\n")[0].split()
    assert "tests" in others
    logs = [path.read_text() for path in (tmp_path / "run").glob("*.log") if path.stem != "others"]
    ignored = [word.removeprefix("--ignore=") for word in others if word.startswith("--ignore=")]
    assert len(ignored) >= 10
    for file in ignored:
        assert (ROOT / file).exists()
        assert any(file in log for log in logs)


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    command = [str(ROOT / "scripts" / "gpu-tests"), str(tmp_path), sys.executable, "some"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 2
    assert "some is none of tests, nightly, proof, all" in done.stderr
