"""Decoder layers whose first residual addition and the norm after it become one kernel, `add_rms_norm`.

    s = round(residual + hidden)        the layer rounds here, and so does the kernel
    hidden, residual = norm(s), s

A layer is known by the statements of its forward, whatever its parameters are called and in whatever order they come:
what its own forward hands to attention by name is handed on by the same names.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._sources import definition_of

BODY = """\
residual = hidden_states
hidden_states = self.input_layernorm(hidden_states)
hidden_states, _ = self.self_attn(hidden_states=hidden_states)
hidden_states = residual + hidden_states
residual = hidden_states
hidden_states = self.post_attention_layernorm(hidden_states)
hidden_states = self.mlp(hidden_states)
hidden_states = residual + hidden_states
return hidden_states"""
"""Llama's layer and 70 more of 5.24, without what attention is given beside hidden_states."""

UNKNOWN = "its forward is not that of a known decoder layer, so its addition stays outside the norm"
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


def _does_only_its_forward(norm: nn.Module, form: Any) -> bool:
    """Whether calling the norm would do nothing but what its replaced forward does, which the residual form repeats."""
    members = norm.__dict__
    return (
        "forward" not in members  # bound to the instance: accelerate's hooks, anybody's function
        and members.get("_compiled_call_impl") is None
        and type(norm).__call__ is nn.Module.__call__
        and form.helpers.isdisjoint(members)
        and not any(members[name] for name in HOOKS)
        and not any(MODULE_HOOKS)
    )


def _add_norm(
    norm: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(s), s); in two steps where the norm has been restored, where its own call would do more, and where no
    kernel is launched."""
    form = getattr(type(norm).forward, "residual", None)
    if (
        form is not None
        and hidden_states.dtype == residual.dtype
        and hidden_states.shape == residual.shape
        and _does_only_its_forward(norm, form)
        and form.takes(norm, hidden_states, residual)
    ):
        return form.add(norm, hidden_states, residual)
    residual = residual + hidden_states
    return norm(residual), residual


def _handed_on(definition: ast.FunctionDef) -> tuple[str, ...] | None:
    """The parameters that this forward hands to attention by their own names, all beside hidden_states; None where it
    is not BODY."""
    kwargs = definition.args.kwarg
    parameters = [one.arg for one in (*definition.args.posonlyargs, *definition.args.args)][1:]
    if definition.args.kwonlyargs or definition.args.vararg or parameters[:1] != ["hidden_states"]:
        return None
    names, starred = list[str](), False
    for node in (one for statement in definition.body for one in ast.walk(statement)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name("self"), attr="self_attn"), keywords=[first, *keywords]):
                node.keywords = [first]
                for keyword in keywords:
                    match keyword:
                        case ast.keyword(arg=str(name), value=ast.Name(id)) if name == id and name in parameters:
                            names.append(name)
                        case ast.keyword(arg=None, value=ast.Name(id)) if kwargs and id == kwargs.arg:
                            starred = True
                        case _:
                            return None
            case _:
                pass
    if starred is not bool(kwargs) or ast.unparse(ast.Module(_statements(definition), [])) != BODY:
        return None
    return tuple(names) if {*parameters[1:]} == {*names} else None


def _statements(definition: ast.FunctionDef) -> list[ast.stmt]:
    return definition.body[1:] if ast.get_docstring(definition) is not None else definition.body


def _fused(forward: types.FunctionType, names: tuple[str, ...]) -> Callable[..., torch.Tensor]:
    """That forward with the two steps in one."""
    parameters = [one for one in inspect.signature(forward).parameters.values() if one.kind is not one.VAR_KEYWORD]
    positions = tuple(one.name for one in parameters[2:])
    defaults = {one.name: one.default for one in parameters[2:] if one.default is not one.empty}

    @functools.wraps(forward)
    def fused(self: Any, hidden_states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        if len(arguments) > len(positions):
            raise TypeError(f"{len(arguments) + 2} positional arguments; {len(positions) + 2} are taken")
        given = {**defaults, **dict(zip(positions, arguments, strict=False)), **named}
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
        hidden_states, _ = self.self_attn(hidden_states=hidden_states, **given)
        hidden_states, residual = _add_norm(self.post_attention_layernorm, hidden_states, residual)
        return residual + self.mlp(hidden_states)

    return fused


def _with_cell(wrapper: types.FunctionType, inner: Callable[..., Any], outer: Callable[..., Any]) -> Any:
    """That wrapper around another function: its own code, as a decorator of transformers renames a parameter."""
    cells = [types.CellType(outer) if cell.cell_contents is inner else cell for cell in wrapper.__closure__ or ()]
    copied = types.FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, tuple(cells)
    )
    copied.__kwdefaults__ = wrapper.__kwdefaults__
    return functools.update_wrapper(copied, outer)


def _fuse(forward: Any) -> Callable[..., torch.Tensor] | None:
    inner = getattr(forward, "__wrapped__", None)
    if not isinstance(forward, types.FunctionType):
        return None
    if inner is not None:
        held = [cell.cell_contents for cell in forward.__closure__ or ()]
        fused = _fuse(inner) if any(value is inner for value in held) else None
        return None if fused is None else _with_cell(forward, inner, fused)
    definition = definition_of(forward)
    names = None if definition is None else _handed_on(definition)
    return None if names is None else _fused(forward, names)


def fused_forward(owner: type) -> Callable[..., torch.Tensor] | str:
    """The forward of that decoder layer with the two steps in one, or why there is none."""
    return _fuse(inspect.getattr_static(owner, "forward", None)) or UNKNOWN
