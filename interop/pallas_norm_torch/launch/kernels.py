"""A compiled kernel that is launched with raw addresses: one object for each program and device."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from . import driver
from .recording import DESCRIPTOR_BYTES, Recorded, descriptor_of

# CUlaunchConfig, then the number of the parameters' bytes, then the parameters.
HEAD = struct.Struct("=7I4xQQI4xQ")
LARGEST_PARAMETERS = 4096  # bytes that a kernel may have
SIZE_AT, PARAMETERS_AT = HEAD.size - 8, HEAD.size
PARAMETERS, SIZE, END = 1, 2, 0  # of `extra`: what follows is the address of the parameters, of their size; no more
CLUSTER_DIMENSION = 4  # CUlaunchAttributeID
MOST_DESCRIPTORS = 1024  # kept for each parameter, by address

NO_CONTEXT, ANOTHERS = 201, 400  # CUDA_ERROR_INVALID_CONTEXT, CUDA_ERROR_INVALID_HANDLE


class _Memory:
    """What one launch of a kernel is written into. The driver has read it when the launch returns."""

    __slots__ = ("arguments", "grid", "stream", "view", "whole")

    def __init__(self, function: int) -> None:
        self.whole = ctypes.create_string_buffer(PARAMETERS_AT + LARGEST_PARAMETERS)
        start = ctypes.addressof(self.whole)
        extra = (ctypes.c_void_p * 5)(PARAMETERS, start + PARAMETERS_AT, SIZE, start + SIZE_AT, END)
        # As objects of ctypes they are passed as they are; each int would be converted again at every launch.
        self.arguments = ctypes.c_void_p(start), ctypes.c_void_p(function), None, extra
        self.view = memoryview(self.whole)
        self.grid = self.stream = -1  # of the head as it stands


def _cluster_attribute(cluster: int) -> Any:
    """A CUlaunchAttribute: its id, 4 bytes of padding, then a value of 64 bytes, three ints of which count."""
    return ctypes.create_string_buffer(struct.pack("=I4x3I52x", CLUSTER_DIMENSION, cluster, 1, 1))


class Kernel:
    """kernel.launch(stream, grid, values): values are the addresses and numbers of `Program.inputs` and then of its
    outputs, grid the number of CTAs. Raises RuntimeError where the driver refuses the launch."""

    def __init__(self, recorded: Recorded, device: int, name: str) -> None:
        self.device, self.name, self.recorded = device, name, recorded
        ordered = sorted(recorded.parameters)
        form, end = "=", 0
        for parameter in ordered:
            size = DESCRIPTOR_BYTES if parameter.descriptor else 8
            form += f"{parameter.offset - end}x" + (f"{size}s" if parameter.descriptor else "Q")
            end = parameter.offset + size
        self._pack, self._size = struct.Struct(form).pack_into, end
        self._take: Any = itemgetter(*(parameter.argument for parameter in ordered))  # every kernel has two or more
        self._templates = [
            (position, parameter.descriptor, dict[int, bytes]())
            for position, parameter in enumerate(ordered)
            if parameter.descriptor
        ]
        self._attribute = _cluster_attribute(recorded.cluster)
        self._launch = driver.launcher()
        # Taken and given back by one operation each, so that threads, and a finaliser amid a call, share none.
        self._free: list[_Memory] = []
        self.launch = self._flat()

    def _flat(self) -> Callable[[int, int, Sequence[int]], None]:
        """The launch with all that it needs in its own cells: 0.5 us less than through self."""
        take = self._with_descriptors if self._templates else self._take
        pack, launch, free, function = self._pack, self._launch, self._free, self.recorded.function

        def launched(stream: int, grid: int, values: Sequence[int]) -> None:
            taken = take(values)
            memory = free.pop() if free else _Memory(function)
            if memory.grid != grid or memory.stream != stream:
                self._write_head(memory, stream, grid)
            pack(memory.view, PARAMETERS_AT, *taken)
            if status := launch(*memory.arguments):
                self._again(status, memory)
            free.append(memory)

        return launched

    def _write_head(self, memory: _Memory, stream: int, grid: int) -> None:
        recorded = self.recorded
        attributes = (ctypes.addressof(self._attribute), 1) if recorded.cluster > 1 else (0, 0)
        shape = grid, 1, 1, recorded.threads, 1, 1, recorded.shared_bytes
        HEAD.pack_into(memory.view, 0, *shape, stream, *attributes, self._size)
        memory.grid, memory.stream = grid, stream

    def _with_descriptors(self, values: Sequence[int]) -> list[Any]:
        taken = list(self._take(values))
        for position, template, known in self._templates:
            address = taken[position]
            if (found := known.get(address)) is None:
                driver.enter(self.device)
                found = descriptor_of(template, address)
                if len(known) >= MOST_DESCRIPTORS:
                    known.clear()
                known[address] = found
            taken[position] = found
        return taken

    def _again(self, status: int, memory: _Memory) -> None:
        """In the device's own context, where this thread has none or another one; else the error is raised."""
        if status in (NO_CONTEXT, ANOTHERS):
            before = driver.current_context()
            driver.enter(self.device)
            if before != driver.primary_context(self.device):  # the driver calls none now one error, now the other
                with driver.context_of(self.device):
                    status = self._launch(*memory.arguments)
        if status:
            raise RuntimeError(
                f"{self.name} could not be launched on cuda:{self.device}: {driver.words(status)}; nothing was "
                "computed. An error of an earlier kernel of this process shows here too: run it with "
                "CUDA_LAUNCH_BLOCKING=1 to see whose it is, and report it with the output of python -m pallas_norm"
            )

    def elsewhere(self, stream: int, grid: int, values: Sequence[int]) -> None:
        """The same while another device is the current one."""
        with driver.context_of(self.device):
            self.launch(stream, grid, values)
