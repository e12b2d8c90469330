"""The direct launch: lowered here for CUDA without a GPU; on a GPU, streams, graphs, threads and one compile."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm_torch import _library, add_rms_norm, cache, direct, explain, launch, rms_norm, through_jax
from pallas_norm_torch.programs import Program
from tests.interop.cases import assert_same, bits, draw

BF16 = "bfloat16"


def program(kind: str, n: int, **changes: Any) -> Program:
    made = {
        "forward": Program("forward", n, (("x", BF16), ("weight", BF16)), ("y",), Spec()),
        "strided": Program("forward", n, (("x", BF16), ("residual", BF16)), ("y", "s", "rstd"), Spec(), strided=True),
        "backward": Program(
            "backward", n, (("x", BF16), ("rstd", "float32"), ("dy", BF16), ("weight", BF16)), ("dx", "dweight"), Spec()
        ),
        "column_sum": Program("column_sum", n, (("parts", "float32"),), ("dweight",), Spec(), dweight_dtype=BF16),
    }[kind]
    return dataclasses.replace(made, **changes)


def text_of(module: bytes) -> str:
    from jax._src.interpreters import mlir
    from jax._src.lib import mosaic_gpu_dialect
    from jax.experimental.mosaic.gpu import core
    from jaxlib.mlir import ir

    context = mlir.make_ir_context()
    mosaic_gpu_dialect.register_dialect(context)
    with context:
        context.allow_unregistered_dialects = True
        return str(core._run_serde_pass(ir.Module.parse(module), serialize=False))


# Arrays in, numbers, arrays out.
ADDRESSES = {"forward": 2 + 3 + 1, "strided": 2 + 16 + 3, "backward": 4 + 3 + 2, "column_sum": 1 + 1 + 1}


def definition(text: str, value: str) -> str:
    (line,) = (line.strip() for line in text.splitlines() if line.strip().startswith(f"{value} = "))
    return line


@pytest.mark.parametrize("n", [33, 64, 512, 4096, 65536])
@pytest.mark.parametrize("kind", ADDRESSES)
def test_a_program_lowers_to_one_kernel_whose_grid_follows_the_rows(kind: str, n: int) -> None:
    made = program(kind, n)
    module, addresses = launch.module_of(made)
    assert addresses == ADDRESSES[kind] == len(made.inputs) + len(made.outputs)
    text = text_of(module)
    (line,) = (line for line in text.splitlines() if "gpu.launch" in line)
    grid = line.split("blocks(")[1].split(" in (")[1].split("= ")[1].split(",")[0]
    if made.plan is None:
        assert "arith.constant" in definition(text, grid)  # the grid of the columns
        return
    # From the launch back: index_cast(programs * cluster), programs = ptrtoint(load(addresses[k])) / 2^32.
    chain, value = [], grid
    for _ in range(6):
        line = definition(text, value)
        chain.append(line.split(" = ")[1].split(" ")[0])
        value = next(word.strip(",") for word in line.split(" = ")[1].split() if word.startswith("%"))
        if "muli" in line:
            assert f"arith.constant {made.plan.cluster} : i64" in definition(text, line.split()[-3])
    assert chain == [
        "arith.index_cast", "arith.muli", "arith.divui", "llvm.ptrtoint", "llvm.load", "llvm.getelementptr"
    ]  # fmt: skip
    assert f"[{made.inputs.index('programs')}]" in line


def test_the_row_count_is_never_read_from_memory() -> None:
    """The number is the address: a load of it would read where nothing is."""
    text = text_of(launch.module_of(program("forward", 64))[0])
    assert "memref.extract_aligned_pointer_as_index" in text
    assert "memref<1xi32>, index" not in text
    assert "memref.load" not in "".join(line for line in text.splitlines() if "memref<1xi32>" in line)


@pytest.mark.parametrize("what", ["two kernels", "another grid"])
def test_a_program_of_another_form_is_not_launched(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later JAX may change is noticed, not launched."""
    if what == "two kernels":
        both = program("forward", 64).function()
        monkeypatch.setattr(Program, "function", lambda _: lambda *values: (both(*values)[0], both(*values)[0] + 1))
        monkeypatch.setattr(Program, "outputs", ("y",), raising=False)
        message = r"^the lowered program has 2 kernels; needed one$"
    else:
        monkeypatch.setattr(launch, "NOMINAL_ROWS", 1 << 20)
        message = r"^the kernel's grid is not where it was expected$"
    with pytest.raises(launch.Unavailable, match=message):
        launch.module_of(program("forward", 64))


class OnGpu:
    """As much of a CUDA tensor as the choice of a path looks at."""

    is_cuda, shape, device = True, (4, 64), torch.device("cuda:0")


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_refused", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("nothing_known")
def test_an_unknown_jax_takes_the_other_way_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 99, 0))
    monkeypatch.setattr(jax, "__version__", "0.99.0")
    reason = "the launch interface of jax 0.99.0 is not known (known: >= 0.11, < 0.13)"
    assert launch.unavailable(0) == reason
    assert _library.path(OnGpu()) is through_jax
    assert explain(64, torch.bfloat16, "cuda:0").endswith(f"no direct launch, because {reason}")


