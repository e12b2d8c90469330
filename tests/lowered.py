"""The kernels of programs that are lowered here, and a process that has lowered none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest

from pallas_norm import _target
from tests import kernel_text


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_target, "_assembled_for", [])
    monkeypatch.setattr(_target, "_seen", {})
    jax.clear_caches()  # of programs that other tests have lowered


def modules(function: Callable[..., Any], *operands: Any) -> list[str]:
    """The text of each kernel in the program; none where XLA compiles the reference."""
    return [kernel_text.text(module, raw=True) for module in kernel_text.modules(function, *operands)]
