"""DTensors: local rows, y placed as x, dweight a partial sum. Two processes run every case of dtensor_cases."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.device_mesh
import torch.multiprocessing

from pallas_norm_torch import add_rms_norm, rms_norm
from tests.interop import dtensor_cases
from tests.interop.cases import draw

# Whatever of torch is imported first, by DTensor, may still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dtensor")
    torch.multiprocessing.spawn(dtensor_cases.run, (str(folder),), nprocs=dtensor_cases.RANKS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", dtensor_cases.CASES)
def test_two_processes(name: str, outcomes: Path) -> None:
    for rank in range(dtensor_cases.RANKS):
        found = (outcomes / f"{name}.{rank}").read_text()
        assert not found, f"rank {rank}:\n{found}"


@pytest.fixture
def mesh_of_one() -> Iterator[Any]:
    """Of two ranks, of which only this process is there: what another would send is never waited for."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_placements(axis: int | None, mesh_of_one: Any, *, trains: bool) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    placement = Replicate() if axis is None else Shard(axis)

    def place(tensor: torch.Tensor, placement: Any) -> Any:
        return DTensor.from_local(tensor, mesh_of_one, [placement], run_check=False)

    last = place(draw(4, 32, dtype=torch.float32), Shard(1))
    assert rms_norm(last).placements[0] in (Replicate(), Shard(0))
    x, weight = place(draw(2, 4, 64, dtype=torch.float32), placement), place(torch.ones(64), Replicate())
    with torch.inference_mode():  # what is made here meets no autograd
        made = place(draw(2, 4, 64, dtype=torch.float32), placement), place(torch.ones(64), Replicate())
        assert rms_norm(*made).placements == (placement,)
    for wanted in (not trains, trains):  # what was found for the one is not kept for the other
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_(wanted)
        y, s = add_rms_norm(x, x, weight)
        assert y.placements == s.placements == (placement,)
        (dx,) = torch.autograd.grad(y.sum() + s.sum(), x, retain_graph=True)
        assert dx.placements == (placement,)
        if wanted:
            (dweight,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
            assert dweight.shape == (64,)
            assert dweight.placements == (Replicate() if axis is None else Partial(),)
    (first,) = torch.autograd.grad(rms_norm(x, weight).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.placements == (placement,)


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
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
