"""What a forward's code may do beside what its operators compute: nothing.

Read from the byte code, which is what runs, of forward and of all that it calls outside torch: assignments to anything
but local variables, calls of what is neither torch's nor harmless.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ._terms import Unknown

STORES = {"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_SLICE", "DELETE_ATTR", "DELETE_SUBSCR", "DELETE_GLOBAL"}
WORDS = {"STORE_ATTR": "sets the attribute", "STORE_GLOBAL": "sets the global", "DELETE_ATTR": "deletes the attribute"}
HARMLESS = {
    *(
        "float",
        "int",
        "bool",
        "len",
        "tuple",
        "list",
        "isinstance",
        "getattr",
        "hasattr",
        "min",
        "max",
        "range",
        "super",
    ),
    *("type", "abs", "zip", "sum", "enumerate", "reversed", "sorted", "map", "any", "all", "str", "repr", "property"),
}
# Of torch, what changes more than its result, or tells where it runs.
REFUSED = {
    *("manual_seed", "seed", "set_default_dtype", "set_default_device", "set_grad_enabled", "synchronize", "save"),
    *("register_buffer", "register_parameter", "register_forward_hook", "register_forward_pre_hook", "register_hook"),
    *("is_compiling", "is_dynamo_compiling", "is_scripting", "is_tracing", "is_exporting", "is_grad_enabled"),
    *("is_autocast_enabled", "get_default_dtype", "rand", "randn", "rand_like", "randn_like", "bernoulli", "dropout"),
    *("__dict__", "__class__", "_parameters", "_buffers", "data", "requires_grad_", "retain_grad", "setattr", "grad"),
}

DEVICES = {"is_cuda", "is_cpu", "device", "get_device", "cuda", "is_available", "device_count"}


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _is_torch(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return (isinstance(name, str) and (name == "torch" or name.startswith("torch."))) or value in (torch, math)


def _simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_simple, value))  # pyright: ignore[reportUnknownArgumentType]
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def _outside(function: types.FunctionType, code: types.CodeType) -> Iterator[tuple[str, Any]]:
    """The names that the code takes from its module and from around it, with what they mean."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            if name in function.__globals__:
                yield name, function.__globals__[name]
            elif hasattr(builtins, name):
                yield name, getattr(builtins, name)
        elif instruction.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF") and name in cells:
            yield name, cells[name].cell_contents


def _functions(owner: type) -> Iterator[types.FunctionType]:
    """Forward, and what it calls outside torch."""
    forward = inspect.getattr_static(owner, "forward", None)
    if not isinstance(forward, types.FunctionType):
        raise Unknown(f"is a {type(forward).__name__}, whose code cannot be read")
    functions = [forward]
    for function in functions:  # grows
        if not _is_torch(function):
            yield function
            for code in _codes(function.__code__):
                functions += [one for one in _called(owner, function, code) if one not in functions]


def check(owner: type) -> None:
    """Raises Unknown where the class's forward may do more than compute."""
    for _ in _functions(owner):
        pass


def check_devices(owner: type) -> None:
    """Raises Unknown where the class's forward asks for a device."""
    for function in _functions(owner):
        for code in _codes(function.__code__):
            if found := DEVICES & {*code.co_names}:
                raise Unknown(f"asks for {min(found)}, and may compute something else on CUDA")


def _called(owner: type, function: types.FunctionType, code: types.CodeType) -> Iterator[types.FunctionType]:
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR) and (
        code is function.__code__
    ):
        raise Unknown("is a generator or a coroutine")
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in STORES or (
            instruction.opname == "STORE_DEREF" and name in function.__code__.co_freevars
        ):
            raise Unknown(f"{WORDS.get(instruction.opname, 'writes to an item or to')} {name or 'a container'}")
        if instruction.opname == "IMPORT_NAME" and name not in ("torch", "math", "torch.nn.functional"):
            raise Unknown(f"imports {name}")
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_SUPER_ATTR") and name in REFUSED:
            raise Unknown(f"uses {name}")
    for name, value in _outside(function, code):
        if isinstance(value, types.FunctionType):
            yield value
        elif isinstance(value, type):
            if (
                value is not owner
                and not issubclass(owner, value)
                and not (name in HARMLESS or _is_torch(value) or issubclass(value, BaseException))
            ):
                raise Unknown(f"uses {name}, a class that is not torch's")
        elif not (_simple(value) or _is_torch(value) or name in HARMLESS):
            raise Unknown(f"uses {name}, of which is not known what it does")
    for name in code.co_names:
        for base in owner.__mro__:  # super() may call any of them
            method: Any = vars(base).get(name)
            if isinstance(method, property):
                method = method.fget
            method = getattr(method, "__func__", method)  # of a staticmethod or a classmethod
            if isinstance(method, types.FunctionType) and base is not nn.Module:
                yield method
