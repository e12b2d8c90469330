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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import _computed, _launches
from ._classes import Row, recognise
from ._decoder_layers import fused_forward
from ._forms import Computation
from ._forwards import RESIDUAL_FORMS, ROTARY_FORMS, AddNorm
from ._qk_rope import half_of, rotary_forward, rotation_of
from ._sources import fingerprint, helpers
from ._subclass import subclass, subclass_as_written

ORIGINAL = "_pallas_norm_original"  # on a replacing class: the class that it replaces
REBUILD = "_pallas_norm_rebuild"  # and how pickle finds it again


class _Absent:
    """Hides kernel_layer_name from kernelize, which would bind the hub's kernel to the instance, over this forward."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError("kernel_layer_name")


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    rebuild, arguments = getattr(type(self), REBUILD)
    return rebuild, arguments, self.__getstate__()


def _subclass(
    owner: type, forward: Callable[..., Any], rebuild: Callable[..., Any], *arguments: Any, make: Any = subclass
) -> type[Any]:
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
    return make(owner, members)


class Residual(NamedTuple):
    """On a replacing forward: how (norm(s), s) of s = residual + hidden_states is one kernel."""

    helpers: frozenset[str]
    takes: Callable[..., bool]
    add: AddNorm


class Rotary(NamedTuple):
    """On a replacing forward: how what rotates norm(x) is one kernel with it."""

    helpers: frozenset[str]
    takes: Callable[..., bool]
    eps: str  # the attribute


def guarded(owner: Any, own: Callable[..., Any], row: Row) -> Callable[..., Any]:
    """The forward of a known class: the row's where a kernel is launched, otherwise the class's own, as it is then."""
    ours, first, hidden = row.forward, _first_parameter(own), frozenset(helpers(owner))
    methods = tuple((name, getattr(owner, name)) for name in sorted(hidden))
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
            and all(name not in members and getattr(owner, name) is method for name, method in methods)
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

    made = marked(forward, ours, hidden, takes, RESIDUAL_FORMS.get(ours))
    made.rotary = Rotary(hidden, takes, ROTARY_FORMS[ours]) if ours in ROTARY_FORMS else None
    return made


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
    return forward if isinstance(forward, str) else _rewriting(owner, forward, _new_layer)


def _rewriting(owner: type, forward: Callable[..., Any], rebuild: Callable[..., Any]) -> type[Any] | str:
    """Of a layer: made as any subclass is, because transformers' hook puts gradient checkpointing around forward."""
    try:
        return _subclass(owner, forward, rebuild, make=subclass_as_written)
    except TypeError as error:
        return f"it takes no subclass ({error}), so its steps stay steps"


def attention_class(owner: type) -> type[Any] | str:
    """The class that replaces that attention, or why there is none."""
    rotation = rotation_of(owner)
    return _attention_class(owner, inspect.getattr_static(owner, "forward", None), rotation, half_of(rotation))


@functools.cache
def _attention_class(owner: type, own: Callable[..., Any], rotation: Any, half: Any) -> type[Any] | str:
    del own, rotation, half  # which somebody may replace
    forward = rotary_forward(owner)
    return forward if isinstance(forward, str) else _rewriting(owner, forward, _new_attention)


def original(module: nn.Module) -> type | None:
    """What the module's class replaces; None where it replaces nothing."""
    return vars(type(module)).get(ORIGINAL)


def _rebuilt_by(module: nn.Module) -> Callable[..., Any] | None:
    return None if original(module) is None else vars(type(module))[REBUILD][0]


def is_layer(module: nn.Module) -> bool:
    """Whether its class replaces that of a decoder layer."""
    return _rebuilt_by(module) is _new_layer


def is_attention(module: nn.Module) -> bool:
    return _rebuilt_by(module) is _new_attention


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


def _new_attention(owner: type) -> nn.Module:
    return _new(owner, attention_class(owner))
