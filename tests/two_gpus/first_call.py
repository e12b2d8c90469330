"""One fresh process whose first call of the package is the one under test. usage: first_call.py WAY DEVICE [memory]

Ends with status 0 if the bits are right and the call has left everything else as it was.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from pallas_norm_torch import rms_norm
from tests.two_gpus import known, state
from tests.two_gpus.known import Known

MOST_MIB = 500  # a kernel, its tensors and the allocator's blocks; JAX's preallocation would be most of the card


def forward(case: Known) -> None:
    case.check_forward(rms_norm(case.x, case.weight))


def in_thread(case: Known) -> None:
    """Its current device is 0, and it has no context."""
    failures: list[BaseException] = []

    def work() -> None:
        try:
            forward(case)
            known.check_backward(case)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def on_side_stream(case: Known) -> None:
    stream = torch.cuda.Stream(case.x.device)
    stream.wait_stream(torch.cuda.current_stream(case.x.device))
    with torch.cuda.stream(stream):
        y = rms_norm(case.x, case.weight)
    stream.synchronize()
    case.check_forward(y)


def every_width(case: Known) -> None:
    known.check_all(case)
    for n in (16, 128, 1000, 16384):
        known.check_all(known.of(case.x.device, n, 24))


WAYS: dict[str, Callable[[Known], None]] = {
    "forward": forward,
    "backward": known.check_backward,
    "thread": in_thread,
    "stream": on_side_stream,
    "all": every_width,
}


def with_jax(order: str, device: int) -> None:
    """JAX on one GPU, torch on the other, in turns. JAX's start makes the last GPU's context the current one."""
    if order == "jax-first":
        on_jax(1 - device)
        torch.cuda.set_device(device)
    forward(known.of(f"cuda:{device}"))
    for turn, n in enumerate((128, 512, 2048)):  # each width compiles again, after JAX has moved the context
        on_jax((device + turn) % 2)
        for gpu in (device, 1 - device):
            known.check_all(known.of(f"cuda:{gpu}", n, 40))
        on_jax((device + turn + 1) % 2)


def on_jax(device: int, n: int = 256) -> None:
    import jax
    import numpy as np

    import pallas_norm

    jax.devices()
    case = known.of("cpu", n)
    x, weight = (jax.device_put(value.float().numpy(), jax.devices()[device]) for value in (case.x, case.weight))
    y: Any = jax.jit(pallas_norm.rms_norm)(x.astype("bfloat16"), weight.astype("bfloat16"))
    assert y.devices() == {jax.devices()[device]}
    np.testing.assert_array_equal(np.asarray(y.astype("float32")), case.y.float().numpy())


def warm(case: Known) -> None:
    """Whatever torch alone makes, contexts too, is there afterwards."""
    torch.ones(1, device=case.x.device).requires_grad_().sum().backward()
    case.check_forward(case.y.clone())


def elsewhere(name: str) -> tuple[str, bool]:
    way, _, where = name.partition("@")
    assert where in ("", "elsewhere"), name
    return way, where == "elsewhere"


def main(name: str, device: int, *, memory: bool) -> str:
    if name in ("jax-first", "torch-first"):
        with_jax(name, device)
        return ""
    way, other_is_current = elsewhere(name)
    torch.cuda.set_device(1 - device if other_is_current else device)
    case = known.of(f"cuda:{device}")
    cold = way == "backward"  # then the first backward pass of the process is ours, and starts autograd's threads
    if not cold:
        warm(case)
        thread = threading.Thread(target=warm, args=(case,))
        thread.start()
        thread.join()
    torch.cuda.synchronize(device)
    used = state.memory_used() if memory else {}
    before = state.State.now(contexts=not cold)
    assert not before.jax_started, "JAX had started before the call"
    WAYS[way](case)
    torch.cuda.synchronize(device)
    state.assert_unchanged(before, state.State.now(contexts=not cold))
    if not memory:
        return ""
    return state.assert_memory_untouched(used, state.memory_used(), state.uuid_of(device), most=MOST_MIB)


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), memory="memory" in sys.argv[3:]))
