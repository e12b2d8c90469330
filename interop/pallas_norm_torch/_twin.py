"""A copy of a module with parameters of its own, which notes what its forward reads of it, and lets nothing be set."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from ._forms import ABSENT, RANKS, Path
from ._subclass import subclass
from ._terms import Unknown

Tensor = torch.Tensor
INTERNAL = {"_parameters", "_buffers", "_modules", "__class__", "training", "forward"}
SIMPLE = (bool, int, float, str, type(None), torch.dtype)


def _kind(value: Any) -> str:
    return type(value).__name__


def _is_simple(value: Any) -> bool:
    return all(isinstance(one, SIMPLE) for one in (value if isinstance(value, tuple) else (value,)))  # pyright: ignore[reportUnknownVariableType]


class Seen(Tensor):
    """An input or a parameter of a proof, of which nothing is read but what every tensor has."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore
    _is_param = False

    @staticmethod
    def of(value: Tensor) -> Any:
        """A parameter of that value."""
        made: Any = value.as_subclass(Seen)
        made._is_param = True
        return made.requires_grad_()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Unknown(f"reads {name} of a tensor, which others do not have")


class _Configuration:
    """Stands for an object that the module reads numbers from, and notes which."""

    def __init__(self, name: str, value: Any, twin: Any) -> None:
        self.__dict__.update(_name=name, _value=value, _twin=twin)
        twin.read[name, "__class__"] = type(value)  # a forward may ask whether there is one

    @property
    def __class__(self) -> Any:  # pyright: ignore  # for isinstance
        return type(self._value)  # pyright: ignore

    def __getattr__(self, name: str) -> Any:
        path = (self._name, name)
        value = self._twin.changed.get(path, getattr(self._value, name, ABSENT))
        if value is ABSENT:
            self._twin.read[path] = ABSENT
            raise AttributeError(name)
        if not isinstance(value, SIMPLE):
            raise Unknown(f"reads {'.'.join(path)}, a {type(value).__name__}")
        self._twin.read[path] = value
        return value


class Twin:
    """A copy of the module with other parameters, which notes what its forward reads of it."""

    def __init__(self, module: nn.Module, methods: Iterable[str]) -> None:
        self.module, self.read, self.changed = module, dict[Path, Any](), dict[Path, Any]()
        self.ranks, self.methods = {*RANKS}, frozenset(methods)
        self.noting, twin = False, self
        owner = type(module)

        def getattribute(self: Any, name: str) -> Any:
            value = object.__getattribute__(self, name)
            return twin.seen(name, value) if twin.noting and name not in INTERNAL else value

        def getattr_(self: Any, name: str) -> Any:
            """Of parameters, and of what is not there."""
            try:
                value = cast("Any", super(copy, self)).__getattr__(name)
            except AttributeError:
                if twin.noting:
                    twin.read[(name,)] = ABSENT
                raise
            return twin.seen(name, value) if twin.noting else value

        def setattribute(self: Any, name: str, value: Any) -> None:
            raise Unknown(f"sets the attribute {name}")

        members = {"__getattribute__": getattribute, "__getattr__": getattr_, "__setattr__": setattribute}
        copy = subclass(owner, {**members, "__module__": owner.__module__})
        self.copy: Any = object.__new__(copy)

    def seen(self, name: str, found: Any) -> Any:
        """What the forward gets for an attribute, which is noted."""
        value = self.changed.get((name,), found)
        if isinstance(value, Tensor) or name == "__dict__":  # which nn.Module's own __getattr__ reads
            return value
        if type(value) is _Configuration:  # that a property returns, which has read it
            return value
        if isinstance(value, (types.MethodType, types.FunctionType)) and name not in vars(self.module):
            if name not in self.methods and name != "__getattr__":
                raise Unknown(f"calls {name}, which its code does not name")
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
