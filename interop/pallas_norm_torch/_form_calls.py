"""The prepared calls of other forms than the norm's own (8-bit results, gates, rotated heads): one for each kernel and
device, or why there is none. A form without a kernel says nothing of the norm's kernels, which stay."""

from __future__ import annotations

from typing import Any

import torch

from pallas_norm.plans.fitting import Misfit

from . import launch
from ._kernels import Rope, RopeBackward

_calls: dict[tuple[Any, Any, int], Any] = {}
# To find out once more that a kernel cannot be launched takes a compilation. `explain` tells.
_refused: dict[tuple[Any, Any, int], tuple[type[Exception], str]] = {}


def call_of(make: Any, kernel: Any, device: int) -> Any:
    """make(kernel, device), made at the first call. Raises launch.Unavailable, and Misfit where the GPU has none."""
    key = make, kernel, device
    if (found := _calls.get(key)) is not None:
        return found
    if (refused := _refused.get(key)) is not None:
        kind, reason = refused
        raise kind(reason)
    try:
        made = make(kernel, device)
    except (Misfit, launch.Unavailable) as reason:
        _refused[key] = type(reason), str(reason)
        raise
    return _calls.setdefault(key, made)


def run(make: Any, kernel: Any, device: int, *operands: Any) -> Any:
    """What that call gives, or None where there is none, for which nothing was written."""
    try:
        return call_of(make, kernel, device)(*operands)
    except (Misfit, launch.Unavailable):
        return None


def refusals(n: int, dtype: torch.dtype, device: int) -> list[tuple[str, str]]:
    """(which form, why), once each, of rows or heads of n elements of that dtype that were asked for and have no kernel
    there."""
    known = list(_refused.items())  # another thread may add to it meanwhile
    found = (
        (_named(make, kernel), why)
        for (make, kernel, where), (_, why) in known
        if where == device and (kernel.n, _dtype(kernel)) == (n, dtype)
    )
    return [*dict.fromkeys(found)]


def _dtype(kernel: Any) -> torch.dtype:
    return kernel.q if isinstance(kernel, Rope | RopeBackward) else kernel.x


def _named(make: Any, kernel: Any) -> str:
    """Of gated norms and 8-bit results with their groups, where these are not whole rows."""
    group = getattr(getattr(kernel, "form", kernel), "group", 0)
    return make.FORM if group in (0, kernel.n) else f"{make.FORM} in groups of {group}"
