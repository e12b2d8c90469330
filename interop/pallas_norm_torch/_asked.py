"""implementation="jax": the way that was asked for, or an error. No other is taken in its place."""

# pyright: reportUnknownVariableType=false
# (autograd.Function.apply has no types)

from __future__ import annotations

from typing import Any

import torch

from . import _options, _out, _validate, through_jax

Tensor = torch.Tensor


def rms_norm(implementation: Any, x: Any, weight: Any, options: Any, out: Any, *, plain: Any) -> Tensor:
    _check(implementation, x)
    spec = _options.spec(x, None, weight, *options, with_residual=False)
    differentiates = _differentiates(x, weight)
    if out is not None:
        _out.form("out", out, x, _options.dtypes_of(spec, x, None, weight).y, differentiates=differentiates)
    _check_eager(x, plain=plain(x, weight, out))
    if out is not None:
        _out.memory({"out": out}, {"x": x}, weight)
    if differentiates:
        return through_jax.Norm.apply(x, None, weight, spec)
    return through_jax.forward(x, None, weight, spec, with_rstd=False, out=out)[0]


def add_rms_norm(
    implementation: Any, x: Any, residual: Any, weight: Any, options: Any, places: Any, *, plain: Any
) -> tuple[Tensor, Tensor]:
    _check(implementation, x)
    spec = _options.spec(x, residual, weight, *options, with_residual=True)
    differentiates, to = _differentiates(x, residual, weight), _options.dtypes_of(spec, x, residual, weight)
    for name, place in places.items():
        _out.form(name, place, x, to.y if name == "out" else to.s, differentiates=differentiates)
    _check_eager(x, plain=plain(x, residual, weight, *places.values()))
    if places:
        _out.memory(places, {"x": x, "residual": residual}, weight)
    if differentiates:
        return through_jax.Norm.apply(x, residual, weight, spec)
    y, s, _ = through_jax.forward(x, residual, weight, spec, with_rstd=False, **places)
    assert s is not None
    return y, s


def _check(implementation: Any, x: Any) -> None:
    if not isinstance(implementation, str):
        raise TypeError(f"implementation is a {type(implementation).__name__}; needed None or 'jax'")
    if implementation != "jax":
        raise ValueError(
            f"implementation is {implementation!r}; needed None, which follows pallas_norm_torch.explain, or 'jax'"
        )
    if torch.compiler.is_compiling():  # before anything that Dynamo may know no way through, with a message of its own
        _check_eager(x, plain=False)


def _check_eager(x: Tensor, *, plain: bool) -> None:
    if not plain:
        raise NotImplementedError(
            "implementation is 'jax' under torch.compile, torch.func, a mode of torch, or with a subclass of "
            f"torch.Tensor or on meta (x: {_validate.describe(x)}); needed eager code on plain tensors: "
            "leave implementation out"
        )


def _differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
