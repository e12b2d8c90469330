"""The direct launch: lowered here for CUDA without a GPU; on a GPU, streams, graphs, threads and one compile."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import sys
from typing import Any

import jax
import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm_torch import _library, direct, explain, launch, statements
from pallas_norm_torch.programs import Program

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
                kernel = direct.Forward(n, torch.bfloat16, None, Spec(), residual=False, with_rstd=False)
                made = list(pool.map(direct.program_of, [kernel] * 8))
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


def test_a_persistent_grid_has_no_more_programs_than_the_plan() -> None:
    def pack(*values: int) -> bytes:
        return bytes(values)

    clamped = launch.clamped(pack, 2, 50)
    assert clamped(60, 70, 40, 80) == pack(60, 70, 40, 80)
    assert clamped(60, 70, 90, 80) == pack(60, 70, 50, 80)


def test_cpu_tensors_take_torch_s_statements() -> None:
    assert _library.path(torch.zeros(2, 64)) is statements
