"""The text of a class's forward, where it is the text of the code that runs, and its digest.

A file that was edited after its import has another text than the code in memory. So its text is compiled again, and
read only where that gives the very code of the method; and the names in it must mean what they say: `torch` torch.
"""

from __future__ import annotations

import ast
import builtins
import copy
import dis
import functools
import hashlib
import inspect
import sys
import textwrap
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

FindMethod = Callable[[str], "ast.FunctionDef | None"]


def bare(definition: ast.FunctionDef) -> ast.FunctionDef:
    """A copy without docstring and annotations, which compute nothing."""
    result = copy.deepcopy(definition)
    names = result.args
    for argument in (*names.posonlyargs, *names.args, *names.kwonlyargs, names.vararg, names.kwarg):
        if argument is not None:
            argument.annotation = None
    result.returns = None
    if ast.get_docstring(result) is not None:
        result.body = result.body[1:] or [ast.Pass()]
    return result


def source_of(find: FindMethod) -> str | None:
    """forward and the methods that it reaches through self, in that order; None without a forward.

    `find` gives the definition of the class's method of that name, or None.
    """
    found: dict[str, str] = {}
    names = ["forward"]
    for name in names:  # grows
        if name not in found and (definition := find(name)) is not None:
            stripped = bare(definition)
            found[name] = ast.unparse(stripped)
            names += [
                node.attr
                for node in ast.walk(stripped)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
            ]
    return "\n".join(found.values()) if "forward" in found else None


def digest(source: str) -> str:
    """The first 64 bits of SHA-256: enough against changes, which nobody makes on purpose to collide."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


# Digests of functions that call the one they wrap, unchanged: GradientCheckpointingLayer's, since 5.18 or later.
TRANSPARENT = {"5ee280b434265524"}


# --- the text is the code ---------------------------------------------------------------------------------------------


def _computes(code: types.CodeType) -> tuple[Any, ...]:
    """What of a code object decides what it does, without the lines that it came from."""
    constants = tuple(
        _computes(one) if isinstance(one, types.CodeType) else (type(one).__name__, repr(one)) for one in code.co_consts
    )
    shape = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    return code.co_name, code.co_code, constants, *shape, *names


def _inside(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _inside(constant)


@functools.lru_cache(maxsize=4)
def _compiled(text: str) -> dict[int, list[types.CodeType]]:
    """The functions of a file's text by their first line."""
    found: dict[int, list[types.CodeType]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what compiling warns of has been said at the import
        for code in _inside(compile(text, "<text>", "exec", dont_inherit=True)):
            found.setdefault(code.co_firstlineno, []).append(code)
    return found


def _read(code: types.CodeType) -> ast.FunctionDef | None:
    """Of the code itself: a function that wraps another one with functools.wraps is not that other one."""
    try:
        lines, _ = inspect.findsource(code)  # the file as it is now: it looks at the time of its last change
        statement = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
        compiled = _compiled("".join(lines)).get(code.co_firstlineno, [])
    except (OSError, TypeError, SyntaxError, ValueError, IndexError):
        return None
    if _computes(code) not in map(_computes, compiled):
        return None
    return statement if isinstance(statement, ast.FunctionDef) else None


def _defaults_are_those(function: types.FunctionType, definition: ast.FunctionDef) -> bool:
    """They are no part of the code."""
    arguments = definition.args
    written = [*arguments.defaults, *(one for one in arguments.kw_defaults if one is not None)]
    names = [one.arg for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default]
    values = [*(function.__defaults__ or ()), *((function.__kwdefaults__ or {}).get(name) for name in names)]
    try:
        return [(type(one), one) for one in map(ast.literal_eval, written)] == [(type(one), one) for one in values]
    except ValueError:  # a name, whose value may be any
        return False


def _real_modules() -> dict[str, Any]:
    modules: dict[str, Any] = {"torch": torch, "nn": nn, "F": nn.functional, "functional": nn.functional}
    activations = sys.modules.get("transformers.activations")
    return modules | ({} if activations is None else {"ACT2FN": activations.ACT2FN})


def loads(code: types.CodeType, operations: tuple[str, ...] = ("LOAD_GLOBAL", "LOAD_NAME")) -> set[str]:
    """The names that the code and the functions inside it load from their module."""
    names = {one.argval for one in dis.get_instructions(code) if one.opname in operations}
    return names.union(*(loads(inner, operations) for inner in _inside(code)))


def _names_mean_what_they_say(function: types.FunctionType) -> bool:
    real = _real_modules()
    for name in loads(function.__code__):
        value = function.__globals__.get(name, getattr(builtins, name, None))
        if name in real:
            if value is not real[name]:
                return False
        elif hasattr(builtins, name) and value is not getattr(builtins, name):
            return False
    return True


def definition_of(function: types.FunctionType) -> ast.FunctionDef | None:
    """The text of this function, or None where that is not to be had, or not what runs."""
    definition = _read(function.__code__)
    if definition is None or not _defaults_are_those(function, definition):
        return None
    return definition if _names_mean_what_they_say(function) else None


def read_source(owner: type) -> str | None:
    """source_of an imported class; None where none can be read: made with exec, edited since its import."""
    unread = False

    def find(name: str) -> ast.FunctionDef | None:
        nonlocal unread
        method = inspect.getattr_static(owner, name, None)
        if not isinstance(method, types.FunctionType) or method is inspect.getattr_static(nn.Module, name, None):
            return None
        definition = definition_of(method)
        wrapped = getattr(method, "__wrapped__", None)
        if definition is not None and wrapped is not None and digest(ast.unparse(bare(definition))) in TRANSPARENT:
            definition = definition_of(wrapped)
        unread |= definition is None
        return definition

    source = source_of(find)
    return None if unread else source


def code_digest(function: Any) -> str:
    """Of a function's code and defaults, where it has no text."""
    return digest(repr((_computes(function.__code__), function.__defaults__, function.__kwdefaults__)))


def _function(member: Any) -> Any:
    """Below a staticmethod or a classmethod."""
    return getattr(member, "__func__", member)


def fingerprint(owner: type) -> str:
    """Of the code of forward and of the methods that it may call, where they have no text."""
    names = ("forward", *helpers(owner))
    functions = [inspect.unwrap(_function(inspect.getattr_static(owner, name))) for name in names]
    return digest(repr([_computes(one.__code__) for one in functions if isinstance(one, types.FunctionType)]))


def helpers(owner: type) -> tuple[str, ...]:
    """The methods of the class's own that its forward may call through self. An instance may hide one by an attribute
    of that name."""
    forward = inspect.unwrap(inspect.getattr_static(owner, "forward"))
    found, codes = list[str](), [forward.__code__] if isinstance(forward, types.FunctionType) else []
    for code in codes:  # grows
        for name in {*code.co_names}.union(*(inner.co_names for inner in _inside(code))) - {"forward", *found}:
            method = _function(inspect.getattr_static(owner, name, None))
            if isinstance(method, types.FunctionType) and method is not inspect.getattr_static(nn.Module, name, None):
                found.append(name)
                codes.append(method.__code__)
    return tuple(sorted(found))
