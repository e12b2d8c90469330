"""`patch`: the RMSNorm modules of a Flax NNX or an Equinox model, replaced by ours, and restored. Imports neither."""

# pyright: reportAttributeAccessIssue=false, reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
# (flax and equinox are optional, and modules are any objects.)

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A module that looks like an RMSNorm and stayed as it is, and why."""

    name: str
    class_name: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Report:
    """What `patch` or `unpatch` did, as numbers of modules by class. str() gives it in words."""

    replaced: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Norms that compute with `rms_norm` now."""
    restored: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Norms that have their own class back."""
    already: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Norms that computed with `rms_norm` before."""
    skipped: tuple[Skipped, ...] = ()
    """Modules that look like an RMSNorm and stayed as they are."""

    def __str__(self) -> str:
        counts = (("replaced", self.replaced), ("restored", self.restored), ("replaced before", self.already))
        lines = [f"{verb} {count} {name}" for verb, names in counts for name, count in names.items()]
        lines += [f"skipped {one.class_name} ({one.name or 'the module itself'}): {one.reason}" for one in self.skipped]
        return "\n".join(lines) or "found no RMSNorm"


def _is_norm(module: Any) -> bool:
    return "rmsnorm" in type(module).__name__.lower().replace("_", "")


def _of_flax(module: Any) -> tuple[type[Any], type[Any], Callable[[Any], str | None]] | None:
    if "flax.nnx" not in sys.modules:
        return None
    from flax import nnx

    from . import _flax
    from .nnx import RMSNorm

    return (nnx.RMSNorm, RMSNorm, _flax.objection) if isinstance(module, nnx.Module) else None


def _of_equinox(module: Any) -> tuple[type[Any], type[Any], Callable[[Any], str | None]] | None:
    if "equinox" not in sys.modules:
        return None
    import equinox as eqx

    from .equinox import RMSNorm

    return (eqx.nn.RMSNorm, RMSNorm, lambda _: None) if isinstance(module, eqx.Module) else None


class _Change:
    """What to do with the modules of a model, and what was done."""

    def __init__(
        self, theirs: type[Any], ours: type[Any], objection: Callable[[Any], str | None], *, back: bool
    ) -> None:
        self.theirs, self.ours, self.objection, self.back = theirs, ours, objection, back
        self.done, self.already, self.skipped = Counter[str](), Counter[str](), list[Skipped]()

    def wanted(self, name: str, module: Any) -> type[Any] | None:
        """The class that the module shall have, None where it stays."""
        kind, label = type(module), f"{self.theirs.__module__.partition('.')[0]} {self.theirs.__name__}"
        if self.back:
            if kind is self.ours:
                self.done[label] += 1
                return self.theirs
            return None
        if kind is self.ours:
            self.already[label] += 1
        elif kind is not self.theirs:
            reason = (
                f"its class is not {self.theirs.__module__}.{self.theirs.__name__}, so what it computes is not known; "
                "call pallas_norm.rms_norm in its __call__"
            )
            self.skipped.append(Skipped(name, kind.__name__, reason))
        elif (reason := self.objection(module)) is not None:
            self.skipped.append(Skipped(name, kind.__name__, reason))
        else:
            self.done[label] += 1
            return self.ours
        return None

    def report(self) -> Report:
        done = dict(self.done)
        replaced, restored = ({}, done) if self.back else (done, {})
        return Report(replaced, restored, dict(self.already), tuple(self.skipped))


def _nnx_norms(model: Any) -> Iterator[tuple[str, Any]]:
    from flax import nnx

    seen: set[int] = set()
    for path, module in nnx.iter_modules(model):
        if id(module) not in seen and _is_norm(module):
            seen.add(id(module))
            yield ".".join(map(str, path)), module


def _in_equinox(model: Any, change: _Change) -> Any:
    import equinox as eqx

    def is_leaf(value: Any) -> bool:
        return isinstance(value, eqx.Module) and _is_norm(value)

    def converted(path: Any, value: Any) -> Any:
        kind = change.wanted(jax.tree_util.keystr(path).lstrip("."), value) if is_leaf(value) else None
        if kind is None:
            return value
        made = object.__new__(kind)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, getattr(value, field.name))
        return made

    return jax.tree_util.tree_map_with_path(converted, model, is_leaf=is_leaf)


def _changed(model: Any, *, back: bool) -> tuple[Any, Report]:
    if (found := _of_flax(model)) is not None:
        change = _Change(*found, back=back)
        for module, kind in [(module, change.wanted(name, module)) for name, module in _nnx_norms(model)]:
            if kind is not None:
                object.__setattr__(module, "__class__", kind)
        return model, change.report()
    if (found := _of_equinox(model)) is not None:
        change = _Change(*found, back=back)
        return _in_equinox(model, change), change.report()
    raise TypeError(
        f"model is a {type(model).__name__}; needed a flax.nnx.Module or an equinox.Module "
        "(Flax Linen: write pallas_norm.linen.RMSNorm; torch: pallas_norm_torch.patch)"
    )


def patch(model: Any) -> tuple[Any, Report]:
    """The model with its RMSNorm modules computing with `rms_norm`, and a report; `unpatch` undoes it.

    Arguments:
        model: a flax.nnx.Module, whose modules are changed in place (their class; parameters stay where they are), or
            an equinox.Module, of which a new tree is made.

    Returns: (model, report). The report names what looks like an RMSNorm and stays as it is, with the reason.

    Rounding: that of the replaced module, but for a last bit: `pallas_norm.nnx.RMSNorm`, `pallas_norm.equinox.RMSNorm`.

    Raises:
        TypeError: model is neither.

    Source: flax.nnx.RMSNorm and equinox.nn.RMSNorm.
    """
    return _changed(model, back=False)


def unpatch(model: Any) -> tuple[Any, Report]:
    """The model with the classes that `patch` replaced, and a report. Arguments and Raises: as `patch`."""
    return _changed(model, back=True)
