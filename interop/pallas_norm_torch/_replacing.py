"""The classes that replaced modules get: a subclass of their own that overrides forward.

Why the class, and not the instance's `forward`: pickle looks a bound method up by its name and finds the class's;
kernelize, accelerate and Liger write that attribute too, and the last of them wins. The class is what copying, pickling
and torch.compile's guards go by already; isinstance and the name still hold; parameters, buffers and hooks stay where
they are; and giving the class back leaves nothing behind.

The new forward computes where a kernel is launched, and where the module is still as it was recognised; everywhere else
it calls the class's own.
"""

from __future__ import annotations

import functools
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import _computed, _launches
from ._classes import Row, recognise
from ._decoder_layers import fused_forward
from ._forms import Computation
from ._forwards import RESIDUAL_FORMS, AddNorm
from ._sources import fingerprint, helpers

ORIGINAL = "_pallas_norm_original"  # on a replacing class: the class that it replaces
REBUILD = "_pallas_norm_rebuild"  # and how pickle finds it again


class _Absent:
    """Hides kernel_layer_name from kernelize, which would bind the hub's kernel to the instance, over this forward."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError("kernel_layer_name")


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    rebuild, arguments = getattr(type(self), REBUILD)
    return rebuild, arguments, self.__getstate__()


def _subclass(owner: type, forward: Callable[..., Any], rebuild: Callable[..., Any], *arguments: Any) -> type[Any]:
    members = {
        "__module__": owner.__module__,
        "__qualname__": owner.__qualname__,
        "__doc__": owner.__doc__,
        "__reduce_ex__": _reduce,
        "kernel_layer_name": _Absent(),
        "forward": forward,
        ORIGINAL: owner,
        REBUILD: (rebuild, (owner, *arguments)),
    }
    return types.new_class(owner.__name__, (owner,), exec_body=lambda namespace: namespace.update(members))


class Residual(NamedTuple):
    """On a replacing forward: how (norm(s), s) of s = residual + hidden_states is one kernel."""

    helpers: frozenset[str]
    takes: Callable[..., bool]
    add: AddNorm


def guarded(owner: Any, own: Callable[..., Any], row: Row) -> Callable[..., Any]:
    """The forward of a known class: the row's where a kernel is launched, otherwise the class's own, as it is then."""
    ours, first, hidden = row.forward, _first_parameter(own), frozenset(helpers(owner))
    assert ours is not None

    def takes(self: Any, x: Any, *gates: Any) -> bool:
        members = self.__dict__
        weight = members["_parameters"].get("weight")
        if weight is None:  # there is none, or torch.func or a parametrization has put it elsewhere
            weight = getattr(self, "weight", None)
        eps = getattr(self, row.eps, None)
        return (
            (row.torch_eps if eps is None else type(eps) in (float, int) and eps >= 0)
            and _launches.launched(x, weight, *gates)
            and owner.forward is own
            and all(name not in members for name in hidden)  # isdisjoint ends a compiled graph of torch 2.11
            and not (row.autocast and torch.is_autocast_enabled(x.device.type))
        )

    @functools.wraps(own)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        if len(arguments) == 1 and not named:
            (x,) = arguments
            return ours(self, x) if takes(self, x) else owner.forward(self, x)
        operands = arguments if arguments else (named.get(first),)
        gates = [value for name, value in named.items() if name != first]
        if takes(self, *operands, *gates):
            return ours(self, *arguments, **named)
        return owner.forward(self, *arguments, **named)

    return marked(forward, ours, hidden, takes, RESIDUAL_FORMS.get(ours))


def marked(
    forward: Any, ours: Callable[..., Any], hidden: frozenset[str], takes: Callable[..., bool], add: AddNorm | None
) -> Any:
    """With what computes instead of the class's own, and its residual form."""
    forward.ours, forward.residual = ours, None if add is None else Residual(hidden, takes, add)
    return forward


def _first_parameter(forward: Callable[..., Any]) -> str:
    return list(inspect.signature(forward).parameters)[1]


@functools.cache
def _norm_class(owner: type, own: Callable[..., Any], row: Row) -> type[nn.Module]:
    return _subclass(owner, guarded(owner, own, row), _new_norm)


def norm_class(owner: type, row: Row) -> type[nn.Module]:
    """The class that replaces the norm `owner`, whose row this is."""
    return _norm_class(owner, inspect.getattr_static(owner, "forward"), row)


@functools.cache
def _computed_class(owner: type, own: Callable[..., Any], computation: Computation) -> type[nn.Module]:
    hidden = frozenset(helpers(owner))
    functions = _computed.Functions(owner, own, hidden, computation)
    forward = _computed.replacing(owner, own, functions)
    marked(forward, functions.forward, hidden, functions.takes, functions.add)
    return _subclass(owner, forward, _new_computed, computation, fingerprint(owner))


def computed_class(owner: type, computation: Computation) -> type[nn.Module]:
    """The class that replaces the norm `owner` where it computes this."""
    return _computed_class(owner, inspect.getattr_static(owner, "forward"), computation)


def layer_class(owner: type) -> type[Any] | str:
    """The class that replaces the decoder layer `owner`, or why there is none."""
    return _layer_class(owner, inspect.getattr_static(owner, "forward", None))


@functools.cache
def _layer_class(owner: type, own: Callable[..., Any]) -> type[Any] | str:
    del own  # what was recognised, which somebody may replace
    forward = fused_forward(owner)
    return forward if isinstance(forward, str) else _subclass(owner, forward, _new_layer)


def original(module: nn.Module) -> type | None:
    """What the module's class replaces; None where it replaces nothing."""
    return vars(type(module)).get(ORIGINAL)


def is_fused(module: nn.Module) -> bool:
    return original(module) is not None and vars(type(module))[REBUILD][0] is _new_layer


def _new(owner: type, replacing: type[nn.Module] | str) -> nn.Module:
    if not isinstance(replacing, type):
        raise pickle.UnpicklingError(
            f"the pickle holds a patched {owner.__name__}, but here {replacing}; needed the "
            "version of its package that wrote the pickle, or a pickle of the model after unpatch"
        )
    return object.__new__(replacing)


def _new_norm(owner: type) -> nn.Module:
    """For pickle and deepcopy, as the next."""
    row = recognise(owner)
    return _new(owner, norm_class(owner, row) if isinstance(row, Row) else row or "its forward is another")


def _new_computed(owner: type, computation: Computation, code: str) -> nn.Module:
    other = "the code of its forward is other code"
    return _new(owner, computed_class(owner, computation) if fingerprint(owner) == code else other)


def _new_layer(owner: type) -> nn.Module:
    return _new(owner, layer_class(owner))
