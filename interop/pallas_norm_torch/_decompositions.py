"""The operators as aten's, for programs that are to run without this package: torch's statements, rounding alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import (
    _gated_library,
    _library,
    _options,
    _quantized_library,
    _rope_library,
    _torch_state,
    gated_statements,
    rope_statements,
    statements,
)

Tensor = torch.Tensor


def decompositions() -> dict[Any, Callable[..., Any]]:
    """By operator, the function that computes it with aten's operators, with the same roundings.

    For programs that leave this process: torch.export.ExportedProgram.run_decompositions keeps operators that its
    table does not have, and whoever loads the program needs pallas_norm_torch for them.

        table = torch.export.default_decompositions()
        table.pop(torch.ops.aten.silu.default)
        table.update(pallas_norm_torch.decompositions())
        torch.export.save(program.run_decompositions(table), "model.pt2")

    The default table takes silu, which gated norms end in, apart into operators that round otherwise, so it is taken
    out of the table. The gradient has sigmoid alone, which the table keeps.

    Inductor, and so AOTInductor, keeps float32 where these round, unless torch._inductor.config.emulate_precision_casts
    is True when it compiles. It compiles operators that were left whole with the bits of eager code.

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


def _rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    given = _gated_library.Options(*options)
    return gated_statements.forward(x, gate, weight, given.spec(), given.form(x))


def _rms_norm_gated_backward(
    x: Tensor, gate: Tensor, weight: Tensor | None, rstd: Tensor, dy: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    *others, wanted = options
    given = _gated_library.Options(*others)
    operands = x, gate, weight, rstd, dy, given.spec(), given.form(x)
    dx, dgate, dweight = gated_statements.backward(*operands, with_dweight=wanted)
    return dx, dgate, x.new_empty(0) if dweight is None else dweight


def _rms_norm_rope_backward(*arguments: Any) -> tuple[Tensor, ...]:
    q, k, cos, sin, q_weight, k_weight, dq_out, dk_out, *options = arguments
    spec, (cos, sin) = _options.of(options), _rope_library.angles(cos, sin)
    gradients, dweights = list[Tensor](), list[Tensor]()
    for x, weight, dr in ((q, q_weight, dq_out), (k, k_weight, dk_out)):
        _, _, rstd = statements.forward(x, None, weight, spec, with_rstd=True)
        assert rstd is not None
        dy = rope_statements.rotated_back(dr, cos, sin)
        with_dweight = weight is not None
        dx, dweight = statements.backward(x, weight, rstd, dy, None, spec, with_dweight=with_dweight)
        gradients.append(dx)
        dweights.append(x.new_empty(0) if dweight is None else dweight)
    return *gradients, *dweights


_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _library.operator(name): function
    for name, function in {
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "rms_norm_backward": _rms_norm_backward,
        "rms_norm_gated": _rms_norm_gated,
        "rms_norm_gated_backward": _rms_norm_gated_backward,
        "rms_norm_quantized": _quantized_library.in_steps,
        "rms_norm_rope": _rope_library.in_steps,
        "rms_norm_rope_backward": _rms_norm_rope_backward,
    }.items()
}
for _operator, _function in _DECOMPOSITIONS.items():
    _torch_state.register_decomposition(_operator, _function)
