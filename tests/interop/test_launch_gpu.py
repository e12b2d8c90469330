"""The direct launch on a GPU: streams, graphs, threads, one compile for every row count, and the disk cache."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm_torch import _lookup, add_rms_norm, cache, explain, rms_norm, statements
from pallas_norm_torch.launch import compiling, driver, kernels
from tests.interop.cases import assert_same, bits, draw

pytestmark = pytest.mark.gpu

# Of torch.cuda.graph. By default a capture is invalidated by what any other thread asks of CUDA meanwhile, and JAX's
# threads do when its client has just been started: one of many captures was, on a busy machine.
OF_THIS_THREAD = "thread_local"


def operands(rows: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(rows, n, dtype=torch.bfloat16, device="cuda", seed=seed), draw(n, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("n", [96, 4096])
def test_a_thousand_row_counts_take_one_compile_and_few_another(n: int) -> None:
    x, weight = operands(3000, n)
    whole = rms_norm(x, weight)
    rms_norm(x[:1], weight)
    compiles = len(compiling._kernels)
    for rows in [*range(1, 900), *range(2900, 3001)]:
        assert_same(rms_norm(x[:rows], weight), whole[:rows])
    assert len(compiling._kernels) == compiles


def test_the_current_stream_is_the_one() -> None:
    x, weight = operands(4096, 4096)
    rms_norm(x, weight)
    side, slow = torch.cuda.Stream(), torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(8):
            slow = slow @ slow * 1e-4  # the producer below waits behind this
        produced = x * 2 + 0 * slow[:4096, :4096].to(torch.bfloat16).nan_to_num(0, 0, 0)
        y = rms_norm(produced, weight)
        consumed = y + 1
        assert not side.query()  # all this was queued without waiting
    torch.cuda.current_stream().wait_stream(side)
    assert_same(consumed, rms_norm(x * 2, weight) + 1)


@pytest.mark.parametrize("n", [128, 4096])
def test_a_captured_call_sees_changed_input(n: int) -> None:
    x, weight = operands(50, n)
    residual = x.flip(0).contiguous()
    rms_norm(x, weight)
    add_rms_norm(x, residual, weight)
    rms_norm(x, weight, out=torch.empty_like(x))
    graph, into = torch.cuda.CUDAGraph(), torch.empty_like(x)
    with torch.cuda.graph(graph, capture_error_mode=OF_THIS_THREAD):
        y = rms_norm(x, weight)
        total, s = add_rms_norm(y, residual, weight)
        rms_norm(s, weight, out=into)
    for seed in range(1, 4):
        x.copy_(operands(50, n, seed)[0])
        graph.replay()
        assert_same(y, rms_norm(x, weight))
        expected_total, expected_s = add_rms_norm(y, residual, weight)
        assert_same(total, expected_total)
        assert_same(s, expected_s)
        assert_same(into, rms_norm(s, weight))


def test_a_captured_training_step() -> None:
    x, weight = operands(300, 2048)
    x.requires_grad_()
    weight.requires_grad_()
    dy = draw(300, 2048, dtype=torch.bfloat16, device="cuda", seed=5)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(rms_norm(x, weight), (x, weight), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=OF_THIS_THREAD):
        captured = step()
    dy.copy_(draw(300, 2048, dtype=torch.bfloat16, device="cuda", seed=6))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert_same(found, expected)


def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; this machine has one")
    x, weight = (tensor.to("cuda:1") for tensor in operands(33, 4096))
    assert torch.cuda.current_device() == 0
    found = rms_norm(x, weight)
    assert found.device == x.device
    assert_same(found.cpu(), rms_norm(x.to("cuda:0"), weight.to("cuda:0")).cpu())


def test_threads_on_streams_of_their_own() -> None:
    shapes = [(rows, n) for n in (64, 1000, 4096) for rows in (1, 40, 333)]
    cases = [(*operands(*shape), rms_norm(*operands(*shape))) for shape in shapes]
    torch.cuda.synchronize()

    def work(seed: int) -> int:
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            wrong.zero_()
            for i in range(300):
                x, weight, expected = cases[(seed + i) % len(cases)]
                wrong += (bits(rms_norm(x, weight)) != bits(expected)).sum()
        stream.synchronize()
        return int(wrong)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [0] * 8


def test_a_hundred_thousand_calls_on_four_streams_under_allocator_churn() -> None:
    """Every result compared on the device. An output that another stream got too early, or an operand freed too early,
    shows as wrong elements."""
    cases = [(*operands(rows, n), rms_norm(*operands(rows, n))) for rows, n in ((3, 128), (64, 896), (16, 4096))]
    streams = [torch.cuda.Stream() for _ in range(4)]
    wrong = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
    torch.cuda.synchronize()
    calls = 0
    while calls < 100_000:
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                x, weight, expected = cases[(calls // 4 + i) % len(cases)]
                temporary = x.clone()  # freed at once, and its memory used again by the next of this stream
                y = rms_norm(temporary, weight)
                for _ in range(8):
                    del temporary
                    temporary = torch.empty_like(x).fill_(torch.nan)
                    y = rms_norm(y.copy_(x), weight)
                wrong[i] += (bits(y) != bits(expected)).sum()
                calls += 9
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0, 0, 0]


FIRST_CALL = """
import torch, pallas_norm_torch
from pallas_norm_torch import cache
from pallas_norm_torch.launch import lowering
found = []
load, lower = cache.load, lowering.module_of
cache.load = lambda key: found.append(load(key)) or found[-1]
lowering.module_of = lambda program: print("lowered") or lower(program)
x, weight = torch.randn(5, 512, device="cuda").bfloat16(), torch.ones(512, device="cuda").bfloat16()
y = pallas_norm_torch.rms_norm(x, weight)
print("hit" if found[0] else "miss", y.float().sum().isfinite().item())
"""


def test_the_next_process_lowers_nothing(tmp_path: Any) -> None:
    def run() -> list[str]:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        return subprocess.run(
            [sys.executable, "-c", FIRST_CALL], env=environment, check=True, capture_output=True, text=True, timeout=120
        ).stdout.splitlines()

    assert run() == ["lowered", "miss True"]
    assert run() == ["hit True"]
    for file in (tmp_path / "pallas_norm").glob("*.kernel"):
        file.write_bytes(file.read_bytes()[:-1])
    assert run() == ["lowered", "miss True"]
    assert run() == ["hit True"]


def test_a_broken_cache_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "load", lambda key: None)
    monkeypatch.setattr(cache, "store", lambda key, payload: False)
    x, weight = operands(9, 672)
    assert_same(rms_norm(x, weight, 1e-4), rms_norm(x, weight, 1e-4))


def test_a_new_thread_may_launch_before_it_calls_anything_else_of_cuda() -> None:
    """CUDA makes a device's context current at a thread's first call of its runtime, which this launch is not."""
    x, weight = operands(7, 4096)
    expected, found = rms_norm(x, weight), torch.empty_like(x)
    rms_norm(x, weight, out=found)
    found.zero_()
    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: rms_norm(x, weight, out=found)).result()
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # of torch, if it has not said so before
def test_a_first_call_inside_a_capture_is_refused() -> None:
    x, weight = operands(3, 736)
    message = r"the kernel for n = 736 is not compiled yet, and a CUDA graph is being captured"
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph, capture_error_mode=OF_THIS_THREAD):
        rms_norm(x, weight)
    torch.cuda.synchronize()
    assert rms_norm(x, weight).shape == x.shape


def test_no_backend_of_jax_is_started(tmp_path: Any) -> None:
    """Nor by a first call that compiles: the clients take a context on every GPU and most of the memory of one."""
    code = """
