"""Tensors and arrays that share their memory, through DLPack, and JAX functions called on tensors."""

# pyright: reportCallIssue=false, reportUnknownLambdaType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (jax.tree and jax.jit have no complete types)

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import torch
from torch.utils.dlpack import from_dlpack, to_dlpack  # pyright: ignore[reportPrivateImportUsage]

from pallas_norm import _compat
from pallas_norm.kernels import launch_arguments

from . import _torch_state
from ._validate import dtype_name, form

# What torch, JAX and DLPack call by the same name. DLPack knows others, which it refuses to the one or the other, or
# hands over as something else: torch's int4 as int8, JAX's int1 as bool.
DTYPES = frozenset(
    [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "complex128",
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ]
)
# What JAX narrows without a word unless jax_enable_x64 is set.
NARROWED = {
    torch.float64: "float32",
    torch.int64: "int32",
    torch.uint64: "uint32",
    torch.complex128: "complex64",
}
# By device type, the bytes that an address must be a multiple of. JAX copies on a CPU what does not begin there; on a
# GPU, XLA runs a kernel of Mosaic's on nothing else.
ALIGNMENT = {"cpu": 64, "cuda": launch_arguments.ALIGNMENT}


def _check(tensor: Any) -> None:
    # A FakeTensor, say, would be imported as a null pointer.
    if type(tensor) not in _torch_state.TENSORS:
        raise TypeError(
            f"tensor is a {type(tensor).__name__}; needed a torch.Tensor or torch.nn.Parameter itself: convert it first"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"tensor has the layout {tensor.layout}; needed torch.strided: pass tensor.to_dense()")
    if tensor.is_nested:
        raise TypeError("tensor is nested; needed a plain one: pass tensor.to_padded_tensor(0.0)")
    if tensor._is_zerotensor():  # autograd's zeros: JAX would read at the address 0
        raise TypeError("tensor is a zero tensor without memory; needed one with: pass torch.zeros_like(tensor)")
    if tensor.is_quantized:
        raise TypeError(f"tensor is quantized ({tensor.dtype}); needed a plain tensor: pass tensor.dequantize()")
    if tensor.device.type not in ALIGNMENT:
        raise ValueError(
            f"tensor is on the device {tensor.device}; needed one of {', '.join(ALIGNMENT)}: "
            "move it with tensor.to first"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise TypeError(
            f"tensor is {form(tensor)} and conjugated or negated lazily, so its memory holds other values; "
            "needed the values themselves: pass tensor.resolve_conj().resolve_neg()"
        )
    if dtype_name(tensor.dtype) not in DTYPES:
        raise TypeError(f"tensor is {form(tensor)}; needed a dtype that JAX has too: view it as one, or cast it")
    x64 = jax.config.jax_enable_x64  # pyright: ignore (jax.config gets its attributes at run time)
    if tensor.dtype in NARROWED and not x64:
        raise TypeError(
            f"tensor is {form(tensor)}, which JAX would narrow to {NARROWED[tensor.dtype]}; "
            "needed a dtype that JAX keeps: cast it with tensor.to, or call "
            'jax.config.update("jax_enable_x64", True) before anything else'
        )
    if tensor.requires_grad:
        raise ValueError(
            f"tensor is {form(tensor)} and requires grad, but autograd cannot see what JAX computes; "
            "needed a tensor that does not: pass tensor.detach()"
        )


def _share_of(tensor: torch.Tensor) -> str | None:
    """Why JAX cannot share the tensor's memory as it lies, or None."""
    if not tensor.is_contiguous():
        return f"has strides {tensor.stride()}, which is not contiguous"
    needed = ALIGNMENT[tensor.device.type]
    if tensor.numel() and tensor.data_ptr() % needed:
        return f"begins {tensor.data_ptr() % needed} bytes past a multiple of {needed}"
    return None


def to_jax(tensor: torch.Tensor, *, copy: bool = False) -> jax.Array:
    """The same elements as a jax.Array on the same device.

    Arguments:
        tensor: a dense tensor on a CPU or a CUDA device, current or not.
        copy: False shares the memory, or raises where JAX cannot: the tensor must be contiguous, and begin at a
            multiple of 64 bytes on a CPU and of 256 on a GPU. torch aligns what it allocates, so that concerns views
            that begin inside another tensor. True copies first.

    Memory: while it is shared, do not write to the tensor: JAX takes its arrays to be constant.

    Streams: on a GPU, JAX waits on the device for what torch has queued on its current stream.

    Lifetimes: JAX's GPU client drops the memory with the array, even if a kernel still reads it. So keep the tensor
        until what JAX makes of it has been computed or exported; `call_jax` does that for a whole call.

    Raises:
        TypeError: not a plain, dense tensor, or of a dtype that JAX does not have or would narrow.
        ValueError: on another device than a CPU or a CUDA device, requires grad, or cannot be shared without a copy.
        NotImplementedError: JAX does not see the tensor's device.

    Example:
        array = to_jax(x, copy=True)

    Source: the exchange is DLPack's, by the Python array API standard.
    """
    _check(tensor)
    if copy:
        shared = _adopted([_shareable(tensor)])[0]
        return jax.block_until_ready(jnp.array(shared, copy=True))  # JAX's own memory, of which it takes care
    if (reason := _share_of(tensor)) is not None:
        raise ValueError(
            f"tensor is {form(tensor)} and {reason}, so JAX would copy it; needed memory that can be shared: "
            "pass copy=True, or tensor.clone(memory_format=torch.contiguous_format)"
        )
    array = _adopted([tensor])[0]
    if tensor.numel() and array.unsafe_buffer_pointer() != tensor.data_ptr():
        raise ValueError(f"tensor is {form(tensor)} and JAX copied it, which it was not asked to: pass copy=True")
    return array


def _adopted(tensors: list[torch.Tensor]) -> list[jax.Array]:
    device = tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" and not _is_current(device) else contextlib.nullcontext():
        capsules = [to_dlpack(tensor.detach()) for tensor in tensors]
        return _compat.adopt(capsules, device.type, device.index or 0, _wait_for_torch)


def _is_current(device: torch.device) -> bool:
    return device.index == torch.cuda.current_device()


_events = threading.local()


@functools.cache
def _stream_at(address: int, device: int) -> torch.cuda.ExternalStream:
    return torch.cuda.ExternalStream(address, device=device)


def _wait_for_torch(address: int) -> None:
    """Makes the stream of that address wait for torch's current one."""
    device = torch.cuda.current_device()
    if (event := getattr(_events, str(device), None)) is None:
        event = torch.cuda.Event()
        setattr(_events, str(device), event)
    event.record()
    _stream_at(address, device).wait_event(event)


def to_torch(array: jax.Array) -> torch.Tensor:
    """The same elements as a torch tensor on the same device, in the same memory.

    Arguments:
        array: of any shape and dtype that torch has too, on one CPU or CUDA device.

    Memory: do not write to the tensor: JAX takes its arrays to be constant.

    Streams: on a GPU, torch's current stream waits, on the device, for what JAX has queued.

    Raises:
        TypeError: not a jax.Array, one that is being traced, or of a dtype that torch does not have.
        ValueError: lies on several devices.

    Example:
        tensor = to_torch(jax.numpy.ones((2, 64)))

    Source: the exchange is DLPack's, by the Python array API standard.
    """
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"array is {array.aval.str_short()} being traced, so it has no elements yet; needed a computed jax.Array: "
            "call to_torch outside jit, grad and vmap"
        )
    if not isinstance(array, jax.Array):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"array is a {type(array).__name__}; needed a jax.Array: wrap it with jnp.asarray")
    _check_dtype(array)
    if len(devices := array.devices()) != 1:
        raise ValueError(
            f"array lies on {len(devices)} devices; needed one: gather it with jax.device_put(array, jax.devices()[0])"
        )
    (device,) = devices
    if device.platform == "cpu" or device.local_hardware_id == torch.cuda.current_device():
        return torch.from_dlpack(array)
    with torch.cuda.device(device.local_hardware_id):
        return torch.from_dlpack(array)


