"""The operators as aten's, for programs that are to run without this package: torch's statements, rounding alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _library, _options, _torch_state, statements

Tensor = torch.Tensor


def decompositions() -> dict[Any, Callable[..., Any]]:
    """By operator, the function that computes it with aten's operators, with the same roundings.

    For programs that leave this process: torch.export.ExportedProgram.run_decompositions keeps operators that its
    table does not have, and whoever loads the program needs pallas_norm_torch for them.

        table = torch.export.default_decompositions()
        table.update(pallas_norm_torch.decompositions())
        torch.export.save(program.run_decompositions(table), "model.pt2")

    torch.onnx.export(dynamo=True) finds them by itself.
    """
    return dict(_DECOMPOSITIONS)


def _rms_norm(x: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    y, _, rstd = statements.forward(x, None, weight, _options.of(options), with_rstd=True)
    assert rstd is not None
    return y, rstd


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, s, rstd = statements.forward(x, residual, weight, _options.of(options), with_rstd=True)
    assert s is not None
    assert rstd is not None
    return y, s, rstd


def _rms_norm_backward(
    x: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, ds: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    options, with_dweight = _library.split(options)
    dx, dweight = statements.backward(x, weight, rstd, dy, ds, _options.of(options), with_dweight=with_dweight)
    return dx, x.new_empty(0) if dweight is None else dweight


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _library.operator(name): function
    for name, function in {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "rms_norm_backward": _rms_norm_backward,
    }.items()
}
for _operator, _function in _DECOMPOSITIONS.items():
    _torch_state.register_decomposition(_operator, _function)
