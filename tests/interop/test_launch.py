"""The direct launch, without a GPU: what is lowered, which kernel is taken, and why none is."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import re
import sys
from typing import Any

import jax
import pytest
import torch

from pallas_norm import _compat, _target
from pallas_norm._spec import Spec
from pallas_norm.kernels import grid as grids
from pallas_norm.kernels.launch_arguments import COUNT
from pallas_norm.plans.hardware import H200, Gpu
from pallas_norm.plans.plan import Source
from pallas_norm_torch import _kernels, _library, direct, explain, launch, prepared_gradient, statements
from pallas_norm_torch.launch import arguments, compiling, lowering
from pallas_norm_torch.programs import Program

BF16 = "bfloat16"
A100 = Gpu((8, 0), 166912, 108)


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


def launches(module: bytes) -> list[int]:
    """CTAs of each launch in a lowered program."""
    found = re.findall(r"gpu\.launch .*blocks\([^)]*\) in \(%\w+ = %c(\d+)", text_of(module))
    assert len(found) == sum("gpu.launch" in line for line in text_of(module).splitlines())
    return [int(ctas) for ctas in found]


# Arrays in, numbers, arrays out.
ADDRESSES = {"forward": 2 + 3 + 1, "strided": 2 + 16 + 3, "backward": 4 + 3 + 2, "column_sum": 1 + 1 + 1}


@pytest.fixture(autouse=True)
def _lowers_without_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where JAX's CUDA plugin is not installed there is no description of a GPU; tests/test_aot.py looks at that."""
    monkeypatch.setattr(lowering, "_without_backends", lambda gpu: contextlib.nullcontext())


@pytest.mark.sampled(20)
@pytest.mark.parametrize("n", [33, 64, 512, 4096, 65536])
@pytest.mark.parametrize("kind", ADDRESSES)
def test_a_program_lowers_to_one_kernel(kind: str, n: int) -> None:
    made = program(kind, n)
    module, addresses = lowering.module_of(made)
    assert addresses == ADDRESSES[kind] == len(made.inputs) + len(made.outputs)
    assert len(launches(module)) == 1
    assert arguments.nominal_grid(made) in (None, *launches(module))


def test_the_row_count_is_never_read_from_memory() -> None:
    """The number is the address: a load of it would read where nothing is."""
    text = text_of(lowering.module_of(program("forward", 64))[0])
    assert "memref.extract_aligned_pointer_as_index" in text
    assert "memref<1xi32>, index" not in text
    assert "memref.load" not in "".join(line for line in text.splitlines() if "memref<1xi32>" in line)


def test_a_program_of_another_form_is_not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later JAX may change is noticed, not launched."""
    both = program("forward", 64).function()
    monkeypatch.setattr(Program, "function", lambda _: lambda *values: (both(*values)[0], both(*values)[0] + 1))
    monkeypatch.setattr(Program, "outputs", ("y",), raising=False)
    with pytest.raises(launch.Unavailable, match=r"^the lowered program has 2 kernels; needed one$"):
        lowering.module_of(program("forward", 64))


@pytest.mark.parametrize(("n", "rows"), [(33, 1), (128, 37), (128, 5000), (1000, 77), (4096, 9), (65536, 200)])
@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_a_prepared_call_counts_as_the_kernels_do(kind: str, n: int, rows: int) -> None:
    plan = program(kind, n).plan
    assert plan is not None
    blocks, first_left, ctas = grids.counts_of(plan, rows)
    assert prepared_gradient.Grid(plan).of(rows) == (blocks * COUNT, first_left * COUNT, ctas * plan.cluster)


class OnGpu:
    """As much of a CUDA tensor as the choice of a path looks at."""

    is_cuda, shape, device, dtype = True, (4, 64), torch.device("cuda:0"), torch.bfloat16


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_refused", {})
    monkeypatch.setattr(launch, "gpu_of", lambda device: H200)
    monkeypatch.setattr(_target, "_assembled_for", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.10.2", "the launch interface of jax 0.10.2 is not known (known: >= 0.11, < 0.13)"),
        ("0.99.0", "jax 0.99.0 is outside the range the kernels are tested with (>= 0.10, < 0.13)"),
    ],
)
def test_an_unknown_jax_takes_the_other_way_and_says_so(
    version: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "__version_info__", tuple(map(int, version.split("."))))
    monkeypatch.setattr(jax, "__version__", version)
    assert launch.unavailable(0) == f"the launch interface of jax {version} is not known (known: >= 0.11, < 0.13)"
    assert _library.path(OnGpu()) is statements
    assert explain(64, torch.bfloat16, "cuda:0").endswith(f"no direct launch, because {reason}")


@pytest.mark.usefixtures("nothing_known")
def test_a_kernel_that_cannot_be_launched_takes_the_other_way_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found out at the first launch, by a JAX of a known version that lowers otherwise."""

    def fails(*_: Any, **__: Any) -> Any:
        raise launch.Unavailable("the lowered program has 2 kernels; needed one")

    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    assert _library.path(OnGpu()) is direct
    monkeypatch.setattr(direct, "forward", fails)
    monkeypatch.setattr(statements, "forward", lambda *_, **__: ("y", None, None))
    assert _library.forward(OnGpu(), None, None, Spec(), with_rstd=False) == ("y", None, None)
    assert _library.path(OnGpu()) is statements
    assert explain(64, torch.bfloat16, "cuda:0").endswith("because the lowered program has 2 kernels; needed one")


