"""What two processes do with DTensors, by name: test_dtensor.py runs them all at once, and reports each."""

from __future__ import annotations

import datetime
import functools
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pallas_norm_torch import RMSNorm, add_rms_norm, rms_norm, rms_norm_gated, rms_norm_rope, rope_statements
from tests.interop.cases import assert_same, assert_sums, draw

RANKS, N = 2, 64
CASES: dict[str, Callable[[Any], None]] = {}
Tensor = torch.Tensor


def case(function: Callable[[Any], None]) -> Callable[[Any], None]:
    CASES[function.__name__] = function
    return function


def run(rank: int, folder: str) -> None:
    """Writes what went wrong, or nothing, into a file for each case."""
    from torch.distributed.device_mesh import init_device_mesh

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", RANKS),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (RANKS,))
    for name, function in CASES.items():
        try:
            function(mesh)
            found = ""
        except Exception:
            found = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(found)
    dist.destroy_process_group()


def placed(mesh: Any, placement: Any, *shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(draw(*shape, dtype=dtype, seed=seed), mesh, [placement])


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor().detach()


def placements() -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard

    return {"Shard(0)": Shard(0), "Shard(1)": Shard(1), "Replicate": Replicate()}


def forward_and_backward(mesh: Any, placement: Any, norm: Any = None) -> None:
    from torch.distributed.tensor import Partial, Replicate

    def both(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, s = add_rms_norm(x, residual, weight)
        return y, s, rms_norm(x, weight)

    shape = (4, 6, N)
    x, residual, of_s = (placed(mesh, placement, *shape, seed=seed) for seed in range(3))
    weight = placed(mesh, Replicate(), N, seed=3, dtype=torch.float32)
    of_y, of_z = (placed(mesh, placement, *shape, seed=seed, dtype=torch.float32) for seed in (4, 5))
    gradients = of_y, of_s, of_z
    leaves = [tensor.detach().requires_grad_() for tensor in (x, residual, weight)]
    plain = [whole(tensor).requires_grad_() for tensor in leaves]
    results, expected = (norm or both)(*leaves), both(*plain)
    for found, right in zip(results, expected, strict=True):
        assert found.placements == (placement,), found.placements
        assert_same(whole(found), right.detach())
        if not placement.is_replicate():
            assert found.to_local().numel() == right.numel() // RANKS
    found = torch.autograd.grad(results, leaves, gradients)
    right = torch.autograd.grad(expected, plain, [whole(gradient) for gradient in gradients])
    for of_rows, expected_rows in zip(found[:2], right[:2], strict=True):
        assert of_rows.placements == (placement,), of_rows.placements
        if norm is None:
            assert_same(whole(of_rows), expected_rows)
    assert found[2].placements == (Replicate() if placement.is_replicate() else Partial(),), found[2].placements
    units = torch.stack([rms_norm(expected[1].detach()), rms_norm(whole(x))])
    assert_sums(whole(found[2]), right[2], torch.stack([whole(of_y), whole(of_z)]) * units)


@case
def rows_sharded_on_their_first_axis(mesh: Any) -> None:
    forward_and_backward(mesh, placements()["Shard(0)"])


@case
def rows_sharded_on_another_axis(mesh: Any) -> None:
    forward_and_backward(mesh, placements()["Shard(1)"])


@case
def replicated_rows(mesh: Any) -> None:
    forward_and_backward(mesh, placements()["Replicate"])


@case
def compiled(mesh: Any) -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def both(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, s = add_rms_norm(x, residual, weight)
        return y, s, rms_norm(x, weight)

    for placement in placements().values():
        forward_and_backward(mesh, placement, both)


@case
def a_sharded_last_axis_is_gathered(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    x, weight = placed(mesh, Shard(1), 4, N), placed(mesh, Shard(0), N, seed=1)
    y = rms_norm(x, weight)
    assert y.placements == (Replicate(),) or y.placements == (Shard(0),), y.placements
    assert_same(whole(y), rms_norm(whole(x), whole(weight)))
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(leaf, weight).sum(), leaf)
    plain = whole(x).requires_grad_()
    assert_same(whole(dx), torch.autograd.grad(rms_norm(plain, whole(weight)).sum(), plain)[0])


@case
def a_partial_sum_is_added_up_first(mesh: Any) -> None:
    from torch.distributed.tensor import DTensor, Partial

    local = draw(4, N, dtype=torch.float32, seed=dist.get_rank()).to(mesh.device_type)
    x = DTensor.from_local(local, mesh, [Partial()])
    assert_same(whole(rms_norm(x)), rms_norm(whole(x)))


@case
def without_gradients(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    x, weight = placed(mesh, Shard(0), 4, N), placed(mesh, Replicate(), N, seed=1)
    expected = rms_norm(whole(x), whole(weight))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = rms_norm(x, weight)
            assert y.placements == (Shard(0),)
        assert_same(whole(y.clone()), expected)
    with torch.inference_mode():
        y, _ = torch.ops.pallas_norm.rms_norm(x, weight, 1e-6, True, 0.0)  # noqa: FBT003
    assert_same(whole(y.clone()), expected)


@case
def a_frozen_weight_before_one_that_trains(mesh: Any) -> None:
    """DTensor kept what it found for the one, dweight of no elements, for the other."""
    from torch.distributed.tensor import Replicate, Shard

    x, weight = placed(mesh, Shard(0), 2, N).requires_grad_(), placed(mesh, Replicate(), N, seed=1)
    for trains in (False, True, False, True):
        last = weight.detach().requires_grad_(trains)
        rms_norm(x, last).sum().backward()
        if trains:
            assert last.grad.shape == (N,)
            assert whole(last.grad).shape == (N,)
            assert bool(whole(last.grad).abs().sum() > 0)


@case
def no_weight_and_other_options(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    x, weight = placed(mesh, Shard(0), 4, N), placed(mesh, Replicate(), N, seed=1, dtype=torch.float32)
    assert_same(whole(rms_norm(x)), rms_norm(whole(x)))
    for options in ({"eps": 0.5}, {"cast_before_scale": False, "weight_offset": 1.0}, {}):
        y = rms_norm(x, weight, **options)
        assert_same(whole(y), rms_norm(whole(x), whole(weight), **options))
        assert y.dtype == torch.float32
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(leaf).sum(), leaf)
    assert dx.placements == (Shard(0),)


@case
def differentiated_twice(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard

    def second(x: Any, weight: Any) -> tuple[Any, ...]:
        leaves = x.detach().requires_grad_(), weight.detach().requires_grad_()
        first = torch.autograd.grad(rms_norm(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(first[0].square().sum(), leaves)

    x = placed(mesh, Shard(0), 4, N, dtype=torch.float32)
    weight = placed(mesh, Replicate(), N, seed=1, dtype=torch.float32)
    for found, expected in zip(second(x, weight), second(whole(x), whole(weight)), strict=True):
        torch.testing.assert_close(whole(found), expected, rtol=1e-4, atol=1e-4)


@case
def gated(mesh: Any) -> None:
    from torch.distributed.tensor import Partial, Replicate

    for placement in placements().values():
        for of_gate in placements().values():  # which goes where x is
            x, dy = (placed(mesh, placement, 4, 6, N, seed=seed, dtype=torch.float32) for seed in (0, 1))
            gate = placed(mesh, of_gate, 4, 6, N, seed=2, dtype=torch.float32)
            weight = placed(mesh, Replicate(), N, seed=3, dtype=torch.float32)
            leaves = [one.detach().requires_grad_() for one in (x, gate, weight)]
            plain = [whole(one).requires_grad_() for one in leaves]
            for activation in ("silu", "sigmoid"):
                y = rms_norm_gated(*leaves, activation=activation, group_size=32)
                expected = rms_norm_gated(*plain, activation=activation, group_size=32)
                assert_same(whole(y), expected.detach())
                if placement == of_gate:
                    assert y.placements == (placement,), y.placements
                dx, dgate, dweight = torch.autograd.grad(y, leaves, dy)
                right = torch.autograd.grad(expected, plain, whole(dy))
                assert_same(whole(dx), right[0])
                assert_same(whole(dgate), right[1])
                assert dweight.placements[0] in (Partial(), Replicate())
                bare = rms_norm_gated(whole(x), whole(gate), activation=activation, group_size=32)
                assert_sums(whole(dweight), right[2], whole(dy) * bare)


@case
def a_sharded_last_axis_of_gated_norms_is_gathered(mesh: Any) -> None:
    from torch.distributed.tensor import Shard

    x, weight = placed(mesh, Shard(1), 4, N), placed(mesh, Shard(0), N, seed=1)
    assert_same(whole(rms_norm_gated(x, x, weight)), rms_norm_gated(whole(x), whole(x), whole(weight)))


@case
def rotated_heads(mesh: Any) -> None:
    """By tokens, by heads as tensor parallelism has them, and whole; of q and k as many heads as there are ranks, and
    more of q."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    tokens, q_heads, k_heads = 6, 4, 2
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        of_pair = functools.partial(placed, mesh, placement, dtype=torch.float32)
        for batch in (1, 4):  # of the angles
            q, dq = (of_pair(4, tokens, q_heads, N, seed=seed) for seed in (0, 1))
            k, dk = (of_pair(4, tokens, k_heads, N, seed=seed) for seed in (2, 3))
            cos, sin, *weights = (
                placed(mesh, Replicate(), *shape, seed=seed, dtype=torch.float32)
                for seed, shape in enumerate(((batch, tokens, N),) * 2 + ((N,),) * 2, 4)
            )
            leaves = [one.detach().requires_grad_() for one in (q, k, *weights)]
            plain = [whole(one).requires_grad_() for one in leaves]
            results = rms_norm_rope(leaves[0], leaves[1], cos, sin, *leaves[2:])
            expected = rms_norm_rope(plain[0], plain[1], whole(cos), whole(sin), *plain[2:])
            for one, other in zip(results, expected, strict=True):
                assert one.placements == (placement,), one.placements
                assert_same(whole(one), other.detach())
            found = torch.autograd.grad(results, leaves, (dq, dk), retain_graph=True)
            right = torch.autograd.grad(expected, plain, (whole(dq), whole(dk)), retain_graph=True)
            for one, other in zip(found[:2], right[:2], strict=True):
                assert_same(whole(one), other)
            for one, other, x, dr in zip(found[2:], right[2:], (q, k), (dq, dk), strict=True):
                assert one.placements[0] in (Partial(), Replicate())
                dy = rope_statements.rotated_back(whole(dr), whole(cos), whole(sin))
                assert_sums(whole(one), other, dy * rms_norm(whole(x)))
            (alone,) = torch.autograd.grad(results[1], leaves[1], dk)  # of q nothing is asked
            assert_same(whole(alone), right[1])


@case
def sequence_parallel(mesh: Any) -> None:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    device = mesh.device_type
    model = torch.nn.Sequential(RMSNorm(N, dtype=torch.bfloat16, device=device))
    with torch.no_grad():
        model[0].weight.copy_(draw(N, dtype=torch.bfloat16, seed=3))
    x = draw(2, 8, N, dtype=torch.bfloat16).to(device)
    alone = RMSNorm(N, dtype=torch.bfloat16, device=device)
    alone.load_state_dict({"weight": model[0].weight.detach().clone()})
    parallelize_module(model, mesh, {"0": SequenceParallel()})
    shard = x.chunk(RANKS, dim=1)[dist.get_rank()].contiguous()
    y = model(shard)
    assert y.placements == (Shard(1),)
    assert_same(whole(y), alone(x).detach())
    y.sum().backward()
    alone(x).sum().backward()
    gradient = model[0].weight.grad.redistribute(placements=[Replicate()]).to_local()
    torch.testing.assert_close(gradient, alone.weight.grad, rtol=2**-6, atol=2**-6)
