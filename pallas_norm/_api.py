"""The public functions: validate, then call what can be differentiated, batched and sharded."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# (It takes _autodiff and _dispatch, from which __init__.py imports, for private names of that file; jax.jit has few
# types.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import jax
import jax.core
import numpy as np
from jax import lax

from . import _autodiff, _compat, _dispatch, _sharding, _validate
from ._spec import Implementation, Spec

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Array, Float


class _Options(TypedDict, total=False):
    """The arguments with defaults that say nothing of what is returned."""

    eps: float
    cast_before_scale: bool
    weight_offset: float
    implementation: Implementation | None
    axis_name: str | tuple[str, ...] | None


@overload
def rms_norm(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    return_rstd: Literal[False] = False,
    **options: Unpack[_Options],
) -> Float[Array, "*batch n"]: ...
@overload
def rms_norm(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    return_rstd: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch"]]: ...
def rms_norm(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    implementation: Implementation | None = None,
    return_rstd: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "*batch n"] | tuple[Float[Array, "*batch n"], Float[Array, "*batch"]]:
    r"""y = weight * round(x / sqrt(mean(x^2) + eps)): RMSNorm with Hugging Face's rounding.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32; any number of rows, zero included.
        weight: `[n]`, or None for no weight. Its dtype may differ from that of x.
        eps: added to the mean of squares, as a float32; a Python float >= 0, compiled into the kernel.
        cast_before_scale: True rounds the normalised x to its dtype before the weight multiplies it (Llama and most
            models of Hugging Face). False multiplies in float32 and rounds once (Gemma, Olmo2, GptOss,
            torch.nn.functional.rms_norm).
        weight_offset: added to the weight in float32 (Gemma: 1.0).
        implementation: None takes the Mosaic GPU kernel where the program is lowered for an NVIDIA GPU of compute
            capability 9.0 or newer and n has a kernel, and lets XLA compile the reference elsewhere; `explain` tells
            which. "mosaic_gpu" or "xla" forces one. "interpret" runs the kernel in Pallas's interpreter, on a CPU, for
            tests.
        return_rstd: also return rstd = 1 / sqrt(mean(x^2) + eps), `[...]` in float32. No gradient flows through it.
        axis_name: inside jax.shard_map, the mesh axis or axes over which the rows themselves are split; x and weight
            are then the columns of this shard, n those of all shards. XLA compiles this form.

    Returns: y, `[..., n]`, of dtype promote_types(x, weight): a float32 weight makes a bfloat16 x float32, as in
        Hugging Face. With return_rstd, (y, rstd).

    Rounding: sums, rstd and products in float32; the normalised x is rounded to the dtype of x, and y to its own. The
        same on every path. In the kernels a row's bits do not depend on the other rows.

    Special values: a NaN makes its row NaN. An infinity becomes NaN and the rest of its row signed zeros, as after an
        overflow of the sum of squares. A row of zeros gives signed zeros for eps > 0 and NaN for eps = 0.

    Sharding: rows shared out over any mesh axes need no communication, and y lies where x lies; dweight is summed over
        the shards in float32. A last axis that is split is not gathered: each shard adds up its own columns, a psum of
        one float32 a row adds up the shards, and XLA compiles it. The order of that sum has one level more, so the last
        bit of rstd depends on the number of shards.

    Differentiation: reverse mode, also of second order, under jit, vmap, scan and remat; forward mode raises TypeError.
        rstd is kept in float32 between the passes, under the name `RSTD` for checkpoint policies.

    Raises:
        TypeError: an operand is no array, or of another dtype; eps or weight_offset is traced or no real number.
        ValueError: a shape or a value does not fit.
        NotImplementedError: a forced implementation cannot run.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; `LlamaRMSNorm` in Hugging Face's
        transformers.
    """
    y, *rstd = _norm(x, None, weight, eps, cast_before_scale, weight_offset, implementation, return_rstd, axis_name)
    return (y, rstd[0]) if return_rstd else y


@overload
def add_rms_norm(
    x: Float[Array, "*batch n"],
    residual: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    return_rstd: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]: ...
@overload
def add_rms_norm(
    x: Float[Array, "*batch n"],
    residual: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    return_rstd: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"], Float[Array, "*batch"]]: ...
def add_rms_norm(
    x: Float[Array, "*batch n"],
    residual: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    implementation: Implementation | None = None,
    return_rstd: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, "*batch n"], ...]:
    """s = round(x + residual); y = rms_norm(s): the residual form of every decoder layer, in one kernel.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32.
        residual: `[..., n]`, of the dtype of x.
        weight, eps, cast_before_scale, weight_offset, implementation, return_rstd, axis_name: as for `rms_norm`.

    Returns: (y, s), with return_rstd (y, s, rstd). s has the dtype of x and is rounded before it is normalised, so the
        bits are those of `s = x + residual; y = rms_norm(s, weight)`, forward, and backward in bfloat16 and float16. In
        float32 the compiler fuses the last product of the backward pass with the addition of the gradient of s.

    Raises: as `rms_norm`; TypeError also where residual is None.

    Source: `LlamaDecoderLayer` in Hugging Face's transformers, where the addition and the norm are two steps.
    """
    _validate.given("residual", residual)
    return _norm(x, residual, weight, eps, cast_before_scale, weight_offset, implementation, return_rstd, axis_name)


def _aligned_norm(operands: dict[str, jax.Array], spec: Spec, with_rstd: bool) -> dict[str, jax.Array]:  # noqa: FBT001
    return _autodiff.norm(_sharding.aligned(operands), spec, with_rstd)


# A call outside any jit would trace its kernel, and compile for each platform, again every time (60 ms on a CPU).
# Inside a transformation this would only hide rstd's name from checkpoint policies (jax 0.12).
_jitted = jax.jit(_aligned_norm, static_argnums=(1, 2))


def _norm(
    x: Any,
    residual: Any,
    weight: Any,
    eps: Any,
    cast_before_scale: Any,
    weight_offset: Any,
    implementation: Any,
    return_rstd: Any,
    axis_name: Any,
) -> tuple[jax.Array, ...]:
    operands = _compat.vary_alike(_validate.arrays(x, residual, weight))
    spec = Spec(
        eps=_validate.eps(eps),
        cast_before_scale=_validate.flag("cast_before_scale", cast_before_scale),
        weight_offset=_validate.weight_offset(weight_offset, weight),
        implementation=_validate.implementation(implementation),
        axis_name=_validate.axis_name(axis_name),
    )
    with_rstd = _validate.flag("return_rstd", return_rstd)
    traced = any(isinstance(operand, jax.core.Tracer) for operand in operands.values())
    results = (_aligned_norm if traced else _jitted)(operands, spec, with_rstd)
    if with_rstd:
        results |= {"rstd": lax.stop_gradient(results["rstd"])}
    return tuple(results[name] for name in ("y", "s", "rstd") if name in results)


def explain(
    x: Float[Array, "*batch n"] | jax.ShapeDtypeStruct, *, implementation: Implementation | None = None
) -> _dispatch.Explanation:
    """Which path rms_norm(x, implementation=implementation) takes on each platform, and why; str() of it is a sentence.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32: an array or a jax.ShapeDtypeStruct. Nothing is computed.
        implementation: as for `rms_norm`.

    Raises:
        TypeError: x is no array, or of another dtype.
        ValueError: x has no last axis or an empty one, or implementation is none of the names.
        NotImplementedError: a forced implementation has no kernel for n, or none with this JAX.
    """
    _validate.rows("x", x)
    return _dispatch.explain(x.shape[-1], np.dtype(x.dtype), _validate.implementation(implementation))
