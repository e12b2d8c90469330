"""The same functions through DLPack and JAX: for CPU tensors, and where no kernel can be launched directly."""

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
            "a CUDA graph is being captured, and this call goes through JAX, which cannot be captured "
            "(pallas_norm_torch.explain says why); make it outside the capture"
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


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    spec: Spec,
    *,
    with_rstd: bool,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, s, rstd), as direct.forward."""
    given = {"x": x, "residual": residual, "weight": weight}
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    results = _call(_forward(spec, with_rstd=with_rstd), tensors)
    y = results["y"] if out is None else out.copy_(results["y"])
    return y, results.get("s"), results.get("rstd")


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
