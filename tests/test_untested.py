"""What the doctor prints where a card is of a kind on which no kernel has run yet."""

from __future__ import annotations

from typing import Any

import pytest

from pallas_norm import __main__ as program
from pallas_norm import _doctor, _untested
from pallas_norm.plans.hardware import Gpu


class Driver:
    """As much of libcuda as says what a card is."""

    def __init__(self, *numbers: dict[int, int]) -> None:
        self.numbers = numbers

    def cuInit(self, flags: int) -> int:
        return flags

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.numbers)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> None:
        device._obj.value = index

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        name.value = b"NVIDIA A100-SXM4-40GB"[: size - 1]

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> None:
        value._obj.value = self.numbers[device.value][attribute]


A100 = {75: 8, 76: 0, 16: 108, 97: 166912}
H100 = {75: 9, 76: 0, 16: 132, 97: 232448}


def test_a_user_of_a_new_card_has_a_block_to_paste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_untested.ctypes, "CDLL", lambda name: Driver(A100, A100, H100))
    lines = [
        _doctor.Line("", "pallas-norm 0.1, Python 3.12, jax 0.11.2"),
        _doctor.Line("", "JAX sees 2 x gpu (NVIDIA A100-SXM4-40GB)"),
        _doctor.Line("", "pallas_norm, n = 128: mosaic_gpu"),
        _doctor.Line("", "pallas_norm, n = 4096: mosaic_gpu"),
        _doctor.Line("ok", "JAX on gpu, n = 4096, kernel"),
        _doctor.Line("WRONG", "JAX on gpu, n = 128, kernel: y", "open an issue"),
    ]
    assert list(_untested.block(lines, _untested.cards())) == [
        "--- paste from here into an issue ---",
        "NVIDIA A100-SXM4-40GB, compute capability 8.0, 108 multiprocessors, 163 KB of shared memory a CTA",
        "pallas-norm 0.1, Python 3.12, jax 0.11.2",
        "JAX sees 2 x gpu (NVIDIA A100-SXM4-40GB)",
        "pallas_norm, n = 4096: mosaic_gpu",
        "1 lines of checks are right, 1 are wrong",
        "WRONG  JAX on gpu, n = 128, kernel: y\n       -> open an issue",
        "--- to here ---",
    ]
    monkeypatch.setattr(_untested.ctypes, "CDLL", lambda name: Driver(H100))
    assert list(_untested.block(lines, _untested.cards())) == []


def test_the_block_comes_before_the_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_untested, "cards", lambda: [_untested.Card("NVIDIA L4", Gpu((8, 9), 101376, 58))])
    monkeypatch.setattr(_doctor, "examine", lambda *, preallocates: iter([_doctor.Line("ok", "n = 4096")]))
    assert program.main([]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok     n = 4096",
        "--- paste from here into an issue ---",
        "NVIDIA L4, compute capability 8.9, 58 multiprocessors, 99 KB of shared memory a CTA",
        "1 lines of checks are right, 0 are wrong",
        "--- to here ---",
        "Everything that was checked is right.",
    ]


def test_without_a_driver_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(_untested.ctypes, "CDLL", absent)
    assert _untested.cards() == []
    monkeypatch.setattr(_untested.ctypes, "CDLL", lambda name: Driver())
    assert _untested.cards() == []
