"""What a flush asks of the driver, of which this machine may have none."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench import pinned


class Driver:
    """Tells what it was asked for, and refuses `refused`."""

    def __init__(self, refused: str | None = None) -> None:
        self.refused, self.asked = refused, list[str]()

    def __getattr__(self, function: str) -> Callable[..., int]:
        def answer(*arguments: Any) -> int:
            del arguments
            self.asked.append(function)
            return 201 if function == self.refused else 0

        return answer


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Driver], Driver]]:
    def on(driver: Driver) -> Driver:
        device = types.SimpleNamespace(local_hardware_id=0)
        monkeypatch.setattr(pinned, "jax", types.SimpleNamespace(devices=lambda: [device]))
        monkeypatch.setattr(pinned, "driver", lambda: driver)
        pinned._context.cache_clear()
        return driver

    yield on
    pinned._context.cache_clear()


PUSHED = ["cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2"]
RELEASED = ["cuCtxResetPersistingL2Cache", "cuCtxPopCurrent_v2"]


def test_lines_are_released_in_the_context_of_the_device(on: Callable[[Driver], Driver]) -> None:
    driver = on(Driver())
    pinned.release()
    pinned.release()
    assert driver.asked == [*PUSHED, *RELEASED, PUSHED[1], *RELEASED]


def test_a_refusal_is_told_and_the_context_left(on: Callable[[Driver], Driver]) -> None:
    driver = on(Driver("cuCtxResetPersistingL2Cache"))
    with pytest.raises(RuntimeError, match=r"cuCtxResetPersistingL2Cache answered 201.* stay in L2"):
        pinned.release()
    assert driver.asked == [*PUSHED, *RELEASED]


@pytest.mark.gpu
def test_a_gpu_releases_them() -> None:
    pinned.release()  # raises where it does not
