"""Which GPU a program is lowered for: a module of another architecture than the GPU's ends the process.

The GPUs are described ones. What those of this machine are is in test_gpus_here.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import _compat, _dispatch, _target, add_rms_norm, rms_norm
from pallas_norm.plans.hardware import H200
from tests import gpus, kernel_cases
from tests.lowered import modules, nothing_compiled  # noqa: F401  a fixture

pytestmark = pytest.mark.skipif(gpus.missing() is not None, reason=str(gpus.missing()))

ARCHITECTURE = re.compile(r"mosaic_gpu.arch_major = (\d+) : i32, mosaic_gpu.arch_minor = (\d+)")


def gradient(x: Any, weight: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](x)


def add_gradient(x: Any, weight: Any) -> Any:
    return jax.vjp(add_rms_norm, x, x, weight)[1]((x, x))


def structs(sharding: Any, n: int, dtype: str = "bfloat16", rows: int = 40) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in ((rows, n), (n,))]


def architectures(function: Callable[..., Any], *operands: Any) -> list[tuple[int, int]]:
    found = [ARCHITECTURE.search(text) for text in modules(function, *operands)]
    assert all(match is not None for match in found)
    return [(int(match[1]), int(match[2])) for match in found if match is not None]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("n", [33, 512, 4096, 16384])
@pytest.mark.parametrize("card", ["A100", "A10", "L40S", "H200", "B200", "RTX 5090", "GB10"])
def test_kernels_are_lowered_for_the_gpu_of_the_program(card: str, n: int) -> None:
    (device,) = gpus.described(card)
    operands = structs(SingleDeviceSharding(device), n)
    function = add_gradient if n == 512 else gradient
    assert architectures(function, *operands) == [gpus.CARDS[card].capability] * 3


def test_before_hopper_no_kernel_has_what_came_with_it() -> None:
    (device,) = gpus.described("A100")
    for n in (896, 4096):
        for text in modules(gradient, *structs(SingleDeviceSharding(device), n)):
            assert not re.search("cp.async.bulk|elect.sync|cluster|mbarrier.arrive.expect_tx", text)
    (device,) = gpus.described("H200")
    _target._assembled_for.clear()
    assert any("cp.async.bulk" in text for text in modules(gradient, *structs(SingleDeviceSharding(device), 4096)))


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


@pytest.mark.parametrize("card", ["A100", "L4", "RTX 5090"])
def test_the_programs_of_the_direct_launch_are_for_their_gpu(card: str) -> None:
    programs, gpu = kernel_cases.launch_programs(), gpus.CARDS[card].gpu
    x, weight, rstd, dy = ("x", "bfloat16"), ("weight", "bfloat16"), ("rstd", "float32"), ("dy", "bfloat16")
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


def test_the_default_device_is_not_the_program_s() -> None:
    """Mosaic takes the architecture from there; with a CPU as the default it assumes Hopper's, for an A100 too."""
    (device,) = gpus.described("A100")
    operands = structs(SingleDeviceSharding(device), 512)
    for default in (jax.devices("cpu")[0], gpus.described("H200")[0]):
        with jax.default_device(default):
            assert architectures(gradient, *operands) == [(8, 0)] * 3


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


def test_the_partitioner_s_programs_are_for_the_gpu_they_were_lowered_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_norm import _partitioning, _spmd

    (device,) = gpus.described("A100")
    a100 = gpus.CARDS["A100"].gpu
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(_spmd, "local_program", lambda *_: seen.append(_compat.mosaic_architecture()) or b"")
    call = _dispatch.Call("forward", ("x", "weight"), _dispatch.Spec())
    tiles = np.arange(4).reshape(4, 1, 1, 1)
    x, weight = structs(None, 512)
    _partitioning._program(call, tiles, [x, weight], H200, "cuda")  # from another process, and no GPU is here
    modules(gradient, *structs(SingleDeviceSharding(device), 512))
    _partitioning._program(call, tiles, [x, weight], a100, "cuda")
    assert seen == [(9, 0), (8, 0)]


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
