"""Which GPU a program is lowered for: a module of another architecture than the GPU's ends the process."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import _compat, _dispatch, _target, add_rms_norm, explain, rms_norm
from pallas_norm.plans.hardware import H200, Gpu
from tests import gpus, kernel_text, rewrites
from tests.rewrites import Rewrite

described = pytest.mark.skipif(gpus.missing() is not None, reason=str(gpus.missing()))
ARCHITECTURE = re.compile(r"mosaic_gpu.arch_major = (\d+) : i32, mosaic_gpu.arch_minor = (\d+)")


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_target, "_assembled_for", [])
    monkeypatch.setattr(_target, "_seen", {})
    jax.clear_caches()  # of programs that other tests have lowered


def gradient(x: Any, weight: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](x)


def add_gradient(x: Any, weight: Any) -> Any:
    return jax.vjp(add_rms_norm, x, x, weight)[1]((x, x))


def structs(sharding: Any, n: int, dtype: str = "bfloat16", rows: int = 40) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in ((rows, n), (n,))]


def modules(function: Callable[..., Any], *operands: Any) -> list[str]:
    """The text of each kernel in the program; none where XLA compiles the reference."""
    return [kernel_text.text(module, raw=True) for module in kernel_text.modules(function, *operands)]


def architectures(function: Callable[..., Any], *operands: Any) -> list[tuple[int, int]]:
    found = [ARCHITECTURE.search(text) for text in modules(function, *operands)]
    assert all(match is not None for match in found)
    return [(int(match[1]), int(match[2])) for match in found if match is not None]


# --- described GPUs ---------------------------------------------------------------------------------------------------


@described
@pytest.mark.parametrize("n", [33, 512, 4096, 16384])
@pytest.mark.parametrize("card", ["A100", "A10", "L40S", "H200", "B200", "RTX 5090", "GB10"])
def test_kernels_are_lowered_for_the_gpu_of_the_program(card: str, n: int) -> None:
    (device,) = gpus.described(card)
    operands = structs(SingleDeviceSharding(device), n)
    function = add_gradient if n == 512 else gradient
    assert architectures(function, *operands) == [gpus.CARDS[card].capability] * 3


@described
def test_before_hopper_no_kernel_has_what_came_with_it() -> None:
    (device,) = gpus.described("A100")
    for n in (896, 4096):
        for text in modules(gradient, *structs(SingleDeviceSharding(device), n)):
            assert not re.search("cp.async.bulk|elect.sync|cluster|mbarrier.arrive.expect_tx", text)
    (device,) = gpus.described("H200")
    _target._assembled_for.clear()
    assert any("cp.async.bulk" in text for text in modules(gradient, *structs(SingleDeviceSharding(device), 4096)))


@described
@pytest.mark.parametrize(
    ("n", "dtype", "kernels"),
    [
        (32768, "bfloat16", 1),
        (65536, "bfloat16", 0),
        (16384, "float32", 1),
        (32768, "float32", 0),
        (8193, "float16", 0),
    ],
)
def test_rows_that_need_a_cluster_are_xla_s_before_hopper_each_pass_for_itself(
    n: int, dtype: str, kernels: int
) -> None:
    (device,) = gpus.described("A100")
    operands = structs(SingleDeviceSharding(device), n, dtype)
    assert len(modules(gradient, *operands)) == kernels

    def forced(x: Any, weight: Any) -> Any:
        return jax.vjp(lambda x, weight: rms_norm(x, weight, implementation="mosaic_gpu"), x, weight)[1](x)

    with pytest.raises(
        NotImplementedError, match=r"shared by a cluster of \d CTAs, and a GPU of compute .* 8\.0 has no"
    ):
        modules(forced, *operands)


@described
@pytest.mark.parametrize("card", ["A100", "L4", "RTX 5090"])
def test_the_programs_of_the_direct_launch_are_for_their_gpu(card: str) -> None:
    programs, gpu, x, weight = kernel_text._programs(), gpus.CARDS[card].gpu, ("x", "bfloat16"), ("weight", "bfloat16")
    rstd, dy = ("rstd", "float32"), ("dy", "bfloat16")
    for n in (128, 4096, 16384):
        made = [
            programs.Program("forward", n, (x, weight), ("y", "rstd"), _dispatch.Spec(), strided, gpu=gpu)
            for strided in (False, True)
        ]
        made.append(
            programs.Program("backward", n, (x, rstd, dy, weight), ("dx", "dweight"), _dispatch.Spec(), gpu=gpu)
        )
        made.append(programs.Program("column_sum", n, (("parts", "float32"),), ("dweight",), _dispatch.Spec(), gpu=gpu))
        for program in made:
            with _target.in_mosaic(_target.Target(gpu, gpus.described(card)[0])):
                assert architectures(program.function(), *program.structs) == [gpu.capability]


@described
def test_the_default_device_is_not_the_program_s() -> None:
    """Mosaic takes the architecture from there; with a CPU as the default it assumes Hopper's, for an A100 too."""
    (device,) = gpus.described("A100")
    operands = structs(SingleDeviceSharding(device), 512)
    for default in (jax.devices("cpu")[0], gpus.described("H200")[0]):
        with jax.default_device(default):
            assert architectures(gradient, *operands) == [(8, 0)] * 3


