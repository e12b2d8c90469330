"""RMSNorm modules of Hugging Face transformers, replaced in place by kernels with the same rounding, and restored."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ._classes import Kind, Row, recognise
from ._forwards import RESIDUAL_FORMS
from ._replacing import ORIGINAL, is_fused, layer_class, norm_class, original

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Left:
    """A module that looks like an RMSNorm and was not replaced, or not restored, and why."""

    name: str
    class_name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `patch` or `unpatch` did, as numbers of modules by class. str() gives it in words."""

    replaced: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Norms that compute with `rms_norm` now."""
    fused: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Decoder layers that compute with `add_rms_norm` now."""
    restored: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Modules that have their own class back."""
    already: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Norms that an earlier call had replaced."""
    left: tuple[Left, ...] = ()
    """Modules that look like an RMSNorm and stayed as they are: each with its name, class_name and reason."""

    def __str__(self) -> str:
        parts = [("replaced", self.replaced), ("fused", self.fused), ("restored", self.restored)]
        lines = [_counts(verb, counts) for verb, counts in (*parts, ("replaced before", self.already)) if counts]
        reasons: dict[tuple[str, str], list[str]] = {}
        for left in self.left:
            reasons.setdefault((left.class_name, left.reason), []).append(left.name or "the module itself")
        for (class_name, reason), names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"left {len(names)} {class_name} ({names[0]}{more}): {reason}")
        return "\n".join(lines) or "found no RMSNorm"


class _Draft:
    """A report being made."""

    def __init__(self) -> None:
        self.replaced, self.fused, self.restored, self.already = (Counter[str]() for _ in range(4))
        self.left: list[Left] = []

    def report(self) -> Report:
        return Report(dict(self.replaced), dict(self.fused), dict(self.restored), dict(self.already), tuple(self.left))


def _counts(verb: str, counts: Mapping[str, int]) -> str:
    return f"{verb} {sum(counts.values())}: " + ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


REBOUND = "its forward was bound to the instance by something else (kernels, accelerate, Liger?): undo that first"
WRAPPED = "its class was changed again after it had been replaced (fully_shard?): undo that first"


def _rebound(module: nn.Module) -> bool:
    """Whether something else has bound another forward to the instance. The class's own, which kernelize leaves where
    it has no kernel and accelerate where it has removed its hook, is no other."""
    forward = vars(module).get("forward")
    own = inspect.getattr_static(type(module), "forward", None)
    return forward is not None and getattr(forward, "__func__", None) is not own


def _objection(module: nn.Module, row: Row) -> str | None:
    """What this instance has that its class's replacement cannot take."""
    weight, eps = getattr(module, "weight", None), getattr(module, row.eps, None)
    if _rebound(module):
        return REBOUND
    if isinstance(weight, torch.Tensor) and (weight.dim() != 1 or weight.dtype not in DTYPES):
        return (
            f"its weight is {weight.dtype} of shape {tuple(weight.shape)}; needed one dimension in bfloat16, float16 "
            "or float32: cast the model with model.to, or leave it"
        )
    if not isinstance(eps, (int, float)) or eps < 0:  # 0.0 is a number
        return f"its {row.eps} is {eps!r}; needed a number, at least 0: set it, or leave it"
    if row.kind is Kind.BIASED and not getattr(module, "force_float32_reductions", True):
        return "force_float32_reductions is False, so it sums squares in x's dtype; needed float32: set it, or leave it"
    if len(shape := getattr(module, "normalized_shape", (0,))) != 1:
        return f"it normalises {len(shape)} dimensions, {tuple(shape)}, together; needed the last one alone: leave it"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized, which changes its class too: remove the parametrization first"
    return None


@dataclasses.dataclass(frozen=True)
class _Change:
    module: nn.Module
    before: type[Any]
    after: type[Any]

    def apply(self) -> None:
        vars(self.module).pop("forward", None)  # the class's own, which would now be the wrong one
        self.module.__class__ = self.after

    def undo(self) -> None:
        if type(self.module) is self.after and not _rebound(self.module):
            _Change(self.module, self.after, self.before).apply()


def _apply(changes: list[_Change]) -> None:
    try:
        for change in changes:
            change.apply()
    except BaseException:
        for change in changes:
            change.undo()
        raise


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is a {type(model).__name__}; needed a torch.nn.Module: the model or a part of it")
    return [*model.named_modules()]


