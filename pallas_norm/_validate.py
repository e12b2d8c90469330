"""Bad input, found before anything is traced or launched. A message says what came, what was needed, what to do."""

from __future__ import annotations

import math
import numbers
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from ._spec import Implementation

IMPLEMENTATIONS = (None, "mosaic_gpu", "xla", "interpret")
DTYPES = ("bfloat16", "float16", "float32")


def describe(value: Any) -> str:
    """An array as dtype[shape], anything else by its type."""
    if isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    return type(value).__name__


def _shown(value: Any) -> str:
    """repr(value), or its type where it has none: Python writes no int of 5000 digits."""
    try:
        return repr(value)
    except Exception:
        return describe(value)


def _numpy_dtype(dtype: Any) -> np.dtype[Any] | None:
    """None for JAX's own extended dtypes, another library's, and what is no dtype at all."""
    if isinstance(dtype, jax.Array):  # JAX would tell that of the array, with a warning that it will not for long
        return None
    try:
        return np.dtype(dtype)
    except Exception:  # NumPy parses "f4,(" as Python, and asks an object for its dtype and its repr
        return None


def dtype_name(name: str, dtype: Any) -> str:
    """ "bfloat16", "float16" or "float32"; `name` is what has the dtype."""
    known = None if dtype is None else _numpy_dtype(dtype)  # None would be float64
    found = _shown(dtype) if known is None else known.name
    if found not in DTYPES:
        raise TypeError(f"{name} is {found}; needed one of {', '.join(DTYPES)}")
    return found


def is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.timedelta64))


def row_length(n: Any) -> int:
    if not is_int(n):
        raise TypeError(f"n is {_shown(n)}; needed an int: the length of a row")
    n = int(n)
    if n.bit_length() > 64:
        raise ValueError(f"n is an int of {n.bit_length()} bits; needed the length of a row")
    return n


def _known_dtype(name: str, value: Any) -> None:
    dtype = _numpy_dtype(value.dtype)
    # JAX takes arrays of this machine's byte order only.
    if dtype is None or dtype.name not in DTYPES or not dtype.isnative:
        raise TypeError(f"{name} is {describe(value)}; needed one of {', '.join(DTYPES)}: cast it with astype first")


def rows(name: str, value: Any) -> None:
    """For arrays and jax.ShapeDtypeStruct alike."""
    if not isinstance(getattr(value, "shape", None), tuple) or not hasattr(value, "dtype"):
        raise TypeError(f"{name} is a {type(value).__name__}; needed an array or a jax.ShapeDtypeStruct")
    _known_dtype(name, value)
    if len(value.shape) == 0:
        raise ValueError(
            f"{name} is {describe(value)}; needed at least one axis, the row to normalise: pass {name}[None]"
        )
    n = value.shape[-1]
    if not is_int(n):  # a symbolic dimension of jax.export, say
        raise TypeError(f"{name} is {describe(value)}; needed an int as its last axis: a kernel is compiled for it")
    if n < 1:
        raise ValueError(
            f"{name} is {describe(value)}: the last axis is empty, and a mean over no elements is not defined; "
            "drop the call, or pass a longer last axis"
        )


def array(name: str, value: Any) -> jax.Array:
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(
            f"{name} is a {type(value).__name__}; needed a JAX or NumPy array: wrap it with jnp.asarray "
            "(a torch tensor: use pallas_norm_torch)"
        )
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array; needed a plain one: pass {name}.filled(0), say")
    _known_dtype(name, value)
    return jnp.asarray(value)


def settled(value: jax.Array, other: jax.Array) -> jax.Array:
    """JAX's own rule for x * weight: what was made of Python numbers alone (jnp.full(n, 0.7)) has a weak dtype, which
    gives way to that of the other operand."""
    return value.astype(other.dtype) if value.weak_type and not other.weak_type else value


def given(name: str, value: Any, nothing: str = "nothing to add") -> None:
    if value is None:
        raise TypeError(f"{name} is None; needed an array: call rms_norm where there is {nothing}")


