"""The calls of rms_norm_rope that fused attention makes."""

from __future__ import annotations

from typing import Any

import pytest

from pallas_norm_torch import _qk_rope, rms_norm_rope


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []

    def counted(*operands: Any, **options: Any) -> Any:
        found.append(operands)
        return rms_norm_rope(*operands, **options)

    monkeypatch.setattr(_qk_rope, "rms_norm_rope", counted)
    return found
