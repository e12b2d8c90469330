"""RMSNorm for arrays of any framework that speaks DLPack: NumPy, CuPy, tvm-ffi, PyTorch, JAX."""

# pyright: reportPrivateUsage=false, reportUnknownVariableType=false
# (It takes _api, from which __init__.py imports, for a private name of that file; what isinstance says is a NumPy array
# has elements of an unknown type.)

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from . import _api, _validate


def rms_norm(
    x: Any,
    weight: Any = None,
    *,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: str | None = None,
    unit_dtype: str | None = None,
    round_weight: bool = False,
) -> Any:
    """y = weight * round(x / sqrt(mean(x^2) + eps)): `pallas_norm.rms_norm` of arrays of any kind, y of the kind of x.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32: anything with `__dlpack__`, on a CPU or a CUDA device.
        weight: `[n]`, of any kind too, on the device of x; or None.
        eps, cast_before_scale, weight_offset, out_dtype, unit_dtype, round_weight: as in `pallas_norm.rms_norm`; dtypes
            by their names, which all frameworks share: "bfloat16", "float16", "float32".

    Returns: y, of the kind of x: a NumPy array for a NumPy array, a torch tensor for a torch tensor; otherwise what the
        `from_dlpack` of the array's own namespace (`x.__array_namespace__()`, or the package that defines its type)
        makes of the result, without a copy. A kind that has no `from_dlpack`, or none for the dtype of y, gets the
        jax.Array.

    Memory: x is read where it lies, unless JAX has to copy it: a CPU array that does not begin at a multiple of 64
        bytes. A torch tensor goes to `pallas_norm_torch.rms_norm`, which must be installed with torch.

    Raises: as `pallas_norm.rms_norm`; TypeError also for an object without `__dlpack__`; ValueError or TypeError for
        one that JAX cannot take by DLPack: with gaps between its elements, read-only, or on a device that JAX does not
        see.

    Example:
        y = rms_norm(np.ones((2, 64), np.float32))  # a NumPy array

    Source: `pallas_norm.rms_norm`; the exchange is DLPack's, by the Python array API standard.
    """
    options: dict[str, Any] = {"eps": eps, "cast_before_scale": cast_before_scale, "weight_offset": weight_offset}
    options |= {"round_weight": round_weight}
    dtypes = {"out_dtype": out_dtype, "unit_dtype": unit_dtype}
    names: dict[str, Any] = {name: _validate.rounding_dtype(name, dtype) for name, dtype in dtypes.items()}
    if _package(x) == "torch":
        import pallas_norm_torch  # torch is there already: its tensor is

        torch = sys.modules["torch"]
        options |= {name: None if dtype is None else getattr(torch, dtype) for name, dtype in names.items()}

        if weight is not None and _package(weight) != "torch":
            weight = pallas_norm_torch.to_torch(jnp.asarray(_to_jax("weight", weight)))
        return pallas_norm_torch.rms_norm(x, weight, **options)
    arrays = _to_jax("x", x), None if weight is None else _to_jax("weight", weight)
    y = cast(jax.Array, _api.rms_norm(*arrays, **options, **names))
    if isinstance(x, np.ndarray):
        return np.array(y)  # its own memory, which may be written to
    if isinstance(x, jax.Array):
        return y
    convert = _converter(x)
    try:
        # The operands are still referenced: JAX would free what it adopted of them while the kernel runs.
        return y if convert is None else convert(y)
    except (TypeError, ValueError, BufferError, RuntimeError):
        jax.block_until_ready(y)
        return y


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]


def _to_jax(name: str, value: Any) -> Any:
    if isinstance(value, (jax.Array, np.ndarray)):
        return value
    if not hasattr(value, "__dlpack__") or not hasattr(value, "__dlpack_device__"):
        raise TypeError(
            f"{name} is a {type(value).__name__}, which has no __dlpack__; needed an array that speaks DLPack: "
            "convert it with numpy.asarray first"
        )
    if _package(value) == "torch":  # a Parameter, say, as the weight of a NumPy array
        import pallas_norm_torch

        return pallas_norm_torch.to_jax(value.detach(), copy=True)
    if "64" in str(getattr(value, "dtype", "")):
        raise TypeError(
            f"{name} is a {type(value).__name__} of {value.dtype}; needed bfloat16, float16 or float32: cast it first"
        )
    try:
        return jnp.from_dlpack(value)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(
            f"{name} is a {type(value).__name__} that JAX cannot take by DLPack ({error}); needed a writable array "
            "without gaps, on a device of JAX's: pass a contiguous copy"
        ) from error


def _converter(value: Any) -> Callable[[Any], Any] | None:
    """What makes an array of the kind of `value`."""
    namespace = getattr(value, "__array_namespace__", None)
    home = namespace() if namespace is not None else sys.modules.get(_package(value))
    return getattr(home, "from_dlpack", None)
