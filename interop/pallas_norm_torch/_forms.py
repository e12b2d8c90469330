"""The term of a forward matched against what `rms_norm` computes: which options, or what is in the way."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from ._terms import Term, Unknown, widened

F32 = torch.float32
Path = tuple[str, ...]
RANKS = (1, 2, 3, 4, 5)


class ABSENT:
    """Of an attribute that is not there: a class, which pickle finds again."""


@dataclasses.dataclass(frozen=True)
class Form:
    """y = result(weight' * [round](x * rstd)) [+ bias], for one dtype of x and one of the weight.

    weight' is the weight, converted to `weight_dtype` where that is not None, plus `offset`, which is added in float32
    (`wide_offset`) or rounded to the weight's dtype. `wide`: what a bias is added to, or y, is float32, where x and
    weight' are not.
    """

    weight: str | None
    weight_dtype: torch.dtype | None
    offset: float
    wide_offset: bool
    cast_before_scale: bool
    wide: bool
    result: torch.dtype
    bias: str | None = None

    @property
    def out_dtype(self) -> torch.dtype | None:
        """Of `rms_norm`: y's, or that of what the bias is added to; None: what x and weight' promote to."""
        return F32 if self.wide else self.result if self.bias is None else None

    @property
    def unrounded(self) -> bool:
        """Whether unit is y, in float32."""
        return self.weight is None and self.wide


WEIGHTLESS = Form(None, None, 0.0, wide_offset=False, cast_before_scale=True, wide=False, result=F32)


class Match(NamedTuple):
    form: Form
    eps: float


@dataclasses.dataclass(frozen=True)
class Computation:
    """What a module computes by dtypes of x and weight, where its eps is, and what it read of itself and outside."""

    forms: tuple[tuple[tuple[torch.dtype, torch.dtype | None], Form], ...]
    weight: str | None
    eps: Path | float
    read: tuple[tuple[Path, Any], ...]
    autocast: bool  # whether autocast changes it
    ranks: tuple[int, ...] = RANKS  # of x
    columns: int | None = None  # of x, where it was not proved for any number
    outside: tuple[tuple[str, Any], ...] | None = None  # None: nobody looked, a person has said so


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _parts(term: Term) -> tuple[Term, ...]:
    return tuple(one for one in term.arguments if isinstance(one, Term))


def _number(term: Term) -> float | None:
    return next((one for one in term.arguments if isinstance(one, float)), None)


def _mean(term: Term) -> Term:
    """x of a mean of x^2 over the last axis, in float32."""
    square: Term | None = None
    number = _number(term)
    if term.operation == "mean":
        (square,) = _parts(term)
    elif term.operation in ("divide", "multiply") and _parts(term)[0].operation == "sum" and number is not None:
        (total,) = _parts(term)
        n = _number(total)
        assert n is not None
        if number != (n if term.operation == "divide" else 1.0 / n):
            by = (
                f"divides the sum of squares by {number:g}"
                if term.operation == "divide"
                else f"scales it by {number:g}"
            )
            raise Unknown(f"{by}, where a row has {n:g} elements")
        (square,) = _parts(total)
    if square is None:
        raise Unknown(f"takes the reciprocal root of {term}, not of a mean of squares")
    if square.operation != "square":
        raise Unknown(f"averages {square.operation}, not squares")
    if {term.dtype, square.dtype} != {F32}:
        low = next(one for one in (square.dtype, term.dtype) if one != F32)
        raise Unknown(f"squares and averages in {_words(low)}, not in float32")
    return _parts(square)[0]


def _rstd(term: Term) -> tuple[Term, float]:
    """(x, eps) of 1 / sqrt(mean(x^2) + eps)."""
    (inner,) = _parts(term)
    if term.dtype != F32 or inner.dtype != F32:
        raise Unknown(f"takes the reciprocal root in {_words(term.dtype)}, not in float32")
    if inner.operation != "add":
        return _mean(inner), 0.0
    eps, parts = _number(inner), _parts(inner)
    if eps is None:
        raise Unknown("adds an eps that is a tensor, not a number")
    return _mean(parts[0]), eps


def _unit(term: Term) -> tuple[Term, float]:
    """(x, eps) of x * rstd in float32."""
    if term.operation == "divide":
        raise Unknown("divides by the root, which rounds otherwise than a product with the reciprocal root")
    parts = _parts(term)
    if term.operation != "multiply" or len(parts) != 2:
        raise Unknown(f"ends in {term.operation}, where a product with the reciprocal root of a mean is needed")
    rstd = next((one for one in parts if one.operation == "rsqrt"), None)
    if rstd is None:
        rounded = [one for one in parts if one.operation == "to" and widened(one) is one]
        if any(_parts(one)[0].operation == "rsqrt" for one in rounded):
            raise Unknown(f"rounds the reciprocal root itself to {_words(rounded[0].dtype)}")
        raise Unknown("multiplies by no reciprocal root of a mean of squares")
    x = parts[1] if parts[0] is rstd else parts[0]
    squared, eps = _rstd(rstd)
    if x.operation != "x" or squared.operation != "x":
        raise Unknown(f"normalises {x if x.operation != 'x' else squared}, not its input alone")
    if term.dtype != F32:
        raise Unknown(f"multiplies by the reciprocal root in {_words(term.dtype)}, not in float32")
    return x, eps


def _eps_outside(term: Term) -> bool:
    if term.operation == "add" and _number(term) is not None and term.arguments:
        (inner,) = _parts(term)
        if inner.operation in ("sqrt", "rsqrt"):
            return True
    return any(map(_eps_outside, _parts(term)))


def _of_weight(term: Term) -> bool:
    if term.operation == "parameter":
        return True
    parts = _parts(term)
    return bool(parts) and all(map(_of_weight, parts))


def _weight(term: Term) -> tuple[str, torch.dtype | None, float, bool, torch.dtype]:
    """(name, dtype that it is converted to, offset, whether that is added in float32, dtype of the sum)."""
    final, offset, wide = term.dtype, 0.0, False
    if term.operation == "add" and (number := _number(term)) is not None:
        offset, wide = number, term.dtype == F32
        (term,) = _parts(term)
    converted = None
    if term.operation == "to":
        converted = term.dtype
        (term,) = _parts(term)
    if term.operation != "parameter":
        raise Unknown(f"multiplies by {term.operation} of its weight, not by the weight")
    return term.name, converted, offset, wide, final


def match(term: Term, x_dtype: torch.dtype) -> Match:
    """What computes this term of an x of that dtype. Raises Unknown with the reason where nothing does."""
    if _eps_outside(term):
        raise Unknown("adds its eps outside the root")
    result = term.dtype
    if term.operation == "to":
        (term,) = _parts(term)
    if term.operation == "add":
        parts = _parts(term)
        found = next((one for one in parts if one.operation == "parameter"), None)
        if found is None or len(parts) != 2:
            raise Unknown(f"ends in {term}, where a product is needed")
        inner = match(parts[1] if parts[0] is found else parts[0], x_dtype)
        if torch.promote_types(inner.form.result, found.dtype) != term.dtype or inner.form.bias is not None:
            raise Unknown("adds a bias in another dtype")
        return Match(dataclasses.replace(inner.form, bias=found.name, result=result), inner.eps)
    weights = [one for one in _parts(term) if _of_weight(one)] if term.operation == "multiply" else []
    if not weights:
        if term.operation == "to":
            raise Unknown("rounds twice without a weight")
        _, eps = _unit(term)
        if result not in (F32, x_dtype):
            raise Unknown(f"rounds to {_words(result)}")
        return Match(dataclasses.replace(WEIGHTLESS, wide=result != x_dtype, result=result), eps)
    weight, *others = weights
    if others or len(_parts(term)) != 2:
        raise Unknown("multiplies parameters with each other")
    unit = next(one for one in _parts(term) if one is not weight)
    product, cast = term.dtype, False
    if unit.operation == "to":
        if unit.dtype != x_dtype:
            raise Unknown(f"rounds the normalised x to {_words(unit.dtype)}, where x is {_words(x_dtype)}")
        cast = True
        (unit,) = _parts(unit)
    _, eps = _unit(unit)
    name, weight_dtype, offset, wide_offset, final = _weight(weight)
    given = weight_dtype or _parameter_dtype(weight)
    natural = torch.promote_types(x_dtype, given if wide_offset else final)
    if not cast and x_dtype != F32 and product != F32:
        raise Unknown(f"multiplies by the weight in {_words(product)}, where the normalised x is in float32")
    if product != F32 and result != product:
        raise Unknown(f"rounds to {_words(product)} and again to {_words(result)}")
    wide = result == F32 and natural != F32
    return Match(Form(name, weight_dtype, offset, wide_offset, cast, wide, result), eps)


def _parameter_dtype(term: Term) -> torch.dtype:
    while term.operation != "parameter":
        (term,) = _parts(term)
    return term.dtype
