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

    The autograd rules of the operators call it: DTensors meet them in inference mode, too.
    """
    if _registered or not hasattr(sys.modules.get("torch.distributed.tensor"), "DTensor"):
        return
    from torch.distributed.tensor.experimental import register_sharding

    operators = torch.ops.pallas_norm
    for overload, rule in (
        (operators.rms_norm.default, _rms_norm),
        (operators.add_rms_norm.default, _add_rms_norm),
        (operators.rms_norm_backward.default, _rms_norm_backward),
    ):
        register_sharding(overload)(rule)
        _torch_state.options_decide_sharding(overload, "eps")
    _registered.add("all")


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
    """dweight is a sum over the local rows. Where it is not asked for it is empty on every rank."""
    from torch.distributed.tensor import Partial, Replicate

    del rstd, dy
    nothing, with_dweight = [None] * len(options), options[3] and weight is not None
    return [
        (
            [rows, Partial() if with_dweight and not isinstance(rows, Replicate) else Replicate()],
            [rows, _replicated(weight), rows, rows, None if ds is None else rows, *nothing],
        )
        for rows in _whole_or_rows(x)
    ]
