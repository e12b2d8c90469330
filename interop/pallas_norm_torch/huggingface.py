"""RMSNorm modules of Hugging Face transformers, replaced in place by kernels with the same rounding, and restored."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Collection, Generator, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import _launches
from ._changes import Change, apply_all, is_rebound
from ._classes import Kind, Row
from ._decoder_layers import UNKNOWN
from ._forms import Computation
from ._launches import DTYPES
from ._recognition import Recognised, Recogniser
from ._replacing import ORIGINAL, attention_class, is_attention, is_layer, layer_class, original
from ._report import Draft
from ._report import Left as Left
from ._report import Report as Report
from ._sources import helpers

REBOUND = "its forward was bound to the instance by something else (kernels, accelerate, Liger?): undo that first"
WRAPPED = "its class was changed again after it had been replaced (fully_shard?): undo that first"


def _objection(module: nn.Module, what: Row | Computation) -> str | None:
    """What this instance has that its class's replacement cannot take."""
    if is_rebound(module):
        return REBOUND
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized, which changes its class too: remove the parametrization first"
    return (_row_objection(module, what) if isinstance(what, Row) else None) or shadowing(module)


def _row_objection(module: nn.Module, row: Row) -> str | None:
    weight, eps = getattr(module, "weight", None), getattr(module, row.eps, None)
    if isinstance(weight, torch.Tensor) and (weight.dim() != 1 or weight.dtype not in DTYPES):
        return (
            f"its weight is {weight.dtype} of shape {tuple(weight.shape)}; needed one dimension in bfloat16, float16 "
            "or float32: cast the model with model.to, or leave it"
        )
    if not (eps is None and row.torch_eps) and (not isinstance(eps, (int, float)) or eps < 0):  # 0.0 is a number
        return f"its {row.eps} is {eps!r}; needed a number, at least 0: set it, or leave it"
    if row.kind is Kind.BIASED and not getattr(module, "force_float32_reductions", True):
        return "force_float32_reductions is False, so it sums squares in x's dtype; needed float32: set it, or leave it"
    if len(shape := getattr(module, "normalized_shape", (0,))) != 1:
        return f"it normalises {len(shape)} dimensions, {tuple(shape)}, together; needed the last one alone: leave it"
    return None


def shadowing(module: nn.Module) -> str | None:
    """An attribute of the instance that hides a method which its forward calls."""
    for name in helpers(type(module)):
        if name in vars(module):
            return f"its {name} was set on the instance and hides that of its class: delete it, or leave the norm"
    return None


def _places(model: nn.Module, norms: list[Change], draft: Draft) -> None:
    first = next((one.device for one in model.parameters()), None)
    for norm in norms:
        draft.runs[_launches.place(norm.module, first)] += 1


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"model is a {type(model).__name__}; needed a torch.nn.Module: the model or a part of it")
    return [*model.named_modules()]


def _norms(model: nn.Module, recognised: Recogniser, draft: Draft) -> Iterator[Change]:
    """Of the norms that can be replaced, and of those that have been."""
    for name, module in _modules(model):
        owner = type(module)
        if (before := original(module)) is not None:
            if not (is_layer(module) or is_attention(module)):
                draft.already[owner.__name__] += 1
                yield Change(module, before, owner)
            continue
        found = WRAPPED if hasattr(owner, ORIGINAL) else recognised(module)
        reason = found if not isinstance(found, Recognised) else _objection(module, found.what)
        if reason is not None:
            draft.left.append(Left(name, owner.__name__, reason))
        elif isinstance(found, Recognised):
            draft.replaced[owner.__name__] += 1
            draft.known[owner.__name__] = found.way
            yield Change(module, owner, found.replacing(owner))


USUAL = "post_attention_layernorm"  # what a decoder layer has, from whose absence in the report one would conclude