def arrays(x: Any, residual: Any, weight: Any, *, beside: str = "residual") -> dict[str, jax.Array]:
    """The operands that are there, by name. beside: what the second is called, which has the shape of x."""
    operands = {"x": array("x", x)}
    x = operands["x"]
    rows("x", x)
    if residual is not None:
        residual = array(beside, residual)
        x = operands["x"] = settled(x, residual)
        operands[beside] = residual = settled(residual, x)
        if residual.shape != x.shape:
            raise ValueError(
                f"{beside} is {describe(residual)} but x is {describe(x)}; needed the same shape: broadcast it first"
            )
    if weight is not None:
        operands["weight"] = weight = settled(array("weight", weight), x)
        if weight.shape != x.shape[-1:]:
            raise ValueError(
                f"weight has shape {weight.shape} but the last axis of x has length {x.shape[-1]} (x: {describe(x)}); "
                "pass the weight of this layer, or slice x"
            )
    return operands


def _not_traced(name: str, value: Any, needed: str) -> None:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"{name} is traced ({describe(value)}); needed {needed}, because it is compiled into the kernel: "
            f"mark it static (jax.jit(..., static_argnames='{name}')) or close over it"
        )


def number(name: str, value: Any) -> float:
    """A finite Python float, also once it is a float32."""
    _not_traced(name, value, "a Python float")
    if getattr(value, "ndim", 0):
        raise TypeError(f"{name} is {describe(value)}; needed one Python float")
    # To NumPy a timedelta64 is an integer, and NaT has no float.
    if isinstance(value, (bool, np.timedelta64)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {describe(value)}; needed a Python float: pass float({name})")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        raise ValueError(f"{name} is {value}; needed a finite float32 number")
    return value


def eps(value: Any) -> float:
    value = number("eps", value)
    if value < 0:
        raise ValueError(f"eps is {value}; needed eps >= 0: it is added to a mean of squares")
    return value


def flag(name: str, value: Any) -> bool:
    _not_traced(name, value, "True or False")
    if type(value) not in (bool, np.bool_):
        raise TypeError(f"{name} is {describe(value)}; needed True or False")
    return bool(value)


def rounding_dtype(name: str, value: Any) -> str | None:
    """An option that names a dtype, or None."""
    return None if value is None else dtype_name(name, value)


def unit(cast_before_scale: Any, unit_dtype: Any) -> tuple[bool, str | None]:
    """(cast_before_scale, unit_dtype) of a Spec, in which float32 has one name."""
    cast, name = flag("cast_before_scale", cast_before_scale), rounding_dtype("unit_dtype", unit_dtype)
    if not cast and name not in (None, "float32"):
        raise ValueError(
            f"unit_dtype is {name} but cast_before_scale is False, which is unit_dtype float32 by another name; "
            "pass one of them"
        )
    return (False, None) if name == "float32" else (cast, name)


def round_weight(value: Any, weight: Any) -> bool:
    value = flag("round_weight", value)
    if value and weight is None:
        raise ValueError("round_weight is True but weight is None: there is nothing to round; pass a weight")
    return value


def axis_name(value: Any) -> tuple[str, ...]:
    names: tuple[Any, ...] = () if value is None else value if isinstance(value, tuple) else (value,)  # pyright: ignore[reportUnknownVariableType]
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name is {_shown(value)}; needed the name of a mesh axis, or a tuple of names")
    for name in names:
        if name not in jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                f"axis_name is {name!r}, which is no mesh axis of a jax.shard_map around this call; needed one, over "
                "whose shards the rows are split: jax.vmap's axis_name has members, not shards"
            )
    return names


def weight_offset(value: Any, weight: Any) -> float:
    value = number("weight_offset", value)
    if value and weight is None:
        raise ValueError(f"weight_offset is {value} but weight is None: there is nothing to add it to; pass a weight")
    return value


def implementation(value: Any) -> Implementation | None:
    if not (value is None or isinstance(value, str)) or value not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {_shown(value)}; needed None (the kernel where it runs, XLA elsewhere), "
            '"mosaic_gpu", "xla" or "interpret"'
        )
    return value
