"""Layers in which a residual addition and the norm after it become one kernel, `add_rms_norm`.

    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)

become `hidden_states, residual = add_norm(self.post_attention_layernorm, residual, hidden_states)`, which rounds the
sum as the layer does. Such statements are looked for in the forward of the class, whatever its names are and whatever
else it does: Llama's layer has them once, and so have those with a norm behind each sublayer (Gemma 2 and 3, GLM 4).
The rest of the forward runs as it is written.
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ._sources import bare, definition_of

UNKNOWN = (
    "its forward adds nothing just before a norm, or asks for gradients, or its source cannot be read, so no addition "
    "goes into a norm"
)
MODULE_HOOKS = tuple(
    getattr(torch.nn.modules.module, name)  # the dicts themselves, which stay the same objects
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def does_only_its_forward(norm: nn.Module, form: Any) -> bool:
    """Whether calling the norm would do nothing but what its replaced forward does, which the residual form repeats."""
    members = norm.__dict__
    return (
        "forward" not in members  # bound to the instance: accelerate's hooks, anybody's function
        and members.get("_compiled_call_impl") is None
        and type(norm).__call__ is nn.Module.__call__
        and all(name not in members for name in form.helpers)
        and not any(members[name] for name in HOOKS)
        and not any(MODULE_HOOKS)
    )


def add_norm(norm: nn.Module, left: Any, right: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(s), s) of s = left + right; in two steps where the norm has been restored, where its own call would do
    more, and where no kernel is launched."""
    form = getattr(getattr(type(norm), "forward", None), "residual", None)
    if (
        form is not None
        and isinstance(left, torch.Tensor)  # what a layer adds may be a number, as a first residual of 0
        and isinstance(right, torch.Tensor)
        and left.dtype == right.dtype
        and left.shape == right.shape
        and does_only_its_forward(norm, form)
        and form.takes(norm, right, left)
    ):
        return form.add(norm, right, left)
    s = left + right
    return norm(s), s


# --- the statements ---------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Two statements, or three, of a list: where they end, what replaces them, and the attribute that is the norm."""

    end: int
    instead: list[ast.stmt]
    norm: str


def assigned(statement: ast.stmt) -> tuple[str, ast.expr] | None:
    match statement:
        case ast.Assign(targets=[ast.Name(name)], value=value):
            return name, value
        case _:
            return None


def _found(statements: list[ast.stmt], at: int) -> Found | None:
    """total = left + right; in some layers another = total; y = self.norm(total), or of the other name."""
    match assigned(statements[at]):
        case (total, ast.BinOp(left, ast.Add(), right)):
            pass
        case _:
            return None
    names, end = {total}, at + 1
    match assigned(statements[end]) if end < len(statements) else None:
        case (another, ast.Name(source)) if source == total:
            names.add(another)
            end += 1
        case _:
            another = total
    match assigned(statements[end]) if end < len(statements) else None:
        case (y, ast.Call(ast.Attribute(ast.Name("self"), attr) as norm, [ast.Name(operand)], [])) if operand in names:
            pass
        case _:
            return None
    kept = [name for name in dict.fromkeys((total, another)) if name != y]
    if not kept:  # the sum is not needed again
        return None
    targets = ast.Tuple([ast.Name(name, ast.Store()) for name in (y, kept[0])], ast.Store())
    call = ast.Call(ast.Name(ADD_NORM, ast.Load()), [norm, left, right], [])
    names_again = [ast.Assign([ast.Name(name, ast.Store())], ast.Name(kept[0], ast.Load())) for name in kept[1:]]
    instead = [ast.copy_location(one, statements[at]) for one in (ast.Assign([targets], call), *names_again)]
    return Found(end + 1, [*map(ast.fix_missing_locations, instead)], attr)


def lists_of(statements: list[ast.stmt]) -> Iterator[list[ast.stmt]]:
    """That list and those of the blocks inside it, without those of functions."""
    yield statements
    for statement in statements:
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from lists_of(getattr(statement, field, []))


