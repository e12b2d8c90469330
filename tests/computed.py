"""rstd, y, s and dx of one jitted program, as a training step has them, on a device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_norm

Arrays = dict[str, np.ndarray[Any, Any]]
STATIC = ("residual", "eps", "implementation")


def _norm(*, residual: bool, **options: Any) -> tuple[Callable[..., Any], tuple[str, ...]]:
    function = pallas_norm.add_rms_norm if residual else pallas_norm.rms_norm
    names = ("x", "residual", "weight") if residual else ("x", "weight")
    return functools.partial(function, **options), names


@functools.partial(jax.jit, static_argnames=STATIC)
def _step(given: dict[str, jax.Array], *, residual: bool, eps: float, implementation: Any) -> dict[str, Any]:
    norm, names = _norm(residual=residual, eps=eps, implementation=implementation, return_rstd=True)
    primals, pullback = jax.vjp(norm, *(given[name] for name in names))
    cotangents = (given["dy"], *([given["ds"]] if residual else []), jnp.zeros_like(primals[-1]))
    outputs = ("y", "s", "rstd") if residual else ("y", "rstd")
    return dict(zip(outputs, primals, strict=True)) | {"dx": pullback(cotangents)[0]}


@functools.partial(jax.jit, static_argnames=STATIC)
def _forward_alone(given: dict[str, jax.Array], *, residual: bool, eps: float, implementation: Any) -> dict[str, Any]:
    norm, names = _norm(residual=residual, eps=eps, implementation=implementation)
    found = norm(*(given[name] for name in names))
    return dict(zip(("y", "s"), found if residual else (found,), strict=False))


def results(
    given: Arrays, eps: float, *, residual: bool = False, implementation: Any = None, device: Any = None
) -> Arrays:
    """Of rms_norm, or add_rms_norm, and its gradient; raises where a program of the norm alone, without rstd, has other
    bits."""
    placed = {name: jax.device_put(value, device) for name, value in given.items()}
    options = {"residual": residual, "eps": eps, "implementation": implementation}
    found = jax.device_get(_step(placed, **options))
    for name, value in jax.device_get(_forward_alone(placed, **options)).items():
        if value.tobytes() != found[name].tobytes():
            raise AssertionError(f"{name} has other bits in a program that gives no rstd and no gradient")
    return found
