"""The same functions through DLPack and JAX, for whoever asks with implementation="jax"."""

# pyright: reportIncompatibleMethodOverride=false
# (autograd.Function's contexts have no types)

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import torch

from pallas_norm import _autodiff  # pyright: ignore[reportPrivateUsage]
from pallas_norm._spec import Spec

from . import _library, _torch_state
from .exchange import call_jax

Tensor = torch.Tensor


@functools.cache
def _forward(spec: Spec, *, with_rstd: bool) -> Callable[..., Any]:
    return jax.jit(functools.partial(_autodiff.norm, spec=spec, with_rstd=with_rstd))


@functools.cache
def _backward(spec: Spec, *, with_dweight: bool) -> Callable[..., Any]:
    def gradients(operands: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found: Any = _autodiff.gradient(operands, spec)
        return found if with_dweight else {"dx": found["dx"]}  # what is not asked for, XLA does not compute

    return jax.jit(gradients)


def _call(function: Callable[..., Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On a GPU the results are copied into torch's memory: JAX does not know the streams on which torch reads its own,
    and gives it to the next computation as soon as the tensor is dropped."""
    device = next(iter(tensors.values())).device
    if device.type != "cuda":
        return call_jax(function, tensors)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and implementation='jax' was asked for, which cannot be captured; "
            "leave implementation out, or make the call outside the capture"
        )
    with torch.cuda.device(device):
        results: dict[str, Tensor] = call_jax(function, tensors)
        copies = {name: tensor.clone() for name, tensor in results.items()}
        event = torch.cuda.Event()
        event.record()
    with _lock:
        while _in_use and _in_use[0][0].query():
            _in_use.popleft()
        _in_use.append((event, results))
    return copies


# What the copies above still read, until the event behind each has passed.
_in_use: collections.deque[tuple[torch.cuda.Event, dict[str, Tensor]]] = collections.deque()
_lock = threading.Lock()


@_torch_state.never_compiled  # nor is JAX, which Dynamo goes into where it has broken a graph
def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    spec: Spec,
    *,
    with_rstd: bool,
    out: Tensor | None = None,
    s_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, s, rstd), as direct.forward."""
    given = {"x": x, "residual": residual, "weight": weight}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    results = _call(_forward(spec, with_rstd=with_rstd), tensors)
    y, s = results["y"], results.get("s")
    y, s = y if out is None else out.copy_(y), s if s is None or s_out is None else s_out.copy_(s)
    return y, s, results.get("rstd")


@_torch_state.never_compiled
def backward(
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    spec: Spec,
    *,
    with_dweight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight), as direct.backward."""
    given = {"x": x, "weight": weight, "rstd": rstd, "dy": dy, "ds": ds}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    results = _call(_backward(spec, with_dweight=with_dweight), tensors)
    return results["dx"], results.get("dweight")


class Norm(torch.autograd.Function):
    """y, with a residual (y, s), with first derivatives."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> Any:
        y, s, rstd = forward(x, residual, weight, spec, with_rstd=True)
        ctx.spec, ctx.passed_on = spec, (x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        _torch_state.save(ctx, x if s is None else s, weight, rstd)
        return y if s is None else (y, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True for a norm with implementation='jax', which has first derivatives only; "
                "leave implementation out to differentiate twice"
            )
        x, weight, rstd = ctx.saved_tensors
        wants_x, wants_residual, wants_weight, _ = ctx.needs_input_grad
        dx, dweight = ds, None
        if dy is not None:
            dx, dweight = backward(x, weight, rstd, dy, ds, ctx.spec, with_dweight=wants_weight)
        dx, dresidual = _library.passed_on(dx, ctx.passed_on, (wants_x, wants_residual))
        return dx, dresidual, dweight if wants_weight else None, None