import torch, pallas_norm_torch
x, weight = torch.randn(5, 4096, device="cuda").bfloat16(), torch.ones(4096, device="cuda").bfloat16().requires_grad_()
pallas_norm_torch.rms_norm(x, weight).sum().backward()
pallas_norm_torch.rms_norm(x[:, :16], weight[:16])
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout == "False\n"


@pytest.fixture
def another_context() -> Iterator[int]:
    """A context of the same GPU that is not torch's, and current."""
    made = driver.ask("cuCtxCreate", None, 0, driver.ask("cuDeviceGet", 0))
    yield int(made)
    driver.ask("cuCtxSetCurrent", driver.primary_context(0))
    driver.ask("cuCtxDestroy", made)


@pytest.mark.parametrize("n", [128, 4096, 65536, 768])
def test_a_planted_context_changes_nothing_and_is_left_current(n: int, request: pytest.FixtureRequest) -> None:
    """Kernels that are compiled, loaded (768) and launched while another context is current."""
    x, weight = operands(9, n)
    expected = statements.forward(x, None, weight, Spec(), with_rstd=False)[0] if n == 768 else rms_norm(x, weight)
    torch.cuda.synchronize()
    planted = request.getfixturevalue("another_context")
    found = rms_norm(x, weight)
    assert driver.current_context() == planted
    driver.ask("cuCtxSetCurrent", driver.primary_context(0))
    torch.cuda.synchronize()
    assert_same(found, expected)


def test_a_planted_launch_error_is_raised_and_nothing_is_kept_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = operands(9, 4096)
    right = rms_norm(x, weight)
    call = _lookup.prepared_for(x, None, weight, 1e-6, True, 0.0, (None, False, None, None))  # noqa: FBT003
    assert call is not None
    monkeypatch.setattr(call, "_cluster", 0)  # a grid of no CTAs
    message = r"the forward kernel for n = 4096 could not be launched on cuda:0: CUDA_ERROR_INVALID_VALUE \(invalid arg"
    with pytest.raises(RuntimeError, match=message):
        rms_norm(x, weight)
    monkeypatch.undo()
    assert_same(rms_norm(x, weight), right)


def test_a_kernel_that_fails_its_trial_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that writes nothing, as in another GPU's context."""
    monkeypatch.setattr(kernels.Kernel, "_flat", lambda _: lambda *_: None)
    x, weight = operands(9, 1728)
    assert_same(rms_norm(x, weight), statements.forward(x, None, weight, Spec(), with_rstd=False)[0])
    reason = "the forward kernel for n = 1728 is not used on cuda:0: in its trial run y came out wrong"
    assert reason in explain(1728, torch.bfloat16, "cuda")
