"""scripts/two-gpus with a Python that only pretends: which groups it starts, and what it makes of their ends."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_gpu_tests import PYTHON, ROOT, executable
from tests.two_gpus import all_reduce

pytestmark = pytest.mark.slow

GROUPS = {
    "memory": "two_gpus.fresh alone",
    "first-calls": "two_gpus.fresh",
    "one-process": "two_gpus.one_process",
    "pipelines": "two_gpus.pipelines",
    "training": "two_gpus.ranks training",
    "tensor-parallel": "two_gpus.ranks tensor_parallel",
    "jax-tests": "tests/test_gpu_sharding.py",
    "jax-processes": "two_gpus.jax_processes",
    "stress": "two_gpus.both_stress",
}


def run_two_gpus(folder: Path, *, python: str = PYTHON, failing: str = "nothing", slow: str = "nothing") -> Any:
    text = python.replace("@FAILING@", failing.replace(" ", "\\ ")).replace("@SLOW@", slow)
    command = [str(ROOT / "scripts" / "two-gpus"), str(folder), executable(folder.with_suffix(".python"), text)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == (folder / "summary.txt").read_text()
    _, _, *lines = done.stdout.splitlines()  # of the pretended python: what it was asked, and "passed"
    return done.returncode, {name: " ".join(words) for name, *words in map(str.split, lines)}


def test_the_summary_names_every_group(tmp_path: Path) -> None:
    status, groups = run_two_gpus(tmp_path / "all")
    assert status == 0
    assert groups.keys() == GROUPS.keys()
    assert all(outcome.startswith("passed") and outcome.endswith("3 passed") for outcome in groups.values())
    for name, command in GROUPS.items():
        assert command in (tmp_path / "all" / f"{name}.log").read_text()


@pytest.mark.parametrize("name", [name for name in GROUPS if name != "first-calls"])
def test_it_fails_with_a_group(name: str, tmp_path: Path) -> None:
    status, groups = run_two_gpus(tmp_path / "run", failing=GROUPS[name])
    assert status == 1
    assert [group for group, outcome in groups.items() if outcome.startswith("failed")] == [name]


def test_it_fails_where_a_group_takes_too_long_or_skips(tmp_path: Path) -> None:
    status, groups = run_two_gpus(tmp_path / "slow", slow="both_stress")
    assert status == 1
    assert groups["stress"].startswith("timed out")
    skipping = PYTHON.replace("==== 3 passed ====", "==== 1 passed, 2 skipped in 3.00s ====")
    status, groups = run_two_gpus(tmp_path / "skips", python=skipping)
    assert status == 1
    assert groups["jax-tests"].startswith("skipped")


def test_what_pythonpath_names_comes_after_the_tree_and_before_the_installed(tmp_path: Path) -> None:
    shows = '#!/usr/bin/env bash\necho "$PYTHONPATH"\n'
    python = executable(tmp_path / "python", shows)
    environment = os.environ | {"PYTHONPATH": "/another/jax"}
    command = [str(ROOT / "scripts" / "two-gpus"), str(tmp_path / "run"), python]
    subprocess.run(command, env=environment, capture_output=True, timeout=120, check=True)
    assert (tmp_path / "run" / "training.log").read_text() == ".:interop:/another/jax\n"


def test_jax_takes_nccls_all_reduce_where_its_own_does_not_run_and_the_summary_says_so(tmp_path: Path) -> None:
    """Plain JAX 0.12 raised INTERNAL on two H200 where NCCL gives no windows: 28 tests failed, none by a norm."""
    program = "import os, sys; sys.exit('INTERNAL: no window' if '-ALL_REDUCE' not in os.environ['XLA_FLAGS'] else 0)"
    call = f"import sys; from tests.two_gpus import all_reduce; sys.exit(all_reduce.main(program={program!r}))"
    shows = f"""#!/usr/bin/env bash
case "$*" in
*all_reduce) exec {sys.executable} -c {shlex.quote(call)} ;;
*jax_processes*|*training*) echo "flags:$XLA_FLAGS" ;;
*) echo passed ;;
esac
"""
    python = executable(tmp_path / "python", shows)
    command = [str(ROOT / "scripts" / "two-gpus"), str(tmp_path / "run"), python]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert (
        "plain JAX adds up no small arrays of two GPUs here: INTERNAL: no window; "
        "the groups of JAX ran with --xla_gpu_experimental_use_collective_kernels=-ALL_REDUCE"
    ) in done.stdout
    assert "-ALL_REDUCE" in (tmp_path / "run" / "jax-processes.log").read_text()
    assert (tmp_path / "run" / "training.log").read_text() == "flags:\n"


@pytest.mark.parametrize(("program", "status"), [("", 0), ("raise SystemExit('no')", 1)])
def test_plain_jax_that_runs_needs_no_flags_and_one_that_never_does_is_said(
    program: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert all_reduce.main(program=program) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("plain JAX adds up no arrays of two GPUs: no; with" if status else "")


@pytest.mark.skipif(torch.cuda.device_count() >= 2, reason="there are two GPUs: make test-gpus runs these")
@pytest.mark.parametrize("module", ["fresh", "one_process", "pipelines", "ranks training", "both_stress"])
def test_without_two_gpus_no_group_passes(module: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", *f"tests.two_gpus.{module}".split()]
    path = os.pathsep.join([".", "interop", *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "needs two CUDA devices" in done.stderr