@described
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_kernels_inside_a_mesh_are_lowered_for_its_gpus(axis_type: Any) -> None:
    mesh = Mesh(np.array(gpus.described("A100", count=4)), ("data",), axis_types=(axis_type,))
    operands = [
        jax.ShapeDtypeStruct(shape, "bfloat16", sharding=NamedSharding(mesh, spec))
        for shape, spec in (((40, 512), P("data")), ((512,), P()))
    ]
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P()), out_specs=(P("data"), P()))
    assert architectures(mapped, *operands) == [(8, 0)] * 3
    with jax.set_mesh(mesh):
        assert architectures(mapped, *operands) == [(8, 0)] * 3


@described
def test_the_partitioner_s_programs_are_for_the_gpu_they_were_lowered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_norm import _partitioning, _spmd

    (device,) = gpus.described("A100")
    a100 = gpus.CARDS["A100"].gpu
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(_spmd, "local_program", lambda *_: seen.append(_compat.mosaic_architecture()) or b"")
    call = _dispatch.Call("forward", ("x", "weight"), _dispatch.Spec())
    tiles = np.arange(4).reshape(4, 1, 1, 1)
    x, weight = structs(None, 512)
    _partitioning._program(call, tiles, [x, weight], H200)  # from another process, and no GPU is here
    modules(gradient, *structs(SingleDeviceSharding(device), 512))
    _partitioning._program(call, tiles, [x, weight], a100)
    assert seen == [(9, 0), (8, 0)]


@described
def test_two_generations_in_one_process() -> None:
    first, second = (structs(SingleDeviceSharding(gpus.described(card)[0]), 512) for card in ("RTX 5090", "A100"))
    assert len(modules(gradient, *first)) == 3
    assert modules(gradient, *second) == []

    def forced(x: Any) -> Any:
        return rms_norm(x, implementation="mosaic_gpu")

    with pytest.raises(
        NotImplementedError,
        match=r"a GPU has compute capability 8\.0, and this process has compiled kernels for 12\.0; pass",
    ):
        modules(forced, second[0])


# --- what the GPUs here are -------------------------------------------------------------------------------------------


class Device:
    """As much of one of JAX's GPUs as is looked at."""

    platform, device_kind, process_index = "gpu", "NVIDIA A100-SXM4-40GB", 0

    def __init__(self, capability: str, shared_bytes: int = 166912, multiprocessors: int = 108) -> None:
        self.compute_capability = capability
        self.shared_memory_per_block_optin, self.core_count = shared_bytes, multiprocessors


@contextlib.contextmanager
def machine(*devices: Device) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_compat, "cuda_devices", lambda: list(devices))
        yield


def newest_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))


def test_the_gpus_here_are_one_kind_with_what_all_of_them_have(monkeypatch: pytest.MonkeyPatch) -> None:
    newest_jax(monkeypatch)
    with machine(Device("8.0"), Device("8.0", 160000, 56)):
        assert _target.here().gpu == Gpu((8, 0), 160000, 56)
    with machine():
        assert _target.here() == (H200, None)


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (("7.5",), "a GPU has compute capability 7.5; the kernels need 8.0 (Ampere) or newer"),
        (("9.0", "7.5"), "a GPU has compute capability 7.5; the kernels need 8.0 (Ampere) or newer"),
        (
            ("9.0", "8.9"),
            "the GPUs have compute capabilities 8.9 and 9.0, and a program is lowered for all of them; "
            "CUDA_VISIBLE_DEVICES leaves those of one",
        ),
    ],
)
def test_gpus_without_kernels_and_of_two_kinds_are_xla_s(
    devices: tuple[str, ...], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest_jax(monkeypatch)
    x = jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)
    with machine(*map(Device, devices)):
        path = explain(x)
        assert (path.cuda, path.plan) == ("xla", None)
        assert path.why == f"{reason}, so XLA compiles the reference, with the same rounding"
        assert modules(rms_norm, x) == []


def test_before_0_11_an_ampere_is_xla_s_and_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM ends the process there: Mosaic's kernels had instructions of Hopper in each."""
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(_compat, "VERSION", "0.10.2")
    with machine(Device("8.6")):
        assert explain(jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)).why == (
            "a GPU has compute capability 8.6; the kernels need 9.0 (Hopper) or newer with jax 0.10.2, and 8.0 with "
            "jax 0.11, so XLA compiles the reference, with the same rounding"
        )


