"""The class that `patch` gives to a module of any class that computes a form of `rms_norm`: its own, but for those
calls that are proved to be `rms_norm`'s."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (Modules are any objects.)

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax

from . import _attributes, _computing, _traces
from ._api import rms_norm

ORIGINAL = "_pallas_norm_original"  # on a class made here: the class that it replaces
_MISSING = object()


def called(
    owner: type[Any],
    module: Any,
    weight: str | None,
    with_array: Callable[[Any, str | None, Any], Any],
    leaves: Callable[[Any], list[Any]],
) -> _traces.Called:
    """The module, for a trace of the call of that class; `weight` is the attribute with its only array."""

    def rebuilt(array: Any) -> Any:
        return with_array(module, weight, array)

    def held(module: Any) -> tuple[Any, list[Any]]:
        attributes = vars(module)
        return (list(attributes), _attributes.plain_attributes(module)), [*attributes.values(), *leaves(module)]

    return _traces.Called(rebuilt, owner.__call__, held)


def _only_x(signature: inspect.Signature) -> Callable[..., Any]:
    """Of the arguments of a call, self first: x where all others are their defaults, wherever it was passed."""
    (_, name), *more = enumerate(list(signature.parameters)[1:])
    defaults = {other: signature.parameters[other].default for _, other in more}

    def only_x(*arguments: Any, **named: Any) -> Any:
        if len(arguments) == 2 and not named:
            return arguments[1]
        try:
            given = signature.bind(*arguments, **named).arguments
        except TypeError:  # which its own call will say in its own words
            return _MISSING
        others = (value is defaults[other] for other, value in list(given.items())[1:] if other != name)
        return given[name] if name in given and all(others) else _MISSING

    return only_x


@functools.cache
def subclass(
    owner: type[Any],
    weight: str | None,
    computation: _computing.Computation,
    with_array: Callable[[Any, str | None, Any], Any],
    leaves: Callable[[Any], list[Any]],
) -> type[Any]:
    proofs, only_x = _computing.Proofs(computation), _only_x(inspect.signature(owner.__call__))

    def call(self: Any, /, *arguments: Any, **named: Any) -> Any:
        x = only_x(self, *arguments, **named)
        held: Any = None if weight is None else getattr(self, weight, None)
        array = held[...] if hasattr(held, "dtype") else None  # it may be None or a number since
        if isinstance(x, jax.Array) and _attributes.plain_attributes(self) == computation.read:
            eps = getattr(self, computation.eps)
            form = proofs.form(called(owner, self, weight, with_array, leaves), x, array, eps)
            if form is not None:
                return form.compute(rms_norm, x, array, eps)
        return owner.__call__(self, *arguments, **named)

    members = {"__module__": owner.__module__, "__qualname__": owner.__qualname__, ORIGINAL: owner}
    call = functools.wraps(owner.__call__)(call)
    return types.new_class(owner.__name__, (owner,), exec_body=lambda space: space.update(members, __call__=call))
