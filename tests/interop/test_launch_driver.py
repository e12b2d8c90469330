"""What the driver is given, in whose context, and what becomes of its errors: with a driver that is not there."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pallas_norm import _target
from pallas_norm.plans.hardware import Gpu
from pallas_norm_torch import launch
from pallas_norm_torch.launch import compiling, driver, kernels, proof, recording
from pallas_norm_torch.launch.recording import Parameter, Recorded
from pallas_norm_torch.programs import Program
from tests.interop.fake_kernels import FORWARD

FUNCTION, DEVICE = 4711, 1
OWN, OTHERS = 0x1000, 0x2000  # contexts


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("gridX", "gridY", "gridZ", "blockX", "blockY", "blockZ", "sharedBytes")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("numberOfAttributes", ctypes.c_uint),
    )


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, whose value is a cluster's dimensions."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("dimensions", ctypes.c_uint * 3),
                ("more", ctypes.c_char * 52))  # fmt: skip


class FakeDriver:
    """Remembers what it was asked, in order, and which context was current then."""

    def __init__(self) -> None:
        self.current, self.launches, self.asked = OWN, list[dict[str, Any]](), list[tuple[str, int]]()
        self.answer: Callable[[], int] = lambda: 0

    def ask(self, function: str, *arguments: Any) -> Any:
        self.asked.append((function, self.current))
        if function == "cuCtxSetCurrent":
            (self.current,) = arguments
        return {"cuCtxGetCurrent": self.current, "cuDeviceGet": DEVICE, "cuDevicePrimaryCtxRetain": OWN}.get(function)

    def launch(self, config: Any, function: Any, parameters: None, extra: Any) -> int:
        assert parameters is None
        (what, at, which, size_at, end) = extra
        assert (what, which, end) == (1, 2, None)
        head = LaunchConfig.from_address(config.value)
        size = ctypes.c_size_t.from_address(size_at).value
        cluster = None
        if head.numberOfAttributes:
            attribute = LaunchAttribute.from_address(head.attributes)
            assert attribute.id == 4
            cluster = tuple(attribute.dimensions)
        self.launches.append({
            "grid": (head.gridX, head.gridY, head.gridZ), "block": (head.blockX, head.blockY, head.blockZ),
            "shared": head.sharedBytes, "stream": head.stream or 0, "cluster": cluster, "function": function.value,
            "parameters": ctypes.string_at(at, size), "context": self.current,
        })  # fmt: skip
        return self.answer()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    made = FakeDriver()
    monkeypatch.setattr(driver, "ask", made.ask)
    monkeypatch.setattr(driver, "launcher", lambda: made.launch)
    monkeypatch.setattr(driver, "words", lambda status: f"CUDA_ERROR_{status} (as it says)")
    driver.primary_context.cache_clear()
    yield made
    driver.primary_context.cache_clear()


def kernel(*, cluster: int = 1, parameters: tuple[Parameter, ...] | None = None) -> kernels.Kernel:
    ordered = parameters or (Parameter(8, 0), Parameter(0, 1), Parameter(16, 3))
    return kernels.Kernel(Recorded(FUNCTION, 7, 256, 2048, cluster, ordered), DEVICE, "the forward kernel for n = 4096")


@pytest.mark.parametrize("cluster", [1, 4])
def test_the_driver_reads_what_the_header_says(cluster: int, fake: FakeDriver) -> None:
    launched = kernel(cluster=cluster)
    for grid, stream in ((12, 0), (12, 77), (8, 77), (8, 77)):
        launched.launch(stream, grid, [0xA00, 0xB00, 0xC00, 0xD00])
        found = fake.launches[-1]
        assert found["grid"] == (grid, 1, 1)
        assert (found["block"], found["shared"], found["stream"]) == ((256, 1, 1), 2048, stream)
        assert (found["function"], found["cluster"]) == (FUNCTION, None if cluster == 1 else (4, 1, 1))
        expected = b"".join(value.to_bytes(8, "little") for value in (0xB00, 0xA00, 0xD00))
        assert found["parameters"] == expected
    assert len(launched._free) == 1  # one memory served all


def test_descriptors_follow_the_address(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bulk copy's descriptor holds the address it reads: each address has one of its own, made once."""
    made: list[int] = []

    def descriptor_of(template: bytes, address: int) -> bytes:
        made.append(address)
        return template[:120] + address.to_bytes(8, "little")

    monkeypatch.setattr(kernels, "descriptor_of", descriptor_of)
    template = bytes(range(128))
    launched = kernel(parameters=(Parameter(0, 0, template), Parameter(128, 1)))
    for address in (0x500, 0x600, 0x500):
        launched.launch(0, 1, [address, 0x900])
        expected = template[:120] + address.to_bytes(8, "little") + (0x900).to_bytes(8, "little")
        assert fake.launches[-1]["parameters"] == expected
    assert made == [0x500, 0x600]


def test_an_error_of_the_driver_is_raised(fake: FakeDriver) -> None:
    fake.answer = lambda: 719
    with pytest.raises(RuntimeError) as caught:
        kernel().launch(0, 1, [1, 2, 3, 4])
    assert str(caught.value) == (
        "the forward kernel for n = 4096 could not be launched on cuda:1: CUDA_ERROR_719 (as it says); nothing was "
        "computed. An error of an earlier kernel of this process shows here too: run it with CUDA_LAUNCH_BLOCKING=1 to "
        "see whose it is, and report it with the output of python -m pallas_norm"
    )


