"""A report of `python -m pallas_norm` that checks a few cases on a CPU, and nothing of torch."""

from __future__ import annotations

import jax
import pytest

from pallas_norm import __main__ as program
from pallas_norm import _doctor, _golden, _selfcheck

PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"
CASES = tuple(_golden.case(128, dtype) for dtype in _golden.DTYPES)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few cases on a CPU, and no torch; the environment is as it was afterwards."""
    monkeypatch.setenv(PREALLOCATE, "true")
    monkeypatch.setattr(_selfcheck, "XLA_CASES", CASES)
    monkeypatch.setattr(_doctor, "checked_devices", lambda: jax.local_devices(backend="cpu")[:1])
    monkeypatch.setattr(_doctor, "_torch_lines", lambda **_: iter(()))


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = program.main([])
    return status, capsys.readouterr().out