@pytest.mark.usefixtures("nothing_known")
def test_a_kernel_that_cannot_be_launched_takes_the_other_way_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out at the first launch, by a JAX of a known version that lowers otherwise."""

    def fails(*_: Any, **__: Any) -> Any:
        raise launch.Unavailable("the lowered program has 2 kernels; needed one")

    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    assert _library.path(OnGpu()) is direct
    monkeypatch.setattr(direct, "forward", fails)
    monkeypatch.setattr(through_jax, "forward", lambda *_, **__: ("y", None, None))
    assert _library.forward(OnGpu(), None, None, Spec(), with_rstd=False) == ("y", None, None)
    assert _library.path(OnGpu()) is through_jax
    assert explain(64, torch.bfloat16, "cuda:0").endswith("because the lowered program has 2 kernels; needed one")


def test_a_private_name_that_has_gone_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_with_grid_of_rows", lambda *_: jax.name_of_last_year)
    with pytest.raises(
        launch.Unavailable, match=r"lowers kernels in another way than is known here .*name_of_last_year"
    ):
        launch.module_of(program("forward", 64))


def test_threads_that_race_for_a_program_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_programs", {})
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for n in range(32, 232):
                key = n, torch.bfloat16, None, Spec(), False, False
                made = list(pool.map(lambda key: direct.forward_program(*key, strided=False), [key] * 8))
                assert len(set(map(id, made))) == 1
    finally:
        sys.setswitchinterval(before)


def test_an_old_gpu_and_a_missing_plugin_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert launch.unavailable(1) == "cuda:1 has compute capability 8.0; the kernels need 9.0 or newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(launch, "PLUGINS", ("jax_plugins.of_nobody",))
    launch._library.cache_clear()
    assert launch.unavailable(0) == (
        "no CUDA plugin of JAX with MosaicGpuCompile is installed: pip install 'pallas-norm[cuda13]' (or cuda12)"
    )
    launch._library.cache_clear()


def test_cpu_tensors_take_the_way_through_jax() -> None:
    assert _library.path(torch.zeros(2, 64)) is through_jax


# --- on a GPU ---------------------------------------------------------------------------------------------------------


def operands(rows: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(rows, n, dtype=torch.bfloat16, device="cuda", seed=seed), draw(n, dtype=torch.bfloat16, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("n", [96, 4096])
def test_a_thousand_row_counts_take_one_compile(n: int) -> None:
    x, weight = operands(3000, n)
    whole = rms_norm(x, weight)
    compiles = launch.compiles
    for rows in [*range(1, 900), *range(2900, 3001)]:
        assert_same(rms_norm(x[:rows], weight), whole[:rows])
    assert launch.compiles == compiles


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.parametrize("n", [128, 4096])
def test_a_captured_call_sees_changed_input(n: int) -> None:
    x, weight = operands(50, n)
    residual = x.flip(0).contiguous()
    rms_norm(x, weight)
    add_rms_norm(x, residual, weight)
    rms_norm(x, weight, out=torch.empty_like(x))
    graph, into = torch.cuda.CUDAGraph(), torch.empty_like(x)
    with torch.cuda.graph(graph):
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


@pytest.mark.gpu
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
    with torch.cuda.graph(graph):
        captured = step()
    dy.copy_(draw(300, 2048, dtype=torch.bfloat16, device="cuda", seed=6))
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        assert_same(found, expected)


@pytest.mark.gpu
def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices; this machine has one")
    x, weight = (tensor.to("cuda:1") for tensor in operands(33, 4096))
    assert torch.cuda.current_device() == 0
    found = rms_norm(x, weight)
    assert found.device == x.device
    assert_same(found.cpu(), rms_norm(x.to("cuda:0"), weight.to("cuda:0")).cpu())


@pytest.mark.gpu
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


@pytest.mark.gpu
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
from pallas_norm_torch import cache, launch
found = []
load, lower = cache.load, launch.module_of
cache.load = lambda key: found.append(load(key)) or found[-1]
launch.module_of = lambda program: print("lowered") or lower(program)
x, weight = torch.randn(5, 640, device="cuda").bfloat16(), torch.ones(640, device="cuda").bfloat16()
y = pallas_norm_torch.rms_norm(x, weight)
print("hit" if found[0] else "miss", y.float().sum().isfinite().item())
"""


@pytest.mark.gpu
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


@pytest.mark.gpu
def test_a_broken_cache_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "load", lambda key: None)
    monkeypatch.setattr(cache, "store", lambda key, payload: False)
    x, weight = operands(9, 672)
    assert_same(rms_norm(x, weight, 1e-4), rms_norm(x, weight, 1e-4))
