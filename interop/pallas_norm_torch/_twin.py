"""A copy of a module with parameters of its own, which notes what its forward reads of it, and lets nothing be set."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ._forms import RANKS, Path
from ._terms import Unknown

Tensor = torch.Tensor
INTERNAL = {"_parameters", "_buffers", "_modules", "__class__", "training", "forward"}
SIMPLE = (bool, int, float, str, type(None), torch.dtype)


def _kind(value: Any) -> str:
    return type(value).__name__


def _is_simple(value: Any) -> bool:
    return all(isinstance(one, SIMPLE) for one in (value if isinstance(value, tuple) else (value,)))  # pyright: ignore[reportUnknownVariableType]


class _Configuration:
    """Stands for an object that the module reads numbers from, and notes which."""

    def __init__(self, name: str, value: Any, twin: Any) -> None:
        self.__dict__.update(_name=name, _value=value, _twin=twin)

    def __getattr__(self, name: str) -> Any:
        path = (self._name, name)
        value = self._twin.changed.get(path, getattr(self._value, name))
        if not isinstance(value, SIMPLE):
            raise Unknown(f"reads {'.'.join(path)}, a {type(value).__name__}")
        self._twin.read[path] = value
        return value


class Twin:
    """A copy of the module with other parameters, which notes what its forward reads of it."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.read, self.changed = module, dict[Path, Any](), dict[Path, Any]()
        self.ranks = {*RANKS}
        self.noting, twin = False, self
        owner = type(module)

        def getattribute(self: Any, name: str) -> Any:
            value = object.__getattribute__(self, name)
            return twin.seen(name, value) if twin.noting and name not in INTERNAL else value

        def setattribute(self: Any, name: str, value: Any) -> None:
            raise Unknown(f"sets the attribute {name}")

        members = {"__getattribute__": getattribute, "__setattr__": setattribute, "__module__": owner.__module__}
        copy = types.new_class(owner.__name__, (owner,), exec_body=lambda space: space.update(members))
        self.copy: Any = object.__new__(copy)

    def seen(self, name: str, found: Any) -> Any:
        """What the forward gets for an attribute, which is noted."""
        value = self.changed.get((name,), found)
        of_the_class = isinstance(value, (types.MethodType, types.FunctionType)) and name not in vars(self.module)
        if of_the_class or isinstance(value, Tensor) or name.startswith("__"):
            return value
        if _is_simple(value):
            self.read[(name,)] = value
            return value
        if callable(value) or _kind(value) in ("list", "dict", "set"):
            raise Unknown(f"reads its attribute {name}, a {_kind(value)}")
        return _Configuration(name, value, self)

    def set(self, parameters: Mapping[str, Tensor | None], *, training: bool) -> None:
        vars(self.copy).clear()
        vars(self.copy).update(vars(self.module))
        names = vars(self.module)["_parameters"], vars(self.module)["_buffers"]
        own, buffers = ({name: parameters.get(name) for name in one} for one in names)
        vars(self.copy).update(_parameters=own, _buffers=buffers, training=training)

    def forward(self, x: Tensor) -> Any:
        self.noting = True
        try:
            return type(self.module).forward(self.copy, x)
        finally:
            self.noting = False
