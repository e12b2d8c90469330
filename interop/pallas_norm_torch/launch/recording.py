"""How a compiled kernel is launched: read from one launch that JAX's host function makes into a CUDA graph, which never
runs.

The host function knows which of a program's addresses the kernel takes and in which order, and makes the descriptors
of bulk copies. But it drops the driver's errors (jax 0.11 returns them, 0.12 logs them), and its form differs between
versions. So it is called once, on a stream that is being captured, with addresses that are marks; what the graph holds
then is all that a launch needs.
"""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from . import driver
from .driver import Unavailable, address_replacer, ask

DESCRIPTOR_BYTES = 128  # of a CUtensorMap, which lies at a multiple of 64


class Parameter(NamedTuple):
    """Of the kernel: where it lies among the bytes of its parameters, and which of the program's addresses it is."""

    offset: int
    argument: int
    descriptor: bytes = b""  # of a bulk copy from that address; without one, the address itself


class Recorded(NamedTuple):
    function: int  # of the device's context
    grid: int
    threads: int
    shared_bytes: int
    cluster: int
    parameters: tuple[Parameter, ...]


def mark(argument: int) -> int:
    """An address that stands for an argument of the program."""
    return (argument + 1) << 24


def descriptor_of(template: bytes, address: int) -> bytes:
    """The descriptor of the same copy from another address."""
    memory = ctypes.create_string_buffer(DESCRIPTOR_BYTES + 64)
    start = -ctypes.addressof(memory) % 64
    memory[start : start + DESCRIPTOR_BYTES] = template
    if status := address_replacer()(ctypes.addressof(memory) + start, address):
        raise driver.DriverError(f"cuTensorMapReplaceAddress: {driver.words(status)}")
    return memory.raw[start : start + DESCRIPTOR_BYTES]


def _places(function: Any) -> Iterator[tuple[int, int]]:
    """(offset, size) of each parameter, as long as the driver knows one more."""
    cuda = driver.driver()
    for index in itertools.count():
        code, offset, size = cuda.cuFuncGetParamInfo(function, index)
        if code == cuda.CUresult.CUDA_ERROR_INVALID_VALUE:
            return
        if int(code):
            raise driver.DriverError(f"cuFuncGetParamInfo: {driver.words(int(code))}")
        yield offset, size


def _parameters(function: Any, addresses: int, arguments: int) -> tuple[Parameter, ...]:
    found: list[Parameter] = []
    for index, (offset, size) in enumerate(_places(function)):
        (at,) = (ctypes.c_uint64 * 1).from_address(addresses + 8 * index)
        value = ctypes.string_at(at, size)
        if size == 8:
            found.append(
                _found(Parameter(offset, i) for i in range(arguments) if mark(i).to_bytes(8, "little") == value)
            )
        elif size % DESCRIPTOR_BYTES == 0:  # of one operand or, in the order in which the kernel uses them, of several
            for start in range(0, size, DESCRIPTOR_BYTES):
                part = value[start : start + DESCRIPTOR_BYTES]
                same = (i for i in range(arguments) if descriptor_of(part, mark(i)) == part)
                found.append(_found(Parameter(offset + start, i, part) for i in same))
        else:
            raise Unavailable(f"parameter {index} of the kernel has {size} bytes; needed an address or descriptors")
    return tuple(found)


def _found(candidates: Iterable[Parameter]) -> Parameter:
    found = list(candidates)
    if len(found) != 1:
        raise Unavailable(
            f"a parameter of the kernel is {len(found)} of the addresses that JAX's host function was called with; "
            "needed one"
        )
    return found[0]


def record(call: Callable[[int, bytes], Any], arguments: int, *, clusters: bool) -> Recorded:
    """`call(stream, addresses)` is JAX's host function. The device's context is current. Raises Unavailable.

    clusters: whether the device has any, and so an answer to how many CTAs are in one.
    """
    cuda = driver.driver()
    stream = ask("cuStreamCreate", cuda.CUstream_flags.CU_STREAM_NON_BLOCKING)
    try:
        ask("cuStreamBeginCapture", stream, cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            status = call(int(stream), b"".join(mark(i).to_bytes(8, "little") for i in range(arguments)))
        finally:
            graph = ask("cuStreamEndCapture", stream)
        try:
            if status:  # jax 0.11
                raise Unavailable(f"JAX's host function could not launch the kernel: {driver.words(int(status))}")
            return _read(graph, arguments, clusters=clusters)
        finally:
            ask("cuGraphDestroy", graph)
    except driver.DriverError as error:
        raise Unavailable(f"the kernel's launch could not be recorded ({error})") from error
    finally:
        ask("cuStreamDestroy", stream)


def _read(graph: Any, arguments: int, *, clusters: bool) -> Recorded:
    cuda = driver.driver()
    nodes, count = ask("cuGraphGetNodes", graph, 8)
    if count != 1:
        raise Unavailable(f"JAX's host function launched {count} things; needed one kernel")
    node = nodes[0]
    kernel = ask("cuGraphKernelNodeGetParams", node)
    function = kernel.func
    if not int(function):  # a kernel of a library, which a launch would load into whatever context is current
        function = ask("cuKernelGetFunction", kernel.kern)
    cluster = 1
    if clusters:
        attribute = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        dimensions = ask("cuGraphKernelNodeGetAttribute", node, attribute).clusterDim
        cluster = max(1, dimensions.x * dimensions.y * dimensions.z)
    if (kernel.gridDimY, kernel.gridDimZ, kernel.blockDimY, kernel.blockDimZ) != (1, 1, 1, 1):
        raise Unavailable("the kernel's grid or its blocks have more than one dimension")
    return Recorded(
        int(function),
        kernel.gridDimX,
        kernel.blockDimX,
        kernel.sharedMemBytes,
        cluster,
        _parameters(function, int(kernel.kernelParams), arguments),
    )
