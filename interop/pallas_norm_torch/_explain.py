"""Which way a call goes, and why."""

from __future__ import annotations

import jax
import torch

import pallas_norm

from . import _validate, direct


def explain(n: int, dtype: torch.dtype, device: torch.device | str = "cuda") -> str:
    """Which way `rms_norm` goes for rows of n elements of `dtype` on `device`, and why: a sentence or two.

    Three ways, the same rounding on each: the kernel launched directly on torch's stream, the kernel inside a jitted
    JAX function through DLPack, and XLA's own code for the reference through DLPack.

    Arguments:
        n: the length of the last axis.
        dtype: that of x: torch.bfloat16, torch.float16 or torch.float32.
        device: that of x; "cuda" is the current one.

    Raises:
        TypeError: another dtype.
        ValueError: n is 0.
    """
    device = torch.device(device)
    by_jax = pallas_norm.explain(jax.ShapeDtypeStruct((1, n), _validate.dtype_name(dtype)))
    if device.type != "cuda":
        return f"DLPack and JAX on {device.type}, {by_jax.elsewhere}: {by_jax.why}"
    if not torch.cuda.is_available():
        return "nothing: torch sees no CUDA device in this process"
    # torch.device("cuda") has the index None, whatever its type says.
    index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore
    if (reason := direct.unavailable(n, index)) is not None:
        return f"DLPack and JAX on cuda:{index}, {by_jax.cuda}: no direct launch, because {reason}"
    plan = pallas_norm.plan_for(n, _validate.dtype_name(dtype))
    return (
        f"direct launch on torch's current stream of cuda:{index}: the {plan.regime.value} kernel for n = {n}, "
        "compiled once for every row count"
    )
