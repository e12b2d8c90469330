"""What a call may not change: the current device and context, the other GPU's memory and contexts, JAX's backends."""

from __future__ import annotations

import dataclasses
import subprocess
from typing import Any

import torch

from pallas_norm_torch.launch import driver


def memory_used() -> dict[str, int]:
    """MiB by the card's UUID, as nvidia-smi says: of all processes."""
    command = ["nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n")
    pairs = (line.split(",") for line in lines)
    return {uuid.strip().removeprefix("GPU-"): int(used) for uuid, used in pairs}


def uuid_of(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")


def has_context(device: int) -> bool:
    """Whether anything in this process holds the device's primary context, which torch and JAX both use."""
    _, active = driver.ask("cuDevicePrimaryCtxGetState", driver.ask("cuDeviceGet", device))
    return bool(active)


def backends_started() -> bool:
    from jax._src import xla_bridge

    return bool(xla_bridge.backends_are_initialized())


@dataclasses.dataclass(frozen=True)
class State:
    current_device: int
    current_context: int
    contexts: tuple[bool, ...]
    jax_started: bool

    @classmethod
    def now(cls, *, contexts: bool = True) -> State:
        gpus = range(torch.cuda.device_count()) if contexts else ()
        held = tuple(has_context(device) for device in gpus)
        return cls(torch.cuda.current_device(), driver.current_context(), held, backends_started())


def assert_unchanged(before: Any, after: Any) -> None:
    assert before == after, f"before the call {before}, after it {after}"


def assert_memory_untouched(before: dict[str, int], after: dict[str, int], used: str, *, most: int) -> str:
    """No MiB more on any other card; on the one in use at most as many as a kernel and a few tensors need."""
    assert used in before, f"{used} is none of {sorted(before)}"
    for uuid, amount in before.items():
        more = after[uuid] - amount
        if uuid == used:
            assert more <= most, f"the call took {more} MiB of its own GPU, more than {most}"
        else:
            assert more == 0, f"the call took {more} MiB of the GPU {uuid}, which nobody uses"
    return f"+{after[used] - before[used]} MiB on its own GPU, 0 on the others"
