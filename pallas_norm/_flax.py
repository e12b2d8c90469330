"""What of Flax's RMSNorm our modules cannot do, said in words."""

from __future__ import annotations

from typing import Any


def objection(module: Any) -> str | None:
    """Why a module with the attributes of Flax's RMSNorm cannot compute with `rms_norm`; None if it can."""
    for name in ("reduction_axes", "feature_axes"):
        axes = getattr(module, name)
        if axes not in (-1, (-1,), [-1]):
            return f"{name} is {axes}; needed -1: the kernels normalise the last axis"
    if module.axis_index_groups is not None:
        return "axis_index_groups is set; needed None: a row split over all shards of axis_name"
    if not getattr(module, "force_float32_reductions", True):
        return "force_float32_reductions is False; needed True: the kernels add up in float32"
    return None


def check(module: Any) -> None:
    if (reason := objection(module)) is not None:
        raise NotImplementedError(f"{reason}; use flax's own RMSNorm for this one")


def no_mask(mask: Any) -> None:
    if mask is not None:
        raise NotImplementedError("mask is given; needed None: the kernels take whole rows; use flax's own RMSNorm")