def _norms(model: nn.Module, draft: _Draft) -> Iterator[_Change]:
    """Of the norms that can be replaced, and of those that have been."""
    recognised: dict[type, Row | str | None] = {}
    for name, module in _modules(model):
        owner = type(module)
        if (before := original(module)) is not None:
            if not is_fused(module):
                draft.already[owner.__name__] += 1
                yield _Change(module, before, owner)
            continue
        if owner not in recognised:
            recognised[owner] = WRAPPED if hasattr(owner, ORIGINAL) else recognise(owner)
        row = recognised[owner]
        reason = _objection(module, row) if isinstance(row, Row) else row
        if reason is not None:
            draft.left.append(Left(name, owner.__name__, reason))
        elif isinstance(row, Row):
            draft.replaced[owner.__name__] += 1
            yield _Change(module, owner, norm_class(owner, row))


def _layers(model: nn.Module, norms: Mapping[nn.Module, type[Any]], draft: _Draft, *, fuse: bool) -> Iterator[_Change]:
    """The decoder layers whose class has to change, given the replacing class of each norm."""
    for name, layer in _modules(model):
        owner = type(layer)
        norm = norms.get(getattr(layer, "post_attention_layernorm", None))  # pyright: ignore[reportArgumentType]
        if is_fused(layer) and not fuse:
            draft.restored[owner.__name__] += 1
            yield _Change(layer, owner, vars(owner)[ORIGINAL])
        elif fuse and norm is not None and original(layer) is None:
            replacing = REBOUND if _rebound(layer) else layer_class(owner)
            if norm.forward not in RESIDUAL_FORMS:
                replacing = f"its {norm.__name__} has no residual form, so the addition before it stays outside"
            if isinstance(replacing, str):
                draft.left.append(Left(name, owner.__name__, replacing))
            else:
                draft.fused[owner.__name__] += 1
                yield _Change(layer, owner, replacing)


def _patch(model: nn.Module, *, fuse_residual: bool) -> tuple[list[_Change], Report]:
    draft = _Draft()
    norms = list(_norms(model, draft))
    layers = _layers(model, {norm.module: norm.after for norm in norms}, draft, fuse=fuse_residual)
    changes = [change for change in (*norms, *layers) if type(change.module) is change.before]
    _apply(changes)
    return changes, draft.report()


def patch(model: nn.Module, *, fuse_residual: bool = False) -> Report:
    """Computes every known RMSNorm of `model` with `rms_norm`, rounding where the module's own forward does.

    Changes the class of those modules to a subclass that overrides forward, and nothing else: parameters, buffers,
    hooks and state_dict stay as they are. A second call changes nothing. Copies and pickles are patched too.

    Arguments:
        model: a model of transformers, any module that holds norms, or a norm.
        fuse_residual: also replace the forward of Llama-shaped decoder layers, so that `residual + hidden` and the norm
            after attention are one kernel: `add_rms_norm`, with the bits of the two steps. False takes that back.

    Returns:
        What was replaced, and what looks like an RMSNorm and was left, with the reason: a class whose source is not
        known, a body that rounds like none of ours, a weight or an eps that the kernel does not take.

    Raises:
        TypeError: `model` is no module.

    Source: the forwards in transformers 5.17 and 5.23, listed in `_classes.py`.
    """
    return _patch(model, fuse_residual=fuse_residual)[1]


def unpatch(model: nn.Module) -> Report:
    """Gives every module that `patch` changed its own class back.

    Arguments:
        model: what `patch` was given, or a part of it.

    Returns:
        What was restored, and what was left because something else has changed the module since.

    Raises:
        TypeError: `model` is no module.
    """
    draft, changes = _Draft(), list[_Change]()
    for name, module in _modules(model):
        owner = type(module)
        if (before := original(module)) is not None and not _rebound(module):
            draft.restored[owner.__name__] += 1
            changes.append(_Change(module, owner, before))
        elif hasattr(owner, ORIGINAL):
            draft.left.append(Left(name, owner.__name__, WRAPPED if before is None else REBOUND))
    _apply(changes)
    return draft.report()


@contextlib.contextmanager
def patched(model: nn.Module, *, fuse_residual: bool = False) -> Generator[Report]:
    """`patch` on entry; on exit, also after an exception, what it changed is as before. What had been patched stays so.

    Arguments, Raises: those of `patch`, whose report is the value.
    """
    changes, report = _patch(model, fuse_residual=fuse_residual)
    try:
        yield report
    finally:
        for change in changes:
            change.undo()