def test_a_private_name_that_has_gone_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "_custom_call", lambda *_: jax.name_of_last_year)
    with pytest.raises(
        launch.Unavailable, match=r"lowers kernels in another way than is known here .*name_of_last_year"
    ):
        lowering.module_of(program("forward", 64))


def test_threads_that_race_for_a_program_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_kernels, "_programs", {})
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for n in range(32, 232):
                kernel = _kernels.Forward(n, torch.bfloat16, None, Spec(), residual=None, with_rstd=False)
                made = list(pool.map(_kernels.program_of, [kernel] * 8, [H200] * 8))
                assert len(set(map(id, made))) == 1
    finally:
        sys.setswitchinterval(before)


def test_an_old_gpu_and_a_missing_plugin_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(_target, "_assembled_for", [])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert launch.unavailable(1) == "cuda:1 has compute capability 7.5; the kernels need 8.0 (Ampere) or newer"
    monkeypatch.setattr(compiling, "PLUGINS", ("jax_plugins.of_nobody",))
    for capability in ((8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        compiling._library.cache_clear()
        assert launch.unavailable(0) == (
            "no CUDA plugin of JAX with MosaicGpuCompile is installed: pip install 'pallas-norm[cuda13]' (or cuda12)"
        )
    compiling._library.cache_clear()


def test_a_process_compiles_for_one_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin's assembler keeps the first architecture, JAX's too: a kernel of another ends the process."""
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: ((9, 0), (10, 0))[device])
    monkeypatch.setattr(_target, "_assembled_for", [])
    _target.assemble_for((9, 0))
    _target.assemble_for((10, 0))
    assert launch.unavailable(1) == (
        "cuda:1 has compute capability 10.0, and this process has compiled kernels for 9.0"
    )


# --- GPUs before Hopper -----------------------------------------------------------------------------------------------


def test_each_gpu_has_a_program_of_its_own() -> None:
    """Its plan is fitted to it: an A100 has no bulk copies. Two of a kind share one."""
    kernel = _kernels.Forward(32768, torch.bfloat16, torch.bfloat16, Spec(), residual=None, with_rstd=True)
    ours, theirs = (_kernels.program_of(kernel, gpu) for gpu in (A100, H200))
    assert (ours.plan.source, theirs.plan.source) == (Source.REGISTERS, Source.PIPELINE)
    assert _kernels.program_of(kernel, Gpu(*A100)) is ours
    backward = _kernels.Backward(4096, torch.float16, None, torch.float16, Spec(), residual=False, with_dweight=False)
    assert _kernels.program_of(backward, A100).plan.programs == 2 * A100.multiprocessors


def test_a_module_of_another_architecture_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM ends the process over it: Mosaic has to see the GPU that the program is for."""
    monkeypatch.setattr(_compat, "mosaic_architecture", lambda: (9, 0))
    with pytest.raises(launch.Unavailable) as error:
        lowering.module_of(program("forward", 64, gpu=A100))
    assert str(error.value) == "Mosaic would lower the kernel for compute capability 9.0, and the GPU has 8.0"


@pytest.mark.usefixtures("nothing_known")
def test_rows_that_need_a_cluster_take_the_other_way_each_pass_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    monkeypatch.setattr(launch, "gpu_of", lambda device: A100)
    needs = "elements are shared by a cluster of {} CTAs, and a GPU of compute capability 8.0 has no clusters, which"
    assert direct.unavailable(32768, 0, torch.bfloat16) is None
    assert explain(32768, torch.bfloat16, "cuda:0") == (
        "direct launch on torch's current stream of cuda:0: the cta kernel for n = 32768, compiled once for every row "
        "count; the backward pass by torch's own statements, because rows of 32768 "
        f"{needs.format(8)} came with 9.0 (Hopper)"
    )
    assert explain(16384, torch.bfloat16, "cuda:0").endswith("compiled once for every row count")
    for n, dtype in ((32768, torch.float32), (65536, torch.bfloat16)):
        assert explain(n, dtype, "cuda:0") == (
            "torch's own statements on its current stream of cuda:0, with Hugging Face's rounding: no direct launch, "
            f"because rows of {n} {needs.format(8)} came with 9.0 (Hopper)"
        )


def test_cpu_tensors_take_torch_s_statements() -> None:
    assert _library.path(torch.zeros(2, 64)) is statements
