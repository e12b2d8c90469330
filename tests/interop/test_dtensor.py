"""DTensors: local rows, y placed as x, dweight a partial sum. Two processes run every case of dtensor_cases."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.device_mesh
import torch.multiprocessing

from pallas_norm_torch import add_rms_norm, rms_norm, rms_norm_gated, rms_norm_quantized, rms_norm_rope
from tests.interop import dtensor_cases
from tests.interop.cases import assert_same, draw

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


def placed(mesh: Any, local: torch.Tensor, placement: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh, [placement], run_check=False)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_placements(axis: int | None, mesh_of_one: Any, *, trains: bool) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    placement = Replicate() if axis is None else Shard(axis)
    place = functools.partial(placed, mesh_of_one)
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


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_placements_of_gated_norms(axis: int | None, mesh_of_one: Any, *, trains: bool) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    placement = Replicate() if axis is None else Shard(axis)
    place = functools.partial(placed, mesh_of_one)
    last = place(draw(4, 32, dtype=torch.float32), Shard(1))
    assert rms_norm_gated(last, last, group_size=32).placements[0] in (Replicate(), Shard(0))
    x, gate = (place(draw(2, 4, 64, dtype=torch.float32, seed=seed), placement) for seed in (0, 1))
    weight = place(torch.ones(64), Replicate())
    with torch.inference_mode():
        made = place(draw(2, 4, 64, dtype=torch.float32), placement)
        y = rms_norm_gated(made, made)
        assert y.placements == (placement,)
        assert_same(y.to_local(), rms_norm_gated(made.to_local(), made.to_local()))
    for wanted in (not trains, trains):
        leaves = [one.detach().requires_grad_() for one in (x, gate)]
        last = weight.detach().requires_grad_(wanted)
        for group in (64, 32):
            y = rms_norm_gated(*leaves, last, group_size=group)
            plain = [one.to_local().detach().requires_grad_() for one in leaves]
            of_weight = last.to_local().detach().requires_grad_()
            expected = rms_norm_gated(*plain, of_weight, group_size=group)
            assert y.placements == (placement,)
            assert_same(y.to_local(), expected)
            asked = [*leaves, last] if wanted else leaves
            found = torch.autograd.grad(y.sum(), asked)
            right = torch.autograd.grad(expected.sum(), [*plain, of_weight])
            placements = [placement, placement, Replicate() if axis is None else Partial()]
            for one, other, where in zip(found, right, placements, strict=False):
                assert one.placements == (where,)
                assert_same(one.to_local(), other)
    (first,) = torch.autograd.grad(rms_norm_gated(*leaves).sin().sum(), leaves[:1], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaves[:1])
    assert second.placements == (placement,)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_placements_of_rotated_heads(axis: int | None, batch: int, mesh_of_one: Any) -> None:
    """By tokens the angles go along, where they have the axis; by heads, and where all members share them, each rank
    has them whole."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    placement = Replicate() if axis is None else Shard(axis)

    def place(placement: Any, *shape: int, seed: int) -> Any:
        return placed(mesh_of_one, draw(*shape, dtype=torch.float32, seed=seed), placement)

    tokens = 6 if axis == 1 else 3
    pair = [place(placement, 4 if axis != 0 else 2, 3, heads, 16, seed=heads) for heads in (4, 2)]
    angles = [place(Replicate(), batch, tokens, 16, seed=seed) for seed in (5, 6)]
    weights = [place(Replicate(), 16, seed=seed) for seed in (7, 8)]
    leaves = [one.detach().requires_grad_() for one in (*pair, *weights)]
    plain = [one.to_local().detach().requires_grad_() for one in leaves]
    mine = [one.to_local()[: 2 if axis == 0 else 4, :3] for one in angles]
    results = rms_norm_rope(leaves[0], leaves[1], *angles, *leaves[2:])
    expected = rms_norm_rope(plain[0], plain[1], *mine, *plain[2:])
    for one, other in zip(results, expected, strict=True):
        assert one.placements == (placement,)
        assert_same(one.to_local(), other.detach())
    (alone,) = torch.autograd.grad(results[1].sum(), leaves[1], retain_graph=True)  # of q nothing is asked
    assert alone.placements == (placement,)
    found = torch.autograd.grad(sum(y.sin().sum() for y in results), leaves)
    right = torch.autograd.grad(sum(y.sin().sum() for y in expected), plain)
    of_weight = Replicate() if axis is None else Partial()
    for one, other, where in zip(found, right, [placement, placement, of_weight, of_weight], strict=True):
        assert one.placements == (where,)
        assert_same(one.to_local(), other)


def test_what_goes_wrong_is_told(tmp_path: Path) -> None:
    (tmp_path / "rows.0").write_text("wrong")
    with pytest.raises(AssertionError, match=r"^rank 0:\s+wrong"):
        test_two_processes("rows", tmp_path)


@pytest.mark.slow
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


@pytest.mark.parametrize("name", ["x", "weight"])
def test_a_result_of_8_bits_is_not_that_of_a_dtensor(name: str, mesh_of_one: Any) -> None:
    """torch's own error is of a strategy that is not registered, and says nothing of what to do."""
    from torch.distributed.tensor import Replicate

    given = {"x": torch.ones(4, 64), "weight": torch.ones(64)}
    given[name] = placed(mesh_of_one, given[name], Replicate())
    message = (
        f"{name} is a DTensor, and a result of 8 bits is computed of plain tensors only; "
        f"pass {name}.to_local(), of whole rows"
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        rms_norm_quantized(**given)


FIRST_CALLS = """
import os
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from pallas_norm_torch import add_rms_norm, rms_norm, rms_norm_gated, rms_norm_rope

torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
mesh = init_device_mesh("cpu", (2,))
x, heads, angles = (DTensor.from_local(torch.ones(shape), mesh, [Shard(0)]) for shape in ((2, 8), (2, 4, 8), (2, 8)))
weight = DTensor.from_local(torch.ones(8), mesh, [Replicate()])
for call in (
    lambda: rms_norm(x, weight),
    lambda: add_rms_norm(x, x, weight),
    lambda: rms_norm_gated(x, x, weight),
    lambda: rms_norm_rope(heads, heads, angles, angles, weight, weight),
):
    if not (child := os.fork()):
        with torch.inference_mode():
            call()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.slow
def test_the_first_call_of_a_process_may_be_in_inference_mode() -> None:
    """No autograd rule runs there, and it was these that told DTensor how the operators are sharded: each call here is
    the first of a process."""
    environment = {"PYTHONPATH": ":".join(filter(None, sys.path)), "PATH": ""}
    call = [sys.executable, "-W", "ignore", "-c", FIRST_CALLS]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