def _check_dtype(array: jax.Array) -> jax.Array:
    if str(array.dtype) not in DTYPES:  # a key has a dtype of JAX's own
        raise TypeError(f"array is {array.aval.str_short()}; needed a dtype that torch has too: cast it with astype")
    return array


def call_jax(function: Callable[..., Any], *operands: Any) -> Any:
    """`function(*operands)` with every tensor in the operands as a jax.Array, and every array in its result as a
    tensor, of torch's current stream.

    Arguments:
        function: of arrays, jitted or not.
        operands: trees (tuples, lists, dicts) of tensors, all on one device; other leaves are passed as they are. What
            cannot be shared is copied, see `to_jax`.

    Lifetimes: the operands are kept until torch's stream waits for the results; if anything raises, until the device is
        done with them. The results are JAX's memory, which it may use again once they are dropped: a stream other than
        the current one that reads them has to be waited for before that. Autograd records nothing.

    Raises: as `to_jax`, except for what copy=True cures; and what `function` raises.

    Example:
        y = call_jax(jax.jit(lambda x: x * 2), x)
    """
    leaves, tree = jax.tree.flatten(operands)
    at = [index for index, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    kept = [_shareable(leaves[index]) for index in at]
    if len(found := {tensor.device for tensor in kept}) > 1:
        raise ValueError(
            f"the operands are on {', '.join(sorted(map(str, found)))}; needed one device: move them with tensor.to"
        )
    arrays = _adopted(kept) if kept else []
    results: Any = None
    try:
        for index, array in zip(at, arrays, strict=True):
            leaves[index] = array
        results = function(*jax.tree.unflatten(tree, leaves))
        if kept and kept[0].is_cuda and _is_current(kept[0].device):
            stream = torch.cuda.current_stream().cuda_stream or 1  # DLPack's number for the default stream
            return _each_array(results, lambda array: from_dlpack(_check_dtype(array).__dlpack__(stream=stream)))
        jax.block_until_ready(results)
        return _each_array(results, to_torch)
    except BaseException:
        jax.block_until_ready((arrays, results))
        raise


def _each_array(tree: Any, convert: Callable[[jax.Array], torch.Tensor]) -> Any:
    return jax.tree.map(lambda leaf: convert(leaf) if isinstance(leaf, jax.Array) else leaf, tree)


def _shareable(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    _check(tensor)
    return tensor if _share_of(tensor) is None else tensor.clone(memory_format=torch.contiguous_format)
