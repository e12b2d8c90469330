"""Which norm a module is: by its source, which is fast; by what it computes; or by what a person says that it does."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from . import _computed
from ._classes import Row, looks_like_one, recognise
from ._forms import Computation
from ._replacing import computed_class, norm_class

SOURCE, COMPUTATION, WORD = "source", "computation", "known="


class Recognised(NamedTuple):
    what: Row | Computation
    way: str

    def replacing(self, owner: type) -> type[nn.Module]:
        return norm_class(owner, self.what) if isinstance(self.what, Row) else computed_class(owner, self.what)


def _unknown(owner: type, reason: str) -> str:
    return (
        f"its forward {reason}; if it computes what rms_norm does all the same, say so with "
        f"patch(model, known={{{owner.__name__}: dict(eps=..., cast_before_scale=...)}}), or make it a "
        "pallas_norm_torch.RMSNorm or a call of rms_norm"
    )


def _instance(module: nn.Module) -> tuple[Any, ...]:
    """What of an instance may decide what it computes."""
    members = {**vars(module), **vars(module)["_parameters"], **vars(module)["_buffers"]}
    simple = tuple(
        (name, None if value is None else tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value))
        for name, value in sorted(members.items())
        if name not in ("_parameters", "_buffers", "_old_forward", "_hf_hook", "forward", "training")
    )
    return type(module), inspect.getattr_static(type(module), "forward"), simple


def _may_be_one(module: nn.Module) -> bool:
    """Whether to look at what a module computes that does not look like a norm: a small one of its own."""
    parameters = [*vars(module)["_parameters"].values()]
    return (
        not vars(module)["_modules"]
        and not type(module).__module__.startswith("torch.")
        and (len(parameters) in (1, 2) or (not parameters and "norm" in type(module).__name__.lower()))
        and all(one is None or one.dim() == 1 for one in parameters)
    )


class Recogniser:
    """Of the modules of one model, looking once at what is alike."""

    def __init__(self, known: Mapping[type, Mapping[str, Any]]) -> None:
        self.described = {owner: _computed.described(owner, options) for owner, options in known.items()}
        self.rows: dict[type, Row | str | None] = {}
        self.computed: dict[tuple[Any, ...], Computation | str] = {}

    def __call__(self, module: nn.Module) -> Recognised | str | None:
        """How it is replaced, why it is not, or None: it does not look like an RMSNorm."""
        owner = type(module)
        if owner in self.described:
            computation = self.described[owner]
            return _computed.objection(computation, module) or Recognised(computation, WORD)
        if owner not in self.rows:
            self.rows[owner] = recognise(owner)
        if (row := self.rows[owner]) is not None:
            return row if isinstance(row, str) else Recognised(row, SOURCE)
        looks = looks_like_one(owner)
        if not looks and not _may_be_one(module):
            return None
        key = _instance(module)
        if key not in self.computed:
            from ._computation import compute  # with torch's fake tensors and sympy, which take a second to import

            self.computed[key] = compute(module)
        found = self.computed[key]
        if isinstance(found, Computation):
            return _computed.objection(found, module) or Recognised(found, COMPUTATION)
        return _unknown(owner, found) if looks else None
