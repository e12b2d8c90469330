"""The public functions with a result of 8 bits: validate, then call what can be batched and sharded."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from . import _compat, _quantized, _validate, quantized_reference
from ._spec import Implementation, Spec

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

GROUP_SIZES = (128,)
_jitted = jax.jit(_quantized.quantized, static_argnums=(1, 2))  # as _autodiff.jitted


def rms_norm_quantized(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale: float | Array | None = None,
    group_size: int | None = None,
    return_y: bool = False,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: DTypeLike | None = None,
    unit_dtype: DTypeLike | None = None,
    round_weight: bool = False,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """q = cast(y / scale), y = rms_norm(x, weight): RMSNorm with Hugging Face's rounding and 8 bits a result.

    y is rounded to its dtype first, as `rms_norm` returns it, so q is that of the two steps, in one kernel.

    Arguments:
        x, weight, eps, cast_before_scale, weight_offset, unit_dtype, round_weight, implementation: as for `rms_norm`.
        out_dtype: that of y, as for `rms_norm`: what y is rounded to before it is quantised, returned or not.
        dtype: of q, float8_e4m3fn or int8.
        scale: None computes it. One positive number quantises with it (per tensor, static): a Python float, or a
            float32 array of one element, which may be traced; of an array of JAX's the value is not looked at.
        group_size: of a scale that is computed: None, one for each row (per token); 128, one for each 128 neighbouring
            elements (per block of 1 x 128), which has to divide n.
        return_y: also return y.

    Returns: (q, scale), with return_y (q, scale, y). q is `[..., n]`, scale float32: `[..., 1]`, with group_size
        `[..., n / 128]`, of one that was given `[]`. q * scale is about y.

    Rounding: amax is the largest magnitude of a row or group of y; scale = amax / 448 (float8_e4m3fn) or amax / 127
        (int8), one float32 division; q = y / scale, one float32 division, then to nearest even and at most the largest
        number of the dtype (int8: -128 to 127). `pallas_norm.quantized_reference` has the statements.

    Special values: of zeros the scale is 2^-23. A NaN in y makes scale and q of its row or group NaN, an infinity the
        scale infinite, q NaN there and 0 elsewhere; int8 has 0 for NaN.

    Sharding: rows shared out over any mesh axes need no communication; a last axis that is split is gathered first.

    Differentiation: none. Rounding to 8 bits has the derivative 0 almost everywhere: NotImplementedError.

    Raises:
        TypeError: an operand is no array or of another dtype; dtype, scale or group_size is of another type.
        ValueError: a shape or a value does not fit; scale and group_size are given both.
        NotImplementedError: a derivative is asked for, or a forced implementation cannot run.

    Example:
        q, scale = rms_norm_quantized(x, weight)              # per token
        q, scale = rms_norm_quantized(x, weight, scale=0.02)  # static

    Source: vLLM's `dynamic_per_token_scaled_fp8_quant` and compressed-tensors' `calculate_qparams`; docs/quantized.md
        tells where they differ.
    """
    return _norm(
        (x, None, weight),
        (dtype, scale, group_size, return_y),
        eps=eps,
        cast_before_scale=cast_before_scale,
        weight_offset=weight_offset,
        dtypes={"out_dtype": out_dtype, "unit_dtype": unit_dtype},
        round_weight=round_weight,
        implementation=implementation,
    )


def add_rms_norm_quantized(
    x: Float[Array, "*batch n"],
    residual: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    scale: float | Array | None = None,
    group_size: int | None = None,
    return_y: bool = False,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: DTypeLike | None = None,
    unit_dtype: DTypeLike | None = None,
    round_weight: bool = False,
    s_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, ...]:
    """s = round(x + residual); q = cast(y / scale), y = rms_norm(s): the residual form of `rms_norm_quantized`.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32.
        residual, s_dtype: as for `add_rms_norm`.
        weight, dtype, scale, group_size, return_y, eps, cast_before_scale, weight_offset, out_dtype, unit_dtype,
            round_weight, implementation: as for `rms_norm_quantized`.

    Returns: (q, scale, s), with return_y (q, scale, s, y). s is rounded before it is normalised.

    Raises: as `rms_norm_quantized`; TypeError also where residual is None.

    Example:
        q, scale, s = add_rms_norm_quantized(x, residual, weight)

    Source: as `rms_norm_quantized`; `LlamaDecoderLayer` in Hugging Face's transformers for the addition.
    """
    _validate.given("residual", residual)
    return _norm(
        (x, residual, weight),
        (dtype, scale, group_size, return_y),
        eps=eps,
        cast_before_scale=cast_before_scale,
        weight_offset=weight_offset,
        dtypes={"out_dtype": out_dtype, "unit_dtype": unit_dtype, "s_dtype": s_dtype},
        round_weight=round_weight,
        implementation=implementation,
    )


def _norm(
    rows: tuple[Any, Any, Any],
    quantised: tuple[Any, Any, Any, Any],
    *,
    eps: Any,
    cast_before_scale: Any,
    weight_offset: Any,
    dtypes: dict[str, Any],
    round_weight: Any,
    implementation: Any,
) -> tuple[Any, ...]:
    """rows: x, residual and weight. quantised: dtype, scale, group_size and return_y."""
    (*_, weight), (dtype, scale, group_size, return_y) = rows, quantised
    operands = _validate.arrays(*rows)
    group = group_of(operands["x"].shape[-1], group_size, given=scale is not None)
    if scale is not None:
        operands["scale"] = one_scale(scale)
    form = _quantized.Form(quantized_dtype(dtype), group, _validate.flag("return_y", return_y))
    cast_before_scale, unit_dtype = _validate.unit(cast_before_scale, dtypes["unit_dtype"])
    spec = Spec(
        eps=_validate.eps(eps),
        cast_before_scale=cast_before_scale,
        weight_offset=_validate.weight_offset(weight_offset, weight),
        unit_dtype=unit_dtype,
        round_weight=_validate.round_weight(round_weight, weight),
        implementation=_validate.implementation(implementation),
        out_dtype=_validate.rounding_dtype("out_dtype", dtypes["out_dtype"]),
        s_dtype=_validate.rounding_dtype("s_dtype", dtypes.get("s_dtype")),
    )
    given, operands = operands.get("scale"), _compat.vary_alike(operands)
    traced = any(isinstance(operand, jax.core.Tracer) for operand in operands.values())
    results = (_quantized.quantized if traced else _jitted)(operands, spec, form)
    results |= {} if given is None else {"scales": given}
    return tuple(results[name] for name in ("q", "scales", "s", "y") if name in results)


def quantized_dtype(value: Any) -> str:
    """ "float8_e4m3fn" or "int8"."""
    try:
        found = None if value is None or isinstance(value, jax.Array) else jnp.dtype(value).name
    except Exception:  # NumPy asks an object for its dtype
        found = None
    if found not in quantized_reference.LARGEST:
        shown = _validate.describe(value) if found is None else found
        raise TypeError(f"dtype is {shown}; needed float8_e4m3fn or int8, the dtype of q")
    return found


def group_of(n: int, group_size: Any, *, given: bool) -> int:
    """Elements that share a scale that is computed; 0 where one is given."""
    if group_size is None:
        return 0 if given else n
    if not _validate.is_int(group_size):
        raise TypeError(f"group_size is {_validate.describe(group_size)}; needed None or 128")
    if given:
        raise ValueError(
            f"scale and group_size = {group_size} were given both; needed one: scale is that of the whole tensor, "
            "group_size says for how many elements one is computed"
        )
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; needed 128, or None for one scale for each row")
    if n % group_size:
        raise ValueError(
            f"group_size is {group_size} but the last axis of x has length {n}; needed a multiple of it: "
            "pass group_size=None for one scale for each row"
        )
    return int(group_size)


def one_scale(value: Any) -> jax.Array:
    """A float32 scalar."""
    if isinstance(value, (jax.Array, np.ndarray)):
        if math.prod(value.shape) != 1 or value.ndim > 1:
            raise ValueError(
                f"scale is {_validate.describe(value)}; needed one number: pass scale=None to compute one for each row"
            )
        if value.dtype != jnp.float32:
            raise TypeError(f"scale is {_validate.describe(value)}; needed float32: cast it with astype first")
        if isinstance(value, np.ndarray):  # one of JAX's would have to be waited for
            positive(float(value.reshape(())))
        return jnp.asarray(value).reshape(())
    return jax.device_put(np.float32(positive(value)))  # by name: a guard refuses transfers that are not asked for


BELOW = 2.0**-150  # and at it, float32 rounds to zero


def positive(scale: Any) -> float:
    """A scale that is a number."""
    found = _validate.number("scale", scale)
    if found <= BELOW:
        raise ValueError(f"scale is {found}; needed a positive float32 number: y is divided by it")
    return found
