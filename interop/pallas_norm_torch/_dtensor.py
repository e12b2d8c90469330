"""How the operators act on DTensors: rows are normalised where they lie, whole, with the whole weight."""

# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# (torch.distributed and operators of torch.ops have no complete types)

from __future__ import annotations

import sys
from typing import Any

import torch

from . import _torch_state

_registered: set[str] = set()


def register() -> None:
    """Once somebody has imported torch.distributed.tensor, as whoever holds a DTensor has; it takes 0.7 s to import.

    Whoever calls an operator for tensors that are not plain calls it first: in inference mode no autograd rule runs.
    The autograd rules call it too, for operators that are called by their names, and for programs.
    """
    if _registered or not hasattr(sys.modules.get("torch.distributed.tensor"), "DTensor"):
        return
    from torch.distributed.tensor.experimental import register_sharding

    operators = torch.ops.pallas_norm
    for overload, rule, first_option in (
        (operators.rms_norm.default, _rms_norm, "eps"),
        (operators.add_rms_norm.default, _add_rms_norm, "eps"),
        (operators.rms_norm_backward.default, _rms_norm_backward, "eps"),
        (operators.rms_norm_gated.default, _rms_norm_gated, "activation"),
        (operators.rms_norm_gated_backward.default, _rms_norm_gated_backward, "activation"),
        (operators.rms_norm_rope.default, _rms_norm_rope, "eps"),
        (operators.rms_norm_rope_backward.default, _rms_norm_rope_backward, "eps"),
    ):
        register_sharding(overload)(rule)
        _torch_state.options_decide_sharding(overload, first_option)
    _registered.add("all")


def refuse(**operands: Any) -> None:
    """For an operator that has no rule below."""
    dtensor: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    for name, value in operands.items():
        if isinstance(value, dtensor):
            raise NotImplementedError(
                f"{name} is a DTensor, and a result of 8 bits is computed of plain tensors only; "
                f"pass {name}.to_local(), of whole rows"
            )


# Each rule gives the acceptable placements on one axis of a mesh, as ([of the results], [of the arguments]). The last
# axis is in none of them: DTensor gathers it first.


def _whole_or_rows(x: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate(), *(Shard(axis) for axis in range(len(x.shape) - 1))]


def _replicated(weight: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return None if weight is None else Replicate()


def _rms_norm(x: Any, weight: Any, *options: Any) -> list[tuple[list[Any], list[Any]]]:
    nothing = [None] * len(options)
    return [([rows, rows], [rows, _replicated(weight), *nothing]) for rows in _whole_or_rows(x)]


def _add_rms_norm(x: Any, residual: Any, weight: Any, *options: Any) -> list[tuple[list[Any], list[Any]]]:
    del residual
    nothing = [None] * len(options)
    return [([rows] * 3, [rows, rows, _replicated(weight), *nothing]) for rows in _whole_or_rows(x)]


def _rms_norm_backward(
    x: Any, weight: Any, rstd: Any, dy: Any, ds: Any, *options: Any
) -> list[tuple[list[Any], list[Any]]]:
    del rstd, dy
    nothing, with_dweight = [None] * len(options), options[3] and weight is not None
    return [
        (
            [rows, _dweight(rows, asked=with_dweight)],
            [rows, _replicated(weight), rows, rows, None if ds is None else rows, *nothing],
        )
        for rows in _whole_or_rows(x)
    ]


def _rms_norm_gated(x: Any, gate: Any, weight: Any, *options: Any) -> list[tuple[list[Any], list[Any]]]:
    del gate
    nothing = [None] * len(options)
    return [([rows, rows], [rows, rows, _replicated(weight), *nothing]) for rows in _whole_or_rows(x)]


def _rms_norm_gated_backward(
    x: Any, gate: Any, weight: Any, rstd: Any, dy: Any, *options: Any
) -> list[tuple[list[Any], list[Any]]]:
    """As that of the norm, with dgate beside dx."""
    del gate, rstd, dy
    nothing, with_dweight = [None] * len(options), options[-1] and weight is not None
    return [
        ([rows, rows, _dweight(rows, asked=with_dweight)], [rows, rows, _replicated(weight), rows, rows, *nothing])
        for rows in _whole_or_rows(x)
    ]


def _heads(q: Any, cos: Any) -> list[tuple[Any, Any]]:
    """(of q and k, of the angles): whole, by heads, or by tokens, where an axis of these is one of the angles too."""
    from torch.distributed.tensor import Replicate, Shard

    heads, missing = len(q.shape) - 2, len(q.shape) - 1 - len(cos.shape)
    found: list[tuple[Any, Any]] = [(Replicate(), Replicate()), (Shard(heads), Replicate())]
    for axis in range(heads):
        of_angles = axis - missing
        shared = of_angles >= 0 and cos.shape[of_angles] == q.shape[axis]
        found.append((Shard(axis), Shard(of_angles) if shared else Replicate()))
    return found


def _rms_norm_rope(
    q: Any, k: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any, *options: Any
) -> list[tuple[list[Any], list[Any]]]:
    del k, sin
    rest = [_replicated(q_weight), _replicated(k_weight), *[None] * len(options)]
    return [([pair, pair], [pair, pair, angles, angles, *rest]) for pair, angles in _heads(q, cos)]


def _rms_norm_rope_backward(
    q: Any, k: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any, dq: Any, dk: Any, *options: Any
) -> list[tuple[list[Any], list[Any]]]:
    del k, sin, dq, dk
    weights, nothing = [_replicated(q_weight), _replicated(k_weight)], [None] * len(options)
    return [
        (
            [pair, pair, *(_dweight(pair, asked=weight is not None) for weight in weights)],
            [pair, pair, angles, angles, *weights, pair, pair, *nothing],
        )
        for pair, angles in _heads(q, cos)
    ]


def _dweight(rows: Any, *, asked: bool) -> Any:
    """A sum over the local rows. Where it is not asked for it is empty on every rank."""
    from torch.distributed.tensor import Partial, Replicate

    return Partial() if asked and not isinstance(rows, Replicate) else Replicate()
