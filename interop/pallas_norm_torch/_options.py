"""The options of a call as a Spec: operands and options checked, and those that were checked before looked up."""

from __future__ import annotations

from typing import Any

from pallas_norm._spec import Spec  # pyright: ignore[reportPrivateUsage]

from . import _validate

_specs: dict[tuple[float, bool, float], Spec] = {}  # those that were checked


def spec(
    x: Any,
    residual: Any,
    weight: Any,
    eps: Any,
    cast_before_scale: Any,
    weight_offset: Any,
    *,
    with_residual: bool,
) -> Spec:
    """The call's options, everything checked."""
    if not _validate.are_usual(x, residual, weight, with_residual=with_residual):
        _validate.operands(x, residual, weight, with_residual=with_residual)
    _validate.no_tangents(x, residual, weight)
    if type(eps) is float and type(weight_offset) is float and type(cast_before_scale) is bool:
        known = _specs.get((eps, cast_before_scale, weight_offset))
        if known is not None and not (weight_offset and weight is None):
            return known
    found = Spec(
        eps=_validate.eps(eps),
        cast_before_scale=_validate.flag("cast_before_scale", cast_before_scale),
        weight_offset=_validate.weight_offset(weight_offset, weight),
    )
    return _specs.setdefault((found.eps, found.cast_before_scale, found.weight_offset), found)