def _layers(model: nn.Module, norms: Mapping[nn.Module, type[Any]], draft: Draft, *, fuse: bool) -> Iterator[Change]:
    """The decoder layers whose class has to change, given the replacing class of each norm."""
    for name, layer in _modules(model):
        owner = type(layer)
        if original(layer) is not None:
            if is_layer(layer) and not fuse:
                draft.restored[owner.__name__] += 1
                yield Change(layer, owner, vars(owner)[ORIGINAL])
        elif fuse and any(child in norms for child in layer.modules() if child is not layer):
            replacing = layer_class(owner)
            reasons = _outside(layer, replacing, norms)
            draft.left += [Left(name, owner.__name__, reason) for reason in reasons if reason is not None]
            if None in reasons and not isinstance(replacing, str):
                draft.fused[owner.__name__] += 1
                yield Change(layer, owner, replacing)


def _outside(layer: nn.Module, replacing: type[Any] | str, norms: Mapping[nn.Module, type[Any]]) -> list[str | None]:
    """For each norm of a layer that follows an addition, why that stays outside; None where it does not."""
    attributes = () if isinstance(replacing, str) else replacing.forward.norms
    children = {one: getattr(layer, one, None) for one in attributes}  # an mlp after an addition is none
    found = [one for one, child in children.items() if child in norms or "norm" in one]
    if not found:
        return [UNKNOWN] if hasattr(layer, USUAL) else []
    return [REBOUND] if is_rebound(layer) else [_outside_of(one, children[one], norms) for one in found]


def _outside_of(attribute: str, child: Any, norms: Mapping[nn.Module, type[Any]]) -> str | None:
    norm = norms.get(child)
    if norm is None:
        around = isinstance(child, nn.Module) and any(inner in norms for inner in child.modules())
        what = f"is a {type(child).__name__} around a norm" if around else "was not replaced"
        return f"its {attribute} {what}, so the addition before it stays outside"
    if norm.forward.residual is None:
        return f"its {norm.__name__} has no residual form, so the addition before it stays outside"
    return None


QK_NORMS = ("q_norm", "k_norm")  # what an attention has, from whose absence in the report one would conclude
ADDS = "its forward also adds a residual before a norm, and is replaced for that: the norms and the rotation stay steps"


def _attentions(
    model: nn.Module, norms: Mapping[nn.Module, type[Any]], layers: Collection[nn.Module], draft: Draft, *, fuse: bool
) -> Iterator[Change]:
    """The attention modules whose class has to change, given the replacing class of each norm, and what changes as a
    layer: a module has one class."""
    for name, module in _modules(model):
        owner = type(module)
        if original(module) is not None:
            if is_attention(module) and not fuse:
                draft.restored[owner.__name__] += 1
                yield Change(module, owner, vars(owner)[ORIGINAL])
        elif fuse and any(getattr(module, one, None) in norms for one in QK_NORMS):
            replacing = attention_class(owner)
            reason = replacing if isinstance(replacing, str) else _not_rotated(module, replacing, norms)
            reason = reason or (ADDS if module in layers else None)
            if reason is not None:
                draft.left.append(Left(name, owner.__name__, reason))
            elif not isinstance(replacing, str):
                draft.rotated[owner.__name__] += 1
                yield Change(module, owner, replacing)


def _not_rotated(module: nn.Module, replacing: type[Any], norms: Mapping[nn.Module, type[Any]]) -> str | None:
    """Why an attention's norms stay outside of the rotation."""
    if is_rebound(module):
        return REBOUND
    for attribute in replacing.forward.norms:
        child = getattr(module, attribute, None)
        norm = None if child is None else norms.get(child)
        if norm is None:
            return f"its {attribute} was not replaced, so the norms and the rotation stay steps"
        if getattr(norm.forward, "rotary", None) is None:
            return f"its {norm.__name__} rounds as rms_norm_rope does not, so the norms and the rotation stay steps"
    return None


Known = Mapping[type, Mapping[str, Any]]
NOTHING: Known = types.MappingProxyType({})


def _patch(model: nn.Module, known: Known, *, fuse_residual: bool, fuse_qk_rope: bool) -> tuple[list[Change], Report]:
    draft = Draft()
    norms = list(_norms(model, Recogniser(known), draft))
    replacing = {norm.module: norm.after for norm in norms}
    layers = list(_layers(model, replacing, draft, fuse=fuse_residual))
    attentions = _attentions(model, replacing, {layer.module for layer in layers}, draft, fuse=fuse_qk_rope)
    changes = [change for change in (*norms, *layers, *attentions) if type(change.module) is change.before]
    apply_all(changes)
    _places(model, norms, draft)
    return changes, draft.report()


