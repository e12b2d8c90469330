"""DTensors: local rows, y placed as x, dweight a partial sum. Two processes run every case of dtensor_cases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from tests.interop import dtensor_cases

# Whatever of torch is imported first, by DTensor, may still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dtensor")
    torch.multiprocessing.spawn(dtensor_cases.run, (str(folder),), nprocs=dtensor_cases.RANKS)
    return folder


@pytest.mark.parametrize("name", dtensor_cases.CASES)
def test_two_processes(name: str, outcomes: Path) -> None:
    for rank in range(dtensor_cases.RANKS):
        found = (outcomes / f"{name}.{rank}").read_text()
        assert not found, f"rank {rank}:\n{found}"


def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.0").write_text("wrong")
    with pytest.raises(AssertionError, match=r"^rank 0:\s+wrong"):
        test_two_processes("rows", tmp_path)


def test_dtensor_is_not_imported_for_those_who_do_not_use_it() -> None:
    """Its import takes 0.7 s."""
    code = (
        "import sys, torch, pallas_norm_torch as p; assert 'torch.distributed.tensor' not in sys.modules;"
        "x = torch.ones(2, 8, requires_grad=True); p.rms_norm(x).sum().backward();"
        "assert 'torch.distributed.tensor' not in sys.modules"
    )
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
