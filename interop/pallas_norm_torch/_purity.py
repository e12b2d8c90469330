"""What a forward's code may do beside what its operators compute: nothing.

Read from the byte code, which is what runs, of forward and of all that it calls outside torch: assignments to anything
but local variables, calls of what is neither torch's nor harmless, names that tell more of torch than a proof looks at.
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
from ._words import refused, refused_value

STORES = {"STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "STORE_SLICE", "DELETE_ATTR", "DELETE_SUBSCR", "DELETE_GLOBAL"}
WORDS = {"STORE_ATTR": "sets the attribute", "STORE_GLOBAL": "sets the global", "DELETE_ATTR": "deletes the attribute"}
HARMLESS = {
    *("float", "int", "bool", "len", "tuple", "list", "isinstance", "getattr", "hasattr", "min", "max", "range"),
    *("super", "abs", "zip", "sum", "enumerate", "reversed", "sorted", "map", "any", "all", "str", "repr", "property"),
}
CHOOSING = {"int", "bool", "min", "max", "range", "any", "all", "sorted", "map", "floor", "ceil", "trunc"}
COMPARES = {"COMPARE_OP", "CONTAINS_OP", "IS_OP", "FOR_ITER", "UNARY_NOT"}
ROUNDS = {"//", "%", ">>", "<<", "&", "|", "^", "divmod"}
BY_NAME = {"getattr", "hasattr"}
LOADS = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_SUPER_ATTR", "IMPORT_FROM"}
DEVICES = {"is_cuda", "is_cpu", "device", "get_device", "cuda", "is_available", "device_count"}


def codes_of(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes_of(constant)


def texts_of(code: types.CodeType) -> tuple[str, ...]:
    """Attributes that the code may name in a text, for getattr or hasattr."""
    if BY_NAME.isdisjoint(code.co_names):
        return ()
    return tuple(one for one in code.co_consts if isinstance(one, str) and one.isidentifier())


def names_of(code: types.CodeType) -> tuple[str, ...]:
    """Attributes that the code may read: by their names, by texts, and, if it is there, by this method."""
    return (*code.co_names, *texts_of(code), "__getattr__")


def _is_torch(value: Any) -> bool:
    name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
    return (isinstance(name, str) and (name == "torch" or name.startswith("torch."))) or value in (torch, math)


def simple(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(simple, value))  # pyright: ignore[reportUnknownArgumentType]
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device))


def meanings(function: types.FunctionType, code: types.CodeType) -> Iterator[tuple[str, Any, Any]]:
    """The names that the code takes from its module and from around it, what they mean, and where that is said: the
    function for its module, a cell, None for what Python has."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for instruction in dis.get_instructions(code):
        name = instruction.argval
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            if name in function.__globals__:
                yield name, function.__globals__[name], function
            elif hasattr(builtins, name):
                yield name, getattr(builtins, name), None
        elif instruction.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF") and name in cells:
            yield name, cells[name].cell_contents, cells[name]


def members(owner: type, name: str) -> Iterator[tuple[type, Any]]:
    """What the classes that super() may call have by that name, but for torch's own of every module."""
    for base in owner.__mro__:
        if base not in (nn.Module, object) and name in vars(base):
            yield base, vars(base)[name]


def functions_of(owner: type) -> Iterator[types.FunctionType]:
    """Forward, and what it calls outside torch. Raises Unknown where it may do more than compute."""
    forward = inspect.getattr_static(owner, "forward", None)
    if not isinstance(forward, types.FunctionType):
        raise Unknown(f"is a {type(forward).__name__}, whose code cannot be read")
    if [*members(owner, "__getattribute__")]:
        raise Unknown("reads attributes by a __getattribute__ of its own")
    functions = [forward]
    for function in functions:  # grows
        if not _is_torch(function):
            yield function
            _check_defaults(function)
            for code in codes_of(function.__code__):
                functions += [one for one in _called(owner, function, code) if one not in functions]


def methods_of(owner: type) -> frozenset[str]:
    """The members of the class that this code names, which have been looked into."""
    codes = [code for function in functions_of(owner) for code in codes_of(function.__code__)]
    return frozenset(name for code in codes for name in names_of(code) if [*members(owner, name)])