EITHER = pytest.mark.parametrize("status", [kernels.NO_CONTEXT, kernels.ANOTHERS])


@EITHER
def test_another_context_than_the_devices_is_left_as_it_was(status: int, fake: FakeDriver) -> None:
    """JAX leaves the last GPU's context current in the thread that starts it."""
    fake.current = OTHERS
    fake.answer = lambda: 0 if fake.current == OWN else status
    kernel().launch(0, 1, [1, 2, 3, 4])
    assert [found["context"] for found in fake.launches] == [OTHERS, OWN]
    assert fake.current == OTHERS


@EITHER
def test_a_thread_without_a_context_gets_the_devices(status: int, fake: FakeDriver) -> None:
    """The driver may call the missing context an invalid handle: of the stream, or of the function."""
    fake.current = 0
    fake.answer = lambda: 0 if fake.current == OWN else status
    kernel().launch(0, 1, [1, 2, 3, 4])
    assert fake.current == OWN


def test_an_error_in_the_own_context_is_not_tried_again(fake: FakeDriver) -> None:
    fake.answer = lambda: kernels.ANOTHERS
    with pytest.raises(RuntimeError, match="could not be launched on cuda:1: CUDA_ERROR_400"):
        kernel().launch(0, 1, [1, 2, 3, 4])
    assert len(fake.launches) == 1


def test_another_device_may_be_current(fake: FakeDriver) -> None:
    fake.current = OTHERS
    kernel().elsewhere(0, 1, [1, 2, 3, 4])
    assert [found["context"] for found in fake.launches] == [OWN]
    assert fake.current == OTHERS


@pytest.mark.parametrize("fails", [False, True])
def test_lowering_that_changes_the_context_does_not_change_where_a_kernel_is_loaded(
    *,
    fails: bool,
    fake: FakeDriver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first kernel that a process compiled gave garbage for ever on a machine with two GPUs: lowering started JAX's
    backends, which left the last GPU's context current, and the module was loaded there."""
    loaded: list[int] = []

    def lowers(program: Program) -> tuple[bytes, int]:
        fake.current = OTHERS
        if fails:
            raise launch.Unavailable("no reason")
        return b"module", 3

    def loads(module: bytes, device: int) -> Any:
        loaded.append(fake.current)
        return None

    plan = FORWARD.plan
    assert plan is not None
    monkeypatch.setattr(compiling, "_kernels", {})
    monkeypatch.setattr(_target, "_assembled_for", [])
    monkeypatch.setattr(compiling, "unavailable", lambda device: None)
    monkeypatch.setattr(compiling, "_cached_module", lowers)
    monkeypatch.setattr(compiling, "_host_function", loads)
    monkeypatch.setattr(
        recording,
        "record",
        lambda call, count, *, clusters: Recorded(0, 1 << 24, 128, 0, 1, (Parameter(0, 0), Parameter(8, 1))),
    )
    monkeypatch.setattr(proof, "prove", lambda made, program: loaded.append(fake.current))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    before = fake.current = 0x3000
    with pytest.raises(launch.Unavailable) if fails else contextlib.nullcontext():
        compiling.kernel(FORWARD, DEVICE)
    assert fake.current == before
    assert loaded == ([] if fails else [OWN, OWN])
    assert _target._assembled_for == ([] if fails else [(9, 0)])


def test_a_grid_that_is_not_as_expected_is_not_launched(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_host_function", lambda module, device: None)
    monkeypatch.setattr(recording, "record", lambda call, count, *, clusters: Recorded(0, 5, 128, 0, 2, ()))
    with pytest.raises(launch.Unavailable) as caught:
        compiling._loaded(FORWARD, b"", 3, 0)
    assert str(caught.value) == "the kernel launches 5 CTAs in clusters of 2; needed 16777216 in clusters of 1"


class Graph:
    """As much of CUDA's bindings as reads the one kernel of a graph."""

    class CUlaunchAttributeID:
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = 4

    gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ = 7, 1, 1, 128, 1, 1
    func, sharedMemBytes, kernelParams, x, y, z = FUNCTION, 2048, 0, 2, 1, 1

    def __init__(self) -> None:
        self.asked: list[str] = []

    def ask(self, function: str, *_: Any) -> Any:
        self.asked.append(function)
        return ([self], 1) if function == "cuGraphGetNodes" else self

    @property
    def clusterDim(self) -> Graph:
        return self


@pytest.mark.parametrize("clusters", [True, False])
def test_a_gpu_without_clusters_is_not_asked_for_them(clusters: bool, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: FBT001
    graph = Graph()
    monkeypatch.setattr(driver, "driver", lambda: graph)
    monkeypatch.setattr(recording, "ask", graph.ask)
    monkeypatch.setattr(recording, "_parameters", lambda *_: ())
    found = recording._read(None, 3, clusters=clusters)
    assert found == Recorded(FUNCTION, 7, 128, 2048, 2 if clusters else 1, ())
    assert ("cuGraphKernelNodeGetAttribute" in graph.asked) == clusters


def test_a_kernel_is_recorded_for_one_description_of_a_gpu() -> None:
    assert Gpu((9, 0), 1, 132) != Gpu((9, 0), 1, 78)  # and so is its key in the cache
