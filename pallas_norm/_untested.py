"""Cards of a kind on which no kernel has run yet, as far as is known: what their users can report."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .plans.hardware import Gpu, named

if TYPE_CHECKING:
    from ._doctor import Line

RUN_ON = ((9, 0),)  # compute capabilities: H100 and H200, see docs/gpus.md
MAJOR, MINOR, MULTIPROCESSORS, SHARED_BYTES = 75, 76, 16, 97  # CUdevice_attribute
BEGIN, END = "--- paste from here into an issue ---", "--- to here ---"


class Card(NamedTuple):
    name: str
    gpu: Gpu

    def __str__(self) -> str:
        capability, shared_bytes, multiprocessors = self.gpu
        return (
            f"{self.name}, compute capability {named(capability)}, {multiprocessors} multiprocessors, "
            f"{shared_bytes >> 10} KB of shared memory a CTA"
        )


def cards() -> list[Card]:
    """What the NVIDIA driver says when it is asked without JAX and torch. It makes no context."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, found = ctypes.c_int(), list[Card]()
    if library.cuInit(0) or library.cuDeviceGetCount(ctypes.byref(count)):
        return []
    for index in range(count.value):
        device, name, value = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int()
        library.cuDeviceGet(ctypes.byref(device), index)
        library.cuDeviceGetName(name, len(name), device)
        numbers: list[int] = []
        for attribute in (MAJOR, MINOR, SHARED_BYTES, MULTIPROCESSORS):
            library.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            numbers.append(value.value)
        major, minor, shared_bytes, multiprocessors = numbers
        found.append(Card(name.value.decode(), Gpu((major, minor), shared_bytes, multiprocessors)))
    return found


def block(lines: Sequence[Line], found: Sequence[Card]) -> Iterator[str]:
    """What `lines` say of such a card, short enough to be pasted; nothing where every card is of a kind that is known.

    A report without a WRONG is as welcome: docs/gpus.md then says that kernels ran there.
    """
    if not (new := sorted({str(card) for card in found if card.gpu.capability not in RUN_ON})):
        return
    yield BEGIN
    yield from new
    yield from (line.text for line in lines if "sees" in line.text or line.text.startswith("pallas-norm "))
    yield from (line.text for line in lines if ", n = 4096" in line.text and not line.mark)
    right = sum(line.mark == "ok" for line in lines)
    wrong = [line for line in lines if line.mark == "WRONG"]
    yield f"{right} lines of checks are right, {len(wrong)} are wrong"
    yield from map(str, wrong)
    yield END