ADD_NORM = "_pallas_norm_add_norm"
# What a forward may ask of the sum's gradient. In one kernel the norm reads the sum before autograd has it, so that
# gradient has no part of the norm's.
GRADIENTS = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook", "grad", "grad_fn", "autograd"}


def _fuse_statements(definition: ast.FunctionDef) -> tuple[str, ...]:
    """In place; the attributes that are the norms."""
    norms = list[str]()
    if any(isinstance(node, ast.Attribute) and node.attr in GRADIENTS for node in ast.walk(definition)):
        return ()
    for statements in [*lists_of(definition.body)]:
        for at in range(len(statements) - 1, -1, -1):
            if (found := _found(statements, at)) is not None:
                statements[at : found.end] = found.instead
                norms.insert(0, found.norm)
    return tuple(norms)


class Rewrite(NamedTuple):
    """`statements` changes a forward in place to call `functions` by these names, and returns the attributes and names
    that it has found; nothing where it finds none."""

    functions: dict[str, Callable[..., Any]]
    statements: Callable[[ast.FunctionDef], tuple[str, ...]]


def _compiled(forward: types.FunctionType, definition: ast.FunctionDef, rewrite: Rewrite) -> types.FunctionType:
    """That function of another text, with the globals, defaults and lines of its own."""
    definition.decorator_list, definition.args.defaults = [], []
    definition.args.kw_defaults = [None] * len(definition.args.kw_defaults)
    makes = ast.parse(f"def makes({', '.join(rewrite.functions)}):\n    return {definition.name}")
    ast.increment_lineno(definition, forward.__code__.co_firstlineno - 1)
    makes.body[0].body.insert(0, definition)  # pyright: ignore[reportAttributeAccessIssue]
    space: dict[str, Any] = {}
    exec(compile(makes, forward.__code__.co_filename, "exec", dont_inherit=True), forward.__globals__, space)
    made: types.FunctionType = space["makes"](**rewrite.functions)
    made.__defaults__, made.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
    functools.update_wrapper(made, forward)
    return made


def _renamed(name: str) -> bool:
    """Whether a class has made it of a name like __x."""
    return name.startswith("_") and not name.startswith("__") and "__" in name


def _rewritten(forward: types.FunctionType, rewrite: Rewrite) -> types.FunctionType | None:
    definition = definition_of(forward)
    # What is free, such as super's class, and what a class renames would be lost outside it.
    names = (*forward.__code__.co_names, *forward.__code__.co_varnames)
    if definition is None or forward.__code__.co_freevars or any(map(_renamed, names)):
        return None
    definition = bare(copy.deepcopy(definition))
    norms = rewrite.statements(definition)
    if not norms:
        return None
    made = _compiled(forward, definition, rewrite)
    made.norms = norms  # pyright: ignore[reportFunctionMemberAccess]
    return made


def _with_cell(wrapper: types.FunctionType, inner: Callable[..., Any], outer: Callable[..., Any]) -> Any:
    """That wrapper around another function: its own code, as a decorator of transformers renames a parameter."""
    cells = [types.CellType(outer) if cell.cell_contents is inner else cell for cell in wrapper.__closure__ or ()]
    copied = types.FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells)
    )
    copied.__kwdefaults__ = wrapper.__kwdefaults__
    return functools.update_wrapper(copied, outer)


def rewritten(forward: Any, rewrite: Rewrite) -> Callable[..., torch.Tensor] | None:
    inner = getattr(forward, "__wrapped__", None)
    if not isinstance(forward, types.FunctionType):
        return None
    if inner is not None:
        held = [cell.cell_contents for cell in forward.__closure__ or ()]
        fused = rewritten(inner, rewrite) if any(value is inner for value in held) else None
        return None if fused is None else _with_cell(forward, inner, fused)
    return _rewritten(forward, rewrite)


def fused_forward(owner: type) -> Callable[..., torch.Tensor] | str:
    """The forward of that layer with the two steps in one, whose `norms` are the attributes that it takes in; or why
    there is none."""
    rewrite = Rewrite({ADD_NORM: add_norm}, _fuse_statements)
    return rewritten(inspect.getattr_static(owner, "forward", None), rewrite) or UNKNOWN