def patch(
    model: nn.Module, *, fuse_residual: bool = False, fuse_qk_rope: bool = False, known: Known = NOTHING
) -> Report:
    """Computes every known RMSNorm of `model` with `rms_norm`, rounding where the module's own forward does.

    A norm is known by the source of its forward, where that is one of transformers', and otherwise by what it computes:
    its forward is traced, matched with what `rms_norm` computes, and proved on inputs that separate every rounding.
    What branches on data or shapes, asks torch for more than those, changes anything, calls other modules or rounds
    elsewhere is left, with the reason. What a forward reads later is compared at each call with what it was.

    Changes the class of those modules to a subclass that overrides forward, and nothing else: parameters, buffers,
    hooks and state_dict stay as they are. A second call changes nothing. Copies and pickles are patched too.

    Where no kernel would be launched the class's own forward runs, so a patched model computes as before: on a CPU, on
    a GPU that the kernels do not run on, in float64, with DTensors, proxies and other subclasses, in forward mode. The
    report says which of the two runs. torch.compile and torch.export keep the operator on every device.

    Arguments:
        model: a model of transformers, any module that holds norms, or a norm.
        fuse_residual: also replace the forward of layers that add a residual just before a norm (Llama's before the
            norm behind attention; those of Gemma 2 and GLM 4), so that both are one kernel: `add_rms_norm`, with the
            bits of the two steps. The rest of that forward runs as it is written. Two steps are taken wherever calling
            the norm would do more than normalise. The gradient of the sum, if somebody looks at it, is without the
            norm's part. False takes that back.
        fuse_qk_rope: also replace the forward of attention that normalises the heads of q and of k and then rotates
            them (Qwen3's), so that all of that is one kernel: `rms_norm_rope`, with the bits of the steps. The steps
            are taken as with fuse_residual, and where cos and sin are not transformers' rows of angles. False takes
            that back.
        known: what classes compute that are not recognised, taken at your word: by class, a dict of `eps` (the name of
            its attribute, or a number), `weight` (a name, or None), `cast_before_scale` and `weight_offset` as for
            `rms_norm`. y has x's dtype without cast_before_scale, and otherwise promote_types(x, weight).

    Returns:
        What was replaced, how it was recognised, where it runs; and what looks like an RMSNorm and was left, with the
        reason: a forward that computes something else, a weight or an eps that the kernel does not take.

    Raises:
        TypeError: `model` is no module; `known` has another option.
        ValueError: `known` gives no eps.

    Example:
        print(patch(model, fuse_residual=True))

    Source: the forwards in transformers 5.17 to 5.24, listed in `_classes.py`.
    """
    return _patch(model, known, fuse_residual=fuse_residual, fuse_qk_rope=fuse_qk_rope)[1]


def unpatch(model: nn.Module) -> Report:
    """Gives every module that `patch` changed its own class back.

    Arguments:
        model: what `patch` was given, or a part of it.

    Returns:
        What was restored, and what was left because something else has changed the module since.

    Raises:
        TypeError: `model` is no module.

    Example:
        unpatch(model)
    """
    draft, changes = Draft(), list[Change]()
    for name, module in _modules(model):
        owner = type(module)
        if (before := original(module)) is not None and not is_rebound(module):
            draft.restored[owner.__name__] += 1
            changes.append(Change(module, owner, before))
        elif hasattr(owner, ORIGINAL):
            draft.left.append(Left(name, owner.__name__, WRAPPED if before is None else REBOUND))
    apply_all(changes)
    return draft.report()


@contextlib.contextmanager
def patched(
    model: nn.Module, *, fuse_residual: bool = False, fuse_qk_rope: bool = False, known: Known = NOTHING
) -> Generator[Report]:
    """`patch` on entry; on exit, also after an exception, what it changed is as before. What had been patched stays so.

    Arguments, Raises: those of `patch`, whose report is the value.

    Example:
        with patched(model) as report:
            print(report)
    """
    changes, report = _patch(model, known, fuse_residual=fuse_residual, fuse_qk_rope=fuse_qk_rope)
    try:
        yield report
    finally:
        for change in changes:
            change.undo()
