"""Who is measured: name -> factory(operands), which gives a callable without arguments or raises AbsentError.

A factory imports what it needs when it is called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_norm

from . import peers, torch_baselines
from .calls import AbsentError, Call, module, needs_gpu
from .copy_kernel import copy, granule
from .operands import EPS, Operands, on_gpu
from .training import plain_add_norm

OURS, COPY = "pallas-norm", "copy"


def _copy(operands: Operands) -> Call:
    """The bytes of the rows, rounded up to whole vectors of whole warpgroups."""
    needs_gpu("the copy kernel")
    case = operands.case
    size = case.rows * case.n
    padded = -(-size // granule(case.dtype)) * granule(case.dtype)
    names = [name for name in operands.arrays if name != "weight"]
    if padded == size:
        inputs = [operands.arrays[name] for name in names]
    else:
        inputs = [jnp.zeros(padded, case.dtype) for _ in names]
    run = functools.partial(jax.jit(functools.partial(copy, outputs=2 if case.operation == "add" else 1)), inputs)
    extra = f"moves {padded / size:.2f} times the bytes" if padded > 1.01 * size else ""
    return Call(run, extra)


def jax_call(
    operands: Operands, norm: Callable[..., Any], add: Callable[..., Any] | None = None, note: str = ""
) -> Call:
    """A JAX norm(x, weight) as a jitted call. Without `add`, XLA gets the sum and the norm in one program."""
    case, arrays = operands.case, operands.arrays
    if case.heads:
        raise AbsentError("a JAX array has no strides: a slice is a copy")
    if case.operation == "backward":
        # rstd is an operand here, as it is in training: a residual of the forward pass.
        pullback = jax.jit(lambda x, weight: jax.vjp(norm, x, weight)[1])(arrays["x"], arrays["weight"])
        return Call(functools.partial(jax.jit(lambda pullback, dy: pullback(dy)), pullback, arrays["dy"]), note)
    if case.operation == "forward":
        return Call(functools.partial(jax.jit(norm), arrays["x"], arrays["weight"]), note)

    def add_then_norm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
        s = x + residual
        return norm(s, weight), s

    note = note if add else "add and norm in one program"
    return Call(
        functools.partial(jax.jit(add or add_then_norm), arrays["x"], arrays["residual"], arrays["weight"]), note
    )


def _ours(operands: Operands) -> Call:
    options = {"eps": EPS, "implementation": "mosaic_gpu" if on_gpu() else None}
    norm = functools.partial(pallas_norm.rms_norm, **options)
    note = "" if on_gpu() else "the XLA path: no CUDA device"
    return jax_call(operands, norm, functools.partial(pallas_norm.add_rms_norm, **options), note)


def _xla(operands: Operands) -> Call:
    options = {"eps": EPS, "implementation": "xla"}
    norm = functools.partial(pallas_norm.rms_norm, **options)
    return jax_call(operands, norm, functools.partial(pallas_norm.add_rms_norm, **options))


def _plain(operands: Operands) -> Call:
    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        unit = (wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)).astype(x.dtype)
        return weight * unit

    return jax_call(operands, norm, plain_add_norm)


def _tokamax(operands: Operands) -> Call:
    needs_gpu("tokamax")
    tokamax = module("tokamax")

    def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
        return tokamax.layer_norm(x, weight, None, epsilon=EPS, subtract_mean=False, implementation="triton")

    return jax_call(operands, norm)


BASELINES: dict[str, Callable[[Operands], Call]] = {
    COPY: _copy,  # the speed limit
    OURS: _ours,
    "pallas-norm torch": torch_baselines.ours,
    "XLA": _xla,  # our reference compiled by XLA, with HF's rounding kept
    "plain jit": _plain,  # what a JAX program writes; XLA may drop the rounding
    "HF eager": torch_baselines.hugging_face,
    "torch.compile": torch_baselines.compiled,
    "F.rms_norm": torch_baselines.functional,
    "Liger": peers.liger,
    "Liger functional": peers.liger_functional,
    "Quack": peers.quack,
    "tokamax": _tokamax,
    "SGLang": peers.sglang,
    "FlashInfer": peers.flashinfer,
}

IN_JAX = frozenset({COPY, OURS, "XLA", "plain jit", "tokamax"})


def _plainly(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def named(names: str | None) -> list[str]:
    """The baselines of a comma-separated list, without regard to case and punctuation; all for None."""
    if names is None:
        return list(BASELINES)
    by_name = {_plainly(name): name for name in BASELINES}
    unknown = [name for name in names.split(",") if _plainly(name) not in by_name]
    if unknown:
        raise ValueError(f"no provider is called {', '.join(unknown)}; there are {', '.join(BASELINES)}")
    wanted = {by_name[_plainly(name)] for name in names.split(",")}
    return [name for name in BASELINES if name in wanted]
