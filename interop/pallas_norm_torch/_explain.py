"""Which way a call goes, and why."""

from __future__ import annotations

import torch

from pallas_norm.plans import few_rows
from pallas_norm.plans.fitting import Misfit, backward_plan_on, forward_plan_on

from . import _form_calls, _validate, direct, launch


def explain(n: int, dtype: torch.dtype, device: torch.device | str = "cuda") -> str:
    """Which way `rms_norm` goes for rows of n elements of `dtype` on `device`, and why: a sentence.

    Two ways, the same rounding on each: the kernel launched directly, and torch's own statements. Both run on torch's
    current stream and may be captured into a CUDA graph. A third, DLPack and JAX, is taken by
    `implementation="jax"` alone.

    Arguments:
        n: the length of the last axis.
        dtype: that of x: torch.bfloat16, torch.float16 or torch.float32.
        device: that of x; "cuda" is the current one.

    Raises:
        TypeError: another dtype, or n is no int.
        ValueError: n is below 1.

    Example:
        print(explain(4096, torch.bfloat16, "cpu"))
    """
    n, dtype = _validate.row_length(n), _validate.operand_dtype(dtype)
    device = torch.device(device)
    if device.type == "cpu":
        return "torch's own statements on cpu, with Hugging Face's rounding: the kernels need a CUDA device"
    if device.type == "meta":
        return "nothing is computed on meta: the result has a shape and a dtype"
    if device.type != "cuda":
        return f"nothing: rms_norm takes tensors on a CPU or a CUDA device, and raises for {device}"
    if not torch.cuda.is_available():
        return "nothing: torch sees no CUDA device in this process"
    # torch.device("cuda") has the index None, whatever its type says.
    index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore
    if index >= (count := torch.cuda.device_count()):
        return f"nothing: torch sees {count} CUDA device{'s' * (count != 1)} in this process, and no cuda:{index}"
    if (reason := direct.unavailable(n, index, dtype)) is not None:
        return (
            f"torch's own statements on its current stream of cuda:{index}, with Hugging Face's rounding: "
            f"no direct launch, because {reason}"
        )
    gpu, name = launch.gpu_of(index), _validate.dtype_name(dtype)
    plan = forward_plan_on(gpu, n, name)
    found = (
        f"direct launch on torch's current stream of cuda:{index}: the {plan.regime.value} kernel for n = {n}, "
        "compiled once for every row count"
    )
    if (few := few_rows.of(plan, dtype.itemsize, gpu)) is not None:
        found += f", and for up to {few[0]} rows once more, shared by more warps with the same bits"
    try:
        backward_plan_on(gpu, n, name)
    except Misfit as reason:
        found += f"; the backward pass by torch's own statements, because {reason}"
    for form, why in _form_calls.refusals(n, dtype, index):
        found += f"; {form} in steps, because {why}"
    return found
