"""Attention in which the norms of q and k and the rotary embedding become one kernel, `rms_norm_rope`.

    query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

Qwen3's. The two norms go where the rotation is, past statements that do not use their results and leave memory as it
is, and the rotation's angles are two names; the rest of the forward runs as it is written. A norm of what is no plain
linear layer's stays at its place where another module is called in between. apply_rotary_pos_emb must be
the function of transformers that rotates whole heads.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import _launches
from ._decoder_layers import HOOKS, Rewrite, does_only_its_forward, rewritten
from ._qk_statements import AT_ITS_PLACE, NORM_ROPE, fuse_statements
from ._sources import bare, definition_of, digest
from .rope import rms_norm_rope

UNKNOWN = (
    "its forward does not normalise q and k, swap positions and heads, and rotate both with one function and nothing "
    "in between that may write to them, or its source cannot be read, so the norms and the rotation stay steps"
)
OTHER_ROTATION = "its {} is not the function of transformers that rotates whole heads, so the norms stay outside of it"

# Digests of apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1) and of rotate_half, in transformers 5.17 to 5.24.
ROTATIONS, HALVES = {"f0e978aab1df6bb0"}, {"7b6c9b425ca04287"}


def _digest(function: Any) -> str | None:
    definition = definition_of(function) if isinstance(function, types.FunctionType) else None
    return None if definition is None else digest(ast.unparse(bare(definition)))


def half_of(function: Any) -> Any:
    """The rotate_half that a function would call now."""
    return getattr(function, "__globals__", {}).get("rotate_half")


def rotates_heads(function: Any) -> bool:
    """Whether a function is transformers' own, whose rotate_half is."""
    return _digest(function) in ROTATIONS and _digest(half_of(function)) in HALVES


class Normalised(NamedTuple):
    """What has been normalised where the class's own forward does that, with positions and heads swapped."""

    x: torch.Tensor


WITH_OWN_MEMORY = {"transformers", "bitsandbytes"}  # whose linear layers return memory of their own, as torch's do


def _returns_memory_of_its_own(module: Any) -> bool:
    """Whether nobody else holds what a call returns: an engine's linear layer may write to a buffer that the next one
    writes to again."""
    if not isinstance(module, nn.Linear):
        return False
    owner = type(module)
    return (
        (owner.forward is nn.Linear.forward or owner.__module__.partition(".")[0] in WITH_OWN_MEMORY)
        and owner.__call__ is nn.Module.__call__
        and "forward" not in module.__dict__
        and not any(module.__dict__[name] for name in HOOKS)
    )


def at_its_place(norm: Any, module: Any, x: torch.Tensor) -> torch.Tensor | Normalised:
    """What the rotation gets of x, which that module has returned: x, to be normalised there, or, where what is called
    in between might write to it, its norm."""
    return x if _returns_memory_of_its_own(module) else Normalised(norm(x).transpose(1, 2))


def _step(norm: Any, x: torch.Tensor | Normalised) -> torch.Tensor:
    return x.x if isinstance(x, Normalised) else norm(x).transpose(1, 2)


def norm_rope(
    known: Any,
    known_half: Any,
    q_norm: Any,
    k_norm: Any,
    q: torch.Tensor | Normalised,
    k: torch.Tensor | Normalised,
    cos: torch.Tensor,
    sin: torch.Tensor,
    rotate: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rotate of both norms; in steps where it or its rotate_half is no longer the function that was known, where a norm
    has been restored, where its own call would do more, where no kernel is launched, and where the operands are not
    those of one."""
    of_q, of_k = _form_of(q_norm), _form_of(k_norm)
    if (
        of_q is not None
        and of_k is not None
        and not (isinstance(q, Normalised) or isinstance(k, Normalised))
        and rotate is known
        and half_of(known) is known_half
        and does_only_its_forward(q_norm, of_q)
        and does_only_its_forward(k_norm, of_k)
        and of_q.takes(q_norm, q)
        and of_k.takes(k_norm, k)
        and _launches.beside(q, k, cos, sin)
        and (eps := getattr(q_norm, of_q.eps)) == getattr(k_norm, of_k.eps)
        and _fit(q, k, cos, sin, q_norm.weight, k_norm.weight)
    ):
        q, k = rms_norm_rope(q, k, cos, sin, q_norm.weight, k_norm.weight, eps)
        return q.transpose(1, 2), k.transpose(1, 2)
    return rotate(_step(q_norm, q), _step(k_norm, k), cos, sin)


def _form_of(norm: Any) -> Any:
    return getattr(getattr(norm.__class__, "forward", None), "rotary", None)


def _fit(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: Any, k_weight: Any) -> bool:
    """Whether rms_norm_rope takes them: what else transformers' function would broadcast or promote is left to it."""
    return (
        q.dim() == k.dim() == 4
        and cos.dim() == 3
        and q.shape[:2] == k.shape[:2]
        and q.shape[-1] % 2 == 0
        and sin.shape == cos.shape
        and cos.shape[0] in (1, q.shape[0])
        and cos.shape[1:] == (q.shape[1], q.shape[3])
        and q.dtype == k.dtype
        and q_weight.dtype == k_weight.dtype
        and cos.dtype == sin.dtype == torch.promote_types(q.dtype, q_weight.dtype)
        and not (cos.requires_grad or sin.requires_grad)
    )


def _rewrite(function: Callable[..., Any]) -> Rewrite:
    return Rewrite({NORM_ROPE: function, AT_ITS_PLACE: at_its_place}, fuse_statements)


@functools.cache
def _named(own: Any) -> tuple[tuple[str, ...], str] | None:
    """(the norms' attributes, the name of the function) in such a forward."""
    found: Any = rewritten(own, _rewrite(norm_rope))
    return None if found is None else (found.norms[:-1], found.norms[-1])


def rotation_of(owner: type) -> Any:
    """The function with which that attention rotates, as its module has it now; None where it is none of these."""
    own = inspect.getattr_static(owner, "forward", None)
    if own is None or (named := _named(own)) is None:
        return None
    return inspect.unwrap(own).__globals__.get(named[1])


def rotary_forward(owner: type) -> Callable[..., Any] | str:
    """The forward of that attention with the steps in one, whose `norms` are the attributes of q's and k's; or why
    there is none."""
    own: Any = inspect.getattr_static(owner, "forward", None)
    named = None if own is None else _named(own)
    if named is None:
        return UNKNOWN
    norms, name = named
    known = rotation_of(owner)
    if not rotates_heads(known):
        return OTHER_ROTATION.format(name)

    half = half_of(known)

    def of_known(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return norm_rope(known, half, *arguments)

    made: Any = rewritten(own, _rewrite(of_known))
    made.norms = norms
    return made