def may_branch(owner: type) -> bool:
    """Whether the code may take another way for another size: it compares, jumps, or rounds numbers."""
    for function in functions_of(owner):
        for code in codes_of(function.__code__):
            if not CHOOSING.isdisjoint(code.co_names):
                return True
            for one in dis.get_instructions(code):
                if "JUMP" in one.opname or one.opname in COMPARES or one.argrepr.rstrip("=") in ROUNDS:
                    return True
    return False


def check_devices(owner: type) -> None:
    """Raises Unknown where the class's forward asks for a device."""
    for function in functions_of(owner):
        for code in codes_of(function.__code__):
            if found := DEVICES & {*code.co_names, *texts_of(code)}:
                raise Unknown(f"asks for {min(found)}, and may compute something else on CUDA")


def _names_a_text(instructions: list[dis.Instruction], at: int) -> bool:
    """Whether the call of getattr or hasattr that is loaded there has a constant as its second argument: by the depth
    of the stack above the function, instruction by instruction."""
    depth, named = 0, False
    for one in instructions[at + 1 :]:
        if one.opname in ("PRECALL", "CALL") and depth == one.arg:
            return named
        effect = dis.stack_effect(one.opcode, one.arg, jump=False)
        if named:
            if depth + effect < 3:  # something is done to the name
                return False
        elif depth == 1 and effect > 0:
            if one.opname != "LOAD_CONST" or not isinstance(one.argval, str):
                return False
            named = True
        depth += effect
    return False


def _check_defaults(function: types.FunctionType) -> None:
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        if not (simple(value) or _is_torch(value)):
            raise Unknown(f"has a {type(value).__name__} as a default of {function.__name__}, which may keep things")


def _check_instructions(function: types.FunctionType, code: types.CodeType) -> None:
    instructions = [*dis.get_instructions(code)]
    for at, instruction in enumerate(instructions):
        name = instruction.argval
        if instruction.opname == "LOAD_GLOBAL" and name in BY_NAME and not _names_a_text(instructions, at):
            raise Unknown(f"calls {name} with a name that is no constant")
        if instruction.opname in STORES or (
            instruction.opname == "STORE_DEREF" and name in function.__code__.co_freevars
        ):
            raise Unknown(f"{WORDS.get(instruction.opname, 'writes to an item or to')} {name or 'a container'}")
        if instruction.opname == "IMPORT_NAME" and name not in ("torch", "math", "torch.nn.functional"):
            raise Unknown(f"imports {name}")
        if instruction.opname in LOADS and refused(name):
            raise Unknown(f"uses {name}")
    for name in texts_of(code):
        if refused(name):
            raise Unknown(f"uses {name}")


def _called(owner: type, function: types.FunctionType, code: types.CodeType) -> Iterator[types.FunctionType]:
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR) and (
        code is function.__code__
    ):
        raise Unknown("is a generator or a coroutine")
    _check_instructions(function, code)
    for name, value, _ in meanings(function, code):
        if isinstance(value, types.FunctionType) and not _is_torch(value):
            yield value
        elif isinstance(value, type):
            if (
                value is not owner
                and not issubclass(owner, value)
                and not (name in HARMLESS or _is_torch(value) or issubclass(value, BaseException))
            ):
                raise Unknown(f"uses {name}, a class that is not torch's")
        elif not (simple(value) or _is_torch(value) or name in HARMLESS):
            raise Unknown(f"uses {name}, of which is not known what it does")
        if _is_torch(value) and refused_value(value):
            raise Unknown(f"uses {getattr(value, '__name__', name)}")
    for name in names_of(code):
        for _, method in members(owner, name):
            yield from _function(name, method)


def _function(name: str, member: Any) -> Iterator[types.FunctionType]:
    """Of a member of the class that the code names."""
    member = member.fget if isinstance(member, property) else member
    function = getattr(member, "__func__", member)  # of a staticmethod or a classmethod
    if isinstance(function, types.FunctionType):
        yield function
    elif not (simple(function) or _is_torch(function)):
        raise Unknown(f"may read {name} of its class, a {type(function).__name__}")
