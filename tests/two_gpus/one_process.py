"""Both GPUs in one process: devices, threads, streams, graphs, autograd's threads; refused: operands on different ones.

`--rehearsal` runs what a CPU can, with two tensors' devices that are the same.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pallas_norm_torch import add_rms_norm, explain, rms_norm
from tests.interop.cases import assert_same
from tests.two_gpus import checks, known, state
from tests.two_gpus.checks import Check

GPU = torch.cuda.device_count() >= 2
DEVICES = [torch.device("cuda", 0), torch.device("cuda", 1)] if GPU else [torch.device("cpu")] * 2
WIDTHS = (16, 64, 128, 1000, 4096, 4097, 16384, 32768) if GPU else (16, 64)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def current(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def known_bits_whichever_device_is_current() -> None:
    for n in WIDTHS:
        for device in DEVICES:
            case = known.of(device, n, 24)
            for now in DEVICES:
                with current(now):
                    for _ in range(2):  # the second call takes the prepared way
                        known.check_all(case)
                    assert not GPU or torch.cuda.current_device() == now.index


def the_same_bits_on_both() -> None:
    """Of random operands: forward, residual, gradients."""
    for dtype in DTYPES:
        for n in WIDTHS:
            x, residual, dy, weight = (draw(*shape, dtype=dtype) for shape in ((33, n), (33, n), (33, n), (n,)))
            found: list[list[torch.Tensor]] = []
            for device in DEVICES:
                leaves = [value.to(device).requires_grad_() for value in (x, residual, weight)]
                y, s = add_rms_norm(leaves[0], leaves[1], leaves[2])
                gradients = torch.autograd.grad([y, s], leaves, [dy.to(device)] * 2)
                plain = rms_norm(leaves[0].detach(), leaves[2].detach())
                found.append([value.detach().cpu() for value in (y, s, plain, *gradients)])
            for one, other in zip(*found, strict=True):
                assert_same(one, other)


def the_kernel_is_launched_on_both() -> None:
    for device in DEVICES:
        assert not GPU or explain(4096, torch.bfloat16, device).startswith(
            f"direct launch on torch's current stream of {device}"
        )


def fresh_threads() -> str:
    """Two of them share each GPU; half of them set their current device."""
    cases = [known.of(device, 4096 if GPU else 64, 150) for device in DEVICES]

    def work(number: int) -> int:
        case = cases[number % 2]
        if GPU and number % 4 > 1:
            torch.cuda.set_device(number % 2)
        for rows in range(1, 101):
            assert_same(rms_norm(case.x[:rows], case.weight), case.y[:rows])
        known.check_backward(case)
        return 101

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        made = sum(pool.map(work, range(16)))
    return f"{made} calls in 16 threads"


def backward_over_both() -> None:
    """One backward pass, in autograd's thread of each device, called from a thread whose current device is another."""
    cases = [known.of(device, 2048 if GPU else 64) for device in DEVICES]
    for now in DEVICES:
        with current(now):
            leaves = [case.leaves() for case in cases]
            results = [rms_norm(*pair) for pair in leaves]
            torch.autograd.backward(results, [case.dy for case in cases])
            for case, (x, weight) in zip(cases, leaves, strict=True):
                case.check_gradients(x.grad, weight.grad)
            x = cases[0].leaves()[0]  # from one GPU to the other and back
            there = rms_norm(x, cases[0].weight).to(DEVICES[1])
            back = rms_norm(there, cases[1].weight).to(DEVICES[0])
            back.backward(torch.ones_like(back))
            assert x.grad is not None
            assert bool(x.grad.isfinite().all())
            assert_same(back.detach().cpu(), rms_norm(cases[0].y.cpu(), cases[1].weight.cpu()))


def operands_on_different_gpus_are_refused() -> None:
    (x, weight), (other_x, other_weight) = ((case.x, case.weight) for case in map(known.of, DEVICES))
    here, there = DEVICES
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: rms_norm(x, other_weight), f"weight is on {there} but x is on {here}"),
        (lambda: rms_norm(other_x, weight), f"weight is on {here} but x is on {there}"),
        (lambda: add_rms_norm(x, other_x, weight), f"residual is on {there} but x is on {here}"),
        (lambda: rms_norm(x, weight, out=other_x), f"out is on {there} but x is on {here}"),
    ]
    for call, message in refused:
        for _ in range(2):
            with pytest.raises(ValueError, match=re.escape(message)):
                call()
    known.check_all(known.of(here))
    known.check_all(known.of(there))


def side_streams() -> None:
    """The input is made on the stream behind a long wait, so a launch on any other stream would be too early."""
    for device in DEVICES:
        case = known.of(device)
        stream = torch.cuda.Stream(device)
        x = torch.zeros_like(case.x)
        torch.cuda.synchronize(device)
        for now in DEVICES:
            x.zero_()
            torch.cuda.synchronize(device)
            with torch.cuda.stream(stream):
                torch.cuda._sleep(400_000_000)  # 0.2 s: the machine is busy
                x.copy_(case.x)
                with contextlib.ExitStack() as stack:
                    if now == device:
                        stack.enter_context(torch.cuda.device(now))
                    y = rms_norm(x, case.weight)
                assert not stream.query(), "the wait was over before the call"
            with torch.cuda.device(now):
                stream.synchronize()
                case.check_forward(y)


def streams_of_both_at_once() -> None:
    cases = [known.of(device) for device in DEVICES]
    streams = [torch.cuda.Stream(device) for device in DEVICES]
    for device in DEVICES:
        torch.cuda.synchronize(device)
    with torch.cuda.stream(streams[0]), torch.cuda.stream(streams[1]):  # one is current on each device
        found = [rms_norm(case.x, case.weight) for case in cases for _ in range(10)]
    for stream in streams:
        stream.synchronize()
    for number, y in enumerate(found):
        cases[number // 10].check_forward(y)


def graphs_on_either() -> None:
    """On a stream of the device: the one that torch captures on by default is of the first capture's device."""
    for device in DEVICES:
        case, other = known.of(device), known.of(device, seed=1)
        x = case.x.clone()
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            rms_norm(x, case.weight)
            with torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
                y = rms_norm(x, case.weight)
        for now in DEVICES:
            with torch.cuda.device(now):
                for values in (other.x, case.x):
                    x.copy_(values)
                    torch.cuda.synchronize(device)
                    with torch.cuda.device(device):
                        graph.replay()
                    torch.cuda.synchronize(device)
                    assert_same(y, rms_norm(values, case.weight))
        case.check_forward(y)


def jax_has_not_started() -> None:
    assert not state.backends_started(), "a call of the above has started JAX's backends"


def of_this_machine() -> list[Check]:
    found = [
        known_bits_whichever_device_is_current,
        the_same_bits_on_both,
        the_kernel_is_launched_on_both,
        fresh_threads,
        backward_over_both,
    ]
    if GPU:
        found += [operands_on_different_gpus_are_refused, side_streams, streams_of_both_at_once, graphs_on_either]
    return [(check.__name__.replace("_", " "), check) for check in (*found, jax_has_not_started)]


if __name__ == "__main__":
    checks.require_two_gpus()
    sys.exit(checks.main(of_this_machine()))
