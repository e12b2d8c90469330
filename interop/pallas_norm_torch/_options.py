"""The options of a call as a Spec: operands and options checked, and those that were checked before looked up."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pallas_norm._spec import Spec  # pyright: ignore[reportPrivateUsage]

from . import _validate

Rounding = tuple[Any, Any, Any, Any]  # unit_dtype, round_weight, out_dtype, s_dtype: as a call has them
AS_OPERANDS: Rounding = (None, False, None, None)

_specs: dict[Any, Spec] = {}  # those that were checked


def spec(
    x: Any,
    residual: Any,
    weight: Any,
    eps: Any,
    cast_before_scale: Any,
    weight_offset: Any,
    rounding: Rounding = AS_OPERANDS,
    *,
    with_residual: bool,
    beside: str = "residual",
) -> Spec:
    """The call's options, everything checked. beside: what the second operand is called."""
    if not _validate.are_usual(x, residual, weight, with_residual=with_residual):
        _validate.operands(x, residual, weight, with_residual=with_residual, beside=beside)
    _validate.no_tangents(x, residual, weight)
    given = eps, cast_before_scale, weight_offset, *rounding
    if type(eps) is type(weight_offset) is float and type(cast_before_scale) is type(rounding[1]) is bool:
        try:
            known = _specs.get(given)
        except TypeError:  # an option that is no dtype, nor anything else that can be looked up
            known = None
        if known is not None and not (weight is None and (weight_offset or rounding[1])):
            return known
    cast_before_scale, rounding = _validate.rounding(cast_before_scale, rounding, weight)
    found = of((_validate.eps(eps), cast_before_scale, _validate.weight_offset(weight_offset, weight), *rounding))
    return _specs.setdefault(given, found)


def of(options: Sequence[Any]) -> Spec:
    """The Spec of an operator's options: eps, cast_before_scale, weight_offset, and what follows of a Rounding."""
    eps, cast_before_scale, weight_offset, *rounding = options
    unit, round_weight, out, s = (*rounding, *AS_OPERANDS[len(rounding) :])
    unit, out, s = (None if dtype is None else _validate.dtype_name(dtype) for dtype in (unit, out, s))
    dtypes: Any = {"unit_dtype": unit, "out_dtype": out, "s_dtype": s}
    return Spec(eps, cast_before_scale, weight_offset, round_weight=round_weight, **dtypes)


def arguments(spec: Spec) -> tuple[Any, ...]:
    """The inverse of `of`, without what is left to the defaults: programs that need no more stay as they were."""
    unit, out, s = (None if name is None else _named(name) for name in (spec.unit_dtype, spec.out_dtype, spec.s_dtype))
    return spec.eps, spec.cast_before_scale, spec.weight_offset, *shortest((unit, spec.round_weight, out, s))


def shortest(rounding: Sequence[Any]) -> tuple[Any, ...]:
    """Without the defaults at its end."""
    given = tuple(rounding)
    while given and given[-1] == AS_OPERANDS[len(given) - 1]:
        given = given[:-1]
    return given


def _named(name: str) -> torch.dtype:
    return getattr(torch, name)


class Dtypes(NamedTuple):
    """As pallas_norm._dtypes.Dtypes, whose rule it is, in torch's dtypes."""

    s: torch.dtype
    unit: torch.dtype
    weight: torch.dtype  # in which it multiplies; float32 where there is none
    y: torch.dtype


@functools.cache
def dtypes(
    spec: Spec, x: torch.dtype, residual: torch.dtype | None = None, weight: torch.dtype | None = None
) -> Dtypes:
    """Of operands of these dtypes; in the backward pass x is s."""
    others = (None if dtype is None else _validate.dtype_name(dtype) for dtype in (residual, weight))
    found = spec.dtypes(_validate.dtype_name(x), *others)
    factor = torch.float32 if found.weight is None else _named(found.weight.name)
    return Dtypes(_named(found.s.name), _named(found.unit.name), factor, _named(found.y.name))


def dtypes_of(
    spec: Spec, x: torch.Tensor, residual: torch.Tensor | None = None, weight: torch.Tensor | None = None
) -> Dtypes:
    return dtypes(spec, x.dtype, None if residual is None else residual.dtype, None if weight is None else weight.dtype)
