"""The forward of a norm that was recognised by what it computes, or that a person has described."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import _launches, _validate
from ._forms import ABSENT, Computation, Form
from ._launches import DTYPES
from ._outside import unchanged
from ._proof import weight_of
from .ops import add_rms_norm, rms_norm

Tensor = torch.Tensor
OPTIONS = {"weight": "weight", "eps": None, "cast_before_scale": True, "weight_offset": 0.0}


def _read(self: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        self = getattr(self, name, ABSENT)
    return self


class Functions:
    """What computes: `forward` y, `add` (y, s), where `takes` says so."""

    def __init__(self, owner: Any, own: Callable[..., Any], hidden: frozenset[str], computation: Computation) -> None:
        still, columns = unchanged(owner, computation.outside), computation.columns
        forms, weight_name, eps_path = dict(computation.forms), computation.weight, computation.eps
        read, bias_name = computation.read, forms[torch.float32, torch.float32].bias
        has_read = bool(read)

        def eps_of(self: Any) -> Any:
            return _read(self, eps_path) if isinstance(eps_path, tuple) else eps_path

        def operands(self: Any, x: Tensor) -> tuple[Form, Tensor | None, Tensor | None]:
            weight = None if weight_name is None else getattr(self, weight_name)
            bias = None if bias_name is None else getattr(self, bias_name)
            other = weight if weight is not None else bias if bias is not None else x
            return forms[x.dtype, other.dtype], weight, bias

        def takes(self: Any, x: Any, *others: Any) -> bool:
            members = self.__dict__
            weight = bias = None
            if weight_name is not None and (weight := members["_parameters"].get(weight_name)) is None:
                weight = getattr(self, weight_name)
            if bias_name is not None and (bias := members["_parameters"].get(bias_name)) is None:
                bias = getattr(self, bias_name)
            if not _launches.launched(x, weight, *others) or (bias is not None and not _launches.launched(x, bias)):
                return False
            other, eps = weight if weight is not None else bias if bias is not None else x, eps_of(self)
            return (
                type(eps) in (float, int)
                and eps >= 0
                and (x.dtype, other.dtype) in forms
                and (bias is None or bias.dtype == other.dtype)
                and x.dim() in computation.ranks
                and (columns is None or x.shape[-1] == columns)
                and owner.forward is own
                and still()
                and all(name not in members for name in hidden)  # isdisjoint ends a compiled graph of torch 2.11
                and (not has_read or all(_read(self, path) == value for path, value in read))
                and not (computation.autocast and torch.is_autocast_enabled(x.device.type))
            )

        def finished(form: Form, y: Tensor, bias: Tensor | None) -> Tensor:
            y = y if bias is None else y + bias
            return y if y.dtype == form.result else y.to(form.result)

        def options(form: Form, self: Any) -> dict[str, Any]:
            found = {"eps": eps_of(self), "cast_before_scale": form.cast_before_scale and not form.unrounded}
            if form.wide_offset:
                found["weight_offset"] = form.offset
            return found if (dtype := form.out_dtype) is None else found | {"out_dtype": dtype}

        def forward(self: Any, x: Tensor) -> Tensor:
            form, weight, bias = operands(self, x)
            given = None if weight is None else weight_of(form, weight)
            return finished(form, rms_norm(x, given, **options(form, self)), bias)

        def add(self: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            form, weight, bias = operands(self, x)
            given = None if weight is None else weight_of(form, weight)
            y, s = add_rms_norm(x, residual, given, **options(form, self))
            return finished(form, y, bias), s

        self.takes, self.forward, self.add = takes, forward, add


def replacing(owner: Any, own: Callable[..., Any], functions: Functions) -> Callable[..., Any]:
    """The new forward: ours for one argument, the class's own for whatever else it takes."""

    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        if len(arguments) + len(named) == 1:
            (x,) = arguments or named.values()
            if functions.takes(self, x):
                return functions.forward(self, x)
        return owner.forward(self, *arguments, **named)

    return forward


def described(owner: type, options: Mapping[str, Any]) -> Computation:
    """What a person says that a class computes: `known={owner: options}`. With `cast_before_scale` y has dtype
    promote_types(x, weight), without it that of x, as in Llama's and Gemma's norms."""
    if unknown := [name for name in options if name not in OPTIONS]:
        raise TypeError(
            f"known[{owner.__name__}] has the option {unknown[0]!r}; needed some of {', '.join(OPTIONS)}: eps and "
            "weight are the names of attributes, or a number and None"
        )
    given = {**OPTIONS, **options}
    if given["eps"] is None:
        raise ValueError(f"known[{owner.__name__}] says no eps; needed the name of the attribute that holds it")
    if not isinstance(given["weight"], (str, type(None))):
        raise TypeError(
            f"known[{owner.__name__}] has the weight {given['weight']!r}; needed an attribute's name or None"
        )
    cast = _validate.flag("cast_before_scale", given["cast_before_scale"])
    offset = _validate.weight_offset(given["weight_offset"], given["weight"])
    eps = tuple(given["eps"].split(".")) if isinstance(given["eps"], str) else _validate.eps(given["eps"])
    base = Form(given["weight"], None, offset, wide_offset=True, cast_before_scale=cast, wide=False, result=DTYPES[0])
    forms = {
        (x, w): dataclasses.replace(base, result=torch.promote_types(x, w) if cast and given["weight"] else x)
        for x in DTYPES
        for w in DTYPES
    }
    return Computation(tuple(forms.items()), given["weight"], eps, (), autocast=False)


def objection(computation: Computation, module: Any) -> str | None:
    """What this instance has that its computation, as found or as described, cannot take."""
    try:
        eps = computation.eps
        eps = functools.reduce(getattr, eps, module) if isinstance(eps, tuple) else eps
        weight = None if computation.weight is None else getattr(module, computation.weight)
    except AttributeError as error:
        return f"it does not have what known says: {error}"
    if type(eps) not in (float, int) or not 0 <= eps < math.inf:
        return f"its {'.'.join(computation.eps)} is {eps!r}; needed a number, at least 0: set it, or leave it"  # type: ignore[arg-type]
    if weight is not None and (weight.dim() != 1 or weight.dtype not in DTYPES):
        return (
            f"its weight is {weight.dtype} of shape {tuple(weight.shape)}; needed one dimension in bfloat16, float16 "
            "or float32: cast the model with model.to, or leave it"
        )
    return None
