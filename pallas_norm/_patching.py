"""`patch`: the RMSNorm modules of a Flax NNX or an Equinox model, replaced by ours, and restored. Imports neither.

Flax's and Equinox's own become ours. Any other, MaxText's or a person's, gets a subclass of its class if it computes
what `rms_norm` does.
"""

# pyright: reportAttributeAccessIssue=false, reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
# (flax and equinox are optional, and modules are any objects.)

from __future__ import annotations

import dataclasses
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from . import _computing, _proved_class
from ._proved_class import ORIGINAL


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


class Framework(NamedTuple):
    theirs: type[Any]
    ours: type[Any]
    objection: Callable[[Any], str | None]
    arrays: Callable[[Any], dict[str, Any]]  # of a module, by attribute
    with_array: Callable[[Any, str | None, Any], Any]  # a copy with another array in that attribute, if there is one
    leaves: Callable[[Any], list[Any]]  # the arrays of a module and of all that it holds


def _of_flax(module: Any) -> Framework | None:
    if "flax.nnx" not in sys.modules:
        return None
    from flax import nnx

    from . import _flax
    from .nnx import RMSNorm

    known = Framework(nnx.RMSNorm, RMSNorm, _flax.objection, _flax.arrays, _flax.with_array, _flax.leaves)
    return known if isinstance(module, nnx.Module) else None


def _equinox_arrays(norm: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(norm).items() if hasattr(value, "shape")}


def _equinox_leaves(norm: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(norm) if hasattr(leaf, "shape")]


def _with_equinox_array(norm: Any, name: str | None, array: Any) -> Any:
    import equinox as eqx

    return norm if name is None else eqx.tree_at(operator.attrgetter(name), norm, array)


def _of_equinox(module: Any) -> Framework | None:
    if "equinox" not in sys.modules:
        return None
    import equinox as eqx

    from .equinox import RMSNorm

    def objection(norm: Any) -> None:
        del norm  # it can all that Equinox's can

    ways = objection, _equinox_arrays, _with_equinox_array, _equinox_leaves
    known = Framework(eqx.nn.RMSNorm, RMSNorm, *ways)
    return known if isinstance(module, eqx.Module) else None


# --- modules of other classes -----------------------------------------------------------------------------------------


def _computed_class(module: Any, framework: Framework) -> type[Any]:
    """The class for a module whose class is not the framework's. Raises _computing.RefusedError."""
    arrays = framework.arrays(module)
    if len(arrays) > 1:
        raise _computing.RefusedError(f"it has {len(arrays)} arrays, {', '.join(arrays)}; needed a weight, or none")
    # Those of a module inside it would be constants of the proof, and what is trained later is not seen.
    if (count := len(framework.leaves(module))) != len(arrays):
        raise _computing.RefusedError(
            f"arrays: {count} in all, {len(arrays)} in attributes of its own; needed a weight in one, or none"
        )
    (name, weight), owner = next(iter(arrays.items()), (None, None)), type(module)
    ways = framework.with_array, framework.leaves
    computation = _computing.computation_of(module, weight, _proved_class.called(owner, module, name, *ways))
    return _proved_class.subclass(owner, name, computation, *ways)


# --- a model ----------------------------------------------------------------------------------------------------------


class _Change:
    """What to do with the modules of a model, and what was done."""

    def __init__(self, framework: Framework, *, back: bool) -> None:
        self.framework, self.back = framework, back
        self.done, self.already, self.skipped = Counter[str](), Counter[str](), list[Skipped]()

    def wanted(self, name: str, module: Any) -> type[Any] | None:
        """The class that the module shall have, None where it stays."""
        kind, theirs, ours = type(module), self.framework.theirs, self.framework.ours
        label = f"{theirs.__module__.partition('.')[0]} {theirs.__name__}" if kind in (theirs, ours) else kind.__name__
        before = theirs if kind is ours else vars(kind).get(ORIGINAL)
        if self.back:
            self.done.update([label] if before is not None else [])
            return before
        if before is not None:
            self.already[label] += 1
            return None
        try:
            if (reason := self.framework.objection(module) if kind is theirs else None) is not None:
                raise _computing.RefusedError(reason)
            wanted = ours if kind is theirs else _computed_class(module, self.framework)
        except _computing.RefusedError as refused:
            way = "" if kind is theirs else "; call pallas_norm.rms_norm in its __call__"
            self.skipped.append(Skipped(name, kind.__name__, f"{refused}{way}"))
            return None
        self.done[label] += 1
        return wanted

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
        if not is_leaf(value):
            return value
        kind = change.wanted(jax.tree_util.keystr(path).lstrip("."), value)
        if kind is None:  # a block may be named after its norm, which is inside

            def inner(below: Any, one: Any) -> Any:
                return converted((*path, *below), one)

            def is_inner(one: Any) -> bool:
                return one is not value and is_leaf(one)

            return jax.tree_util.tree_map_with_path(inner, value, is_leaf=is_inner)
        made = object.__new__(kind)
        for field in dataclasses.fields(value):
            object.__setattr__(made, field.name, getattr(value, field.name))
        return made

    return jax.tree_util.tree_map_with_path(converted, model, is_leaf=is_leaf)


def _changed(model: Any, *, back: bool) -> tuple[Any, Report]:
    if (found := _of_flax(model)) is not None:
        change = _Change(found, back=back)
        for module, kind in [(module, change.wanted(name, module)) for name, module in _nnx_norms(model)]:
            if kind is not None:
                object.__setattr__(module, "__class__", kind)
        return model, change.report()
    if (found := _of_equinox(model)) is not None:
        change = _Change(found, back=back)
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

    A module of another class whose name says RMSNorm is known by what it computes, MaxText's for example: traced, and
        proved to give the bits of `rms_norm` for each dtype and rank of x, and n. Each call is traced too, outside
        `jit` one of each shape: where that is not what was proved, as at another number of rows or where it finds a
        mesh axis, its own `__call__` runs. So it does with other arguments than x, with weakly typed x, of more than 5
        axes, with a weight that is not (n,) for rows of n, as one for each head (a weight of stacked layers is (n,)
        inside the scan over them), and where its attributes have changed since. Seen of those are numbers, strings,
        dtypes, enums, None, lists, tuples, sets and dicts of them, and modules and dataclasses; not what changes inside
        another object, a function, a class or a global: after such a change, `unpatch` and `patch` again. Left is what
        changes itself when it is called, constrains a sharding, or has a weight of another dtype than the three.

    A model may be made and patched inside `jax.jit`. `nnx.jit` lets no argument change its class: patch before it.
        pickle finds a class by its name, which is that of the replaced one: `unpatch` first. A state, or the leaves of
        a tree, as checkpoints have them, are the same.

    Rounding: that of the replaced module, but for a last bit of Flax's and Equinox's own: see `pallas_norm.nnx.RMSNorm`
        and `pallas_norm.equinox.RMSNorm`.

    Raises:
        TypeError: model is neither.

    Example:
        model, report = patch(model)
        print(report)

    Source: flax.nnx.RMSNorm and equinox.nn.RMSNorm.
    """
    return _changed(model, back=False)


def unpatch(model: Any) -> tuple[Any, Report]:
    """The model with the classes that `patch` replaced, and a report. Arguments and Raises: as `patch`.

    Example:
        model, report = unpatch(model)
    """
    return _changed(model, back=True)
