"""Subclasses of a module's class: with the hook `__init_subclass__` of its parents, or without."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from typing import Any

from torch import nn


def subclass_as_written(owner: type, members: Mapping[str, Any], parents: tuple[type, ...] = ()) -> type[Any]:
    """As a class statement makes it."""
    metaclass = {"metaclass": type(owner)}
    return types.new_class(owner.__name__, parents or (owner,), metaclass, lambda space: space.update(members))


def subclass(owner: type, members: Mapping[str, Any]) -> type[Any]:
    """One that no class hears of: a hook may register it, or need arguments. It is called when a class is made, not
    when it gets parents."""
    if inspect.getattr_static(owner, "__init_subclass__") is vars(object)["__init_subclass__"]:
        return subclass_as_written(owner, members)
    made = subclass_as_written(owner, members, (nn.Module,))
    made.__bases__ = (owner,)
    return made