@pytest.mark.parametrize(
    ("n", "capability", "end"),
    [
        (512, "9.0", "for other platforms"),
        (
            4096,
            "8.0",
            "; on compute capability 8.0 (Ampere: A100, A30) rows are read forward from registers and backward from "
            "memory, with the bits of other GPUs",
        ),
        (
            32768,
            "8.0",
            "; the backward pass is XLA's, because rows of 32768 elements are shared by a cluster of 2 CTAs, and a GPU "
            "of compute capability 8.0 has no clusters, which came with 9.0 (Hopper)",
        ),
    ],
)
def test_explain_says_which_plan_and_why(n: int, capability: str, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    newest_jax(monkeypatch)
    with machine(Device(capability, 232448 if capability == "9.0" else 166912)):
        path = explain(jax.ShapeDtypeStruct((4, n), jnp.bfloat16))
    assert (path.cuda, path.elsewhere) == ("mosaic_gpu", "xla")
    assert path.why.endswith(end)
    assert path.plan is not None


def test_what_mosaic_would_lower_for_another_gpu_is_not_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    newest_jax(monkeypatch)
    monkeypatch.setattr(_compat, "mosaic_architecture", lambda: (9, 0))
    monkeypatch.setattr(_compat, "default_device", lambda device: contextlib.nullcontext())
    with machine(Device("8.0")):
        assert modules(rms_norm, jax.ShapeDtypeStruct((4, 512), jnp.bfloat16)) == []
        with pytest.raises(_target.NoKernel) as error, _target.in_mosaic(_target.here()):
            pass
    assert str(error.value) == "Mosaic would lower for compute capability 9.0, and the GPU has 8.0"
    _target._assembled_for.clear()
    with machine(Device("10.0", 232448, 148)), _target.in_mosaic(_target.here()):
        assert _target._assembled_for == [(10, 0)]  # whose assembler takes modules of Hopper's


# --- wrong targets ----------------------------------------------------------------------------------------------------


def target() -> Any:
    return sys.modules["pallas_norm._target"]


def lowered_for_two_kinds() -> None:
    with machine(Device("9.0"), Device("8.9")), pytest.raises(target().NoKernel):
        target().here()


def lowered_for_turing() -> None:
    with machine(Device("7.5")), pytest.raises(target().NoKernel):
        target().here()


def lowered_for_another_architecture() -> None:
    with pytest.MonkeyPatch.context() as patch, machine(Device("8.0")):
        patch.setattr(_compat, "mosaic_architecture", lambda: (9, 0))
        patch.setattr(_compat, "default_device", lambda device: contextlib.nullcontext())
        with pytest.raises(target().NoKernel), target().in_mosaic(target().here()):
            pass


def default_device_left() -> None:
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch, machine(ampere := Device("8.0")):
        patch.setattr(_compat, "mosaic_architecture", lambda: (8, 0) if asked else (9, 0))
        patch.setattr(_compat, "default_device", lambda device: asked.append(device) or contextlib.nullcontext())
        with target().in_mosaic(target().here()):
            assert asked == [ampere]


def assembled_for_two() -> None:
    target().assemble_for((9, 0))
    with machine(Device("8.0")), pytest.raises(target().NoKernel):
        target().here()


def with_least_of_two() -> None:
    with machine(Device("8.0"), Device("8.0", 160000, 56)):
        assert target().here().gpu == Gpu((8, 0), 160000, 56)


MUTANTS: dict[str, tuple[Rewrite, Callable[[], None]]] = {
    "GPUs of two kinds": (Rewrite("_target", "if len(capabilities) > 1:", "if False:"), lowered_for_two_kinds),
    "a GPU that is too old": (Rewrite("_target", "if capability >= oldest:", "if True:"), lowered_for_turing),
    "a module of another architecture": (
        Rewrite("_target", "if not takes(capability, found):", "if False:"),
        lowered_for_another_architecture,
    ),
    "the default device's architecture": (
        Rewrite("_target", "if _compat.mosaic_architecture() != capability:", "if False:"),
        default_device_left,
    ),
    "two architectures in a process": (
        Rewrite("_target", "if _assembled_for in ([], [capability]):", "if True:"),
        assembled_for_two,
    ),
    "what one of two GPUs has": (Rewrite("_target", "[min(getattr", "[max(getattr"), with_least_of_two),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_target_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    newest_jax(monkeypatch)
    rewrite, check = MUTANTS[name]
    check()
    target()._assembled_for.clear()
    with rewrites.rewritten(rewrite), pytest.raises((AssertionError, pytest.fail.Exception, target().NoKernel)):
        check()
