"""Tensors and arrays that share their memory, through DLPack. What JAX copies nevertheless is said at `to_jax`."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import torch

# What JAX narrows without a word unless jax_enable_x64 is set.
NARROWED = {
    torch.float64: "float32",
    torch.int64: "int32",
    torch.uint64: "uint32",
    torch.complex128: "complex64",
}
TENSORS = (torch.Tensor, torch.nn.Parameter)
DEVICES = ("cpu", "cuda")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]"


def _check(tensor: Any) -> None:
    # Not isinstance: a subclass may hold no memory of its own (a FakeTensor imports as a null pointer).
    if type(tensor) not in TENSORS:
        raise TypeError(
            f"tensor is a {type(tensor).__name__}; needed a torch.Tensor or torch.nn.Parameter itself: convert it first"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"tensor has the layout {tensor.layout}; needed torch.strided: pass tensor.to_dense()")
    if tensor.device.type not in DEVICES:
        raise ValueError(
            f"tensor is on the device {tensor.device}; needed one of {', '.join(DEVICES)}: move it with tensor.to first"
        )
    x64 = jax.config.jax_enable_x64  # pyright: ignore (jax.config gets its attributes at run time)
    if tensor.dtype in NARROWED and not x64:
        raise TypeError(
            f"tensor is {_describe(tensor)}, which JAX would narrow to {NARROWED[tensor.dtype]}; "
            "needed a dtype that JAX keeps: cast it with tensor.to, or call "
            'jax.config.update("jax_enable_x64", True) before anything else'
        )
    if tensor.requires_grad:
        raise ValueError(
            f"tensor is {_describe(tensor)} and requires grad, but autograd cannot see what JAX computes; "
            "needed a tensor that does not: pass tensor.detach()"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"tensor is {_describe(tensor)} with strides {tensor.stride()}; "
            "needed a contiguous tensor: pass tensor.contiguous()"
        )


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """The same elements as a jax.Array on the same device.

    Memory: shared, with one exception: on a CPU, JAX copies a tensor whose memory does not begin at a multiple of 64
        bytes. torch aligns what it allocates, so that concerns views that begin inside another tensor. While the memory
        is shared, do not write to the tensor: JAX takes its arrays to be constant.

    Streams: on a GPU, JAX waits on the device for what torch has queued on its current stream. Keep the tensor alive
        until the results have been computed: JAX does not keep it for kernels that are still running.

    Raises:
        TypeError: not a plain, dense tensor, or of a dtype that JAX would narrow.
        ValueError: on another device than a CPU or a CUDA device, requires grad, or is not contiguous.
    """
    _check(tensor)
    return jnp.from_dlpack(tensor)  # pyright: ignore[reportUnknownMemberType]


def to_torch(array: jax.Array) -> torch.Tensor:
    """The same elements as a torch tensor on the same device, in the same memory.

    Do not write to the tensor: JAX takes its arrays to be constant. On a GPU, torch's current stream waits, on the
    device, for what JAX has queued.

    Raises:
        TypeError: not a jax.Array, or one that is being traced.
        ValueError: lies on several devices.
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"array is {array.aval.str_short()} being traced, so it has no elements yet; needed a computed jax.Array: "
            "call to_torch outside jit, grad and vmap"
        )
    if not isinstance(array, jax.Array):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"array is a {type(array).__name__}; needed a jax.Array: wrap it with jnp.asarray")
    if len(devices := array.devices()) != 1:
        raise ValueError(
            f"array lies on {len(devices)} devices; needed one: gather it with jax.device_put(array, jax.devices()[0])"
        )
    return torch.from_dlpack(array)
