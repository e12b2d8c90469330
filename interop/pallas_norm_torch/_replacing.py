"""The classes that replaced modules get: a subclass of their own that overrides forward.

Why the class, and not the instance's `forward`: pickle looks a bound method up by its name and finds the class's;
kernelize, accelerate and Liger write that attribute too, and the last of them wins. The class is what copying, pickling
and torch.compile's guards go by already; isinstance and the name still hold; parameters, buffers and hooks stay where
they are; and giving the class back leaves nothing behind.
"""

from __future__ import annotations

import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ._classes import Row, recognise
from ._decoder_layers import fused_forward

ORIGINAL = "_pallas_norm_original"  # on a replacing class: the class that it replaces
REBUILD = "_pallas_norm_rebuild"  # and how pickle finds it again


class _Absent:
    """Hides kernel_layer_name from kernelize, which would bind the hub's kernel to the instance, over this forward."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        raise AttributeError("kernel_layer_name")


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    rebuild, arguments = getattr(type(self), REBUILD)
    return rebuild, arguments, self.__getstate__()


@functools.cache
def _subclass(
    owner: type, forward: Callable[..., Any], rebuild: Callable[..., Any], arguments: tuple[Any, ...]
) -> type[nn.Module]:
    members = {
        "__module__": owner.__module__,
        "__qualname__": owner.__qualname__,
        "__doc__": owner.__doc__,
        "__reduce_ex__": _reduce,
        "kernel_layer_name": _Absent(),
        "forward": forward,
        ORIGINAL: owner,
        REBUILD: (rebuild, arguments),
    }
    return types.new_class(owner.__name__, (owner,), exec_body=lambda namespace: namespace.update(members))


def norm_class(owner: type, row: Row) -> type[nn.Module]:
    """The class that replaces the norm `owner`, whose row this is."""
    assert row.forward is not None
    return _subclass(owner, row.forward, _new_norm, (owner,))


def layer_class(owner: type) -> type[nn.Module] | str:
    """The class that replaces the decoder layer `owner`, or why there is none."""
    forward = fused_forward(owner)
    return forward if isinstance(forward, str) else _subclass(owner, forward, _new_layer, (owner,))


def original(module: nn.Module) -> type | None:
    """What the module's class replaces; None where it replaces nothing."""
    return vars(type(module)).get(ORIGINAL)


def is_fused(module: nn.Module) -> bool:
    return original(module) is not None and vars(type(module))[REBUILD][0] is _new_layer


def _new(owner: type, replacing: type[nn.Module] | str | None) -> nn.Module:
    if not isinstance(replacing, type):
        raise pickle.UnpicklingError(
            f"the pickle holds a patched {owner.__name__}, but here {replacing or 'it is no RMSNorm'}; needed the "
            "version of its package that wrote the pickle, or a pickle of the model after unpatch"
        )
    return object.__new__(replacing)


def _new_norm(owner: type) -> nn.Module:
    """For pickle and deepcopy, as the next."""
    row = recognise(owner)
    return _new(owner, norm_class(owner, row) if isinstance(row, Row) else row)


def _new_layer(owner: type) -> nn.Module:
    return _new(owner, layer_class(owner))
