"""Flax's modules: the arrays of one; what of its RMSNorm our modules cannot do, said in words."""

# pyright: reportMissingTypeStubs=false, reportMissingImports=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# (flax is optional.)

from __future__ import annotations

from typing import Any

import jax

from . import _validate


def objection(module: Any) -> str | None:
    """Why a module with the attributes of Flax's RMSNorm cannot compute with `rms_norm`; None if it can."""
    for name in ("reduction_axes", "feature_axes"):
        axes = getattr(module, name)
        if axes not in (-1, (-1,), [-1]):
            return f"{name} is {axes}; needed -1: the kernels normalise the last axis"
    if module.axis_index_groups is not None:
        return "axis_index_groups is set; needed None: a row split over all shards of axis_name"
    if not getattr(module, "force_float32_reductions", True):
        return "force_float32_reductions is False; needed True: the kernels add up in float32"
    return None


def check(module: Any) -> None:
    if (reason := objection(module)) is not None:
        raise NotImplementedError(f"{reason}; use flax's own RMSNorm for this one")


def no_mask(mask: Any) -> None:
    if mask is not None:
        raise NotImplementedError("mask is given; needed None: the kernels take whole rows; use flax's own RMSNorm")


def is_of_a_mesh(axis_name: Any) -> bool:
    """Whether there is no axis_name, or it is the axis of a shard_map around the call."""
    try:
        _validate.axis_name(axis_name)
    except ValueError:
        return False
    return True


def arrays(norm: Any) -> dict[str, Any]:
    """By attribute."""
    from flax import nnx

    return {name: value.get_value() for name, value in vars(norm).items() if isinstance(value, nnx.Variable)}


def with_array(norm: Any, name: str | None, array: Any) -> Any:
    """A copy with another array, which is its only one."""
    from flax import nnx

    definition, state = nnx.split(norm)
    return nnx.merge(definition, jax.tree.unflatten(jax.tree.structure(state), [] if name is None else [array]))


def leaves(norm: Any) -> list[Any]:
    """The arrays of a module and of all that it holds."""
    from flax import nnx

    return jax.tree.leaves(nnx.state(norm))
