"""The public functions: validate, then call what can be differentiated, batched and sharded."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# (It takes _autodiff and _dispatch, from which __init__.py imports, for private names of that file; jax.jit has few
# types.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import jax
import jax.core
from jax import lax

from . import _autodiff, _compat, _dispatch, _validate
from ._spec import Implementation, Spec

if TYPE_CHECKING:
    from typing import Unpack

    from jax.typing import DTypeLike
    from jaxtyping import Array, Float


class _NormOptions(TypedDict, total=False):
    """The arguments with defaults that say nothing of what is returned."""

    eps: float
    cast_before_scale: bool
    weight_offset: float
    out_dtype: DTypeLike | None
    unit_dtype: DTypeLike | None
    round_weight: bool
    in_place: bool
    implementation: Implementation | None
    axis_name: str | tuple[str, ...] | None


class _AddOptions(_NormOptions, total=False):
    s_dtype: DTypeLike | None


@overload
def rms_norm(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    return_rstd: Literal[False] = False,
    **options: Unpack[_NormOptions],
) -> Float[Array, "*batch n"]: ...
@overload
def rms_norm(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    return_rstd: Literal[True],
    **options: Unpack[_NormOptions],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch"]]: ...
def rms_norm(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: DTypeLike | None = None,
    unit_dtype: DTypeLike | None = None,
    round_weight: bool = False,
    in_place: bool = False,
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
        out_dtype: that of y, to which the product is rounded, once: so a float32 weight leaves y in bfloat16.
        unit_dtype: what the normalised x is rounded to before the weight multiplies it, by default the dtype of x.
            float32 is cast_before_scale=False by another name.
        round_weight: rounds the weight to unit_dtype in the kernel, before weight_offset is added: a float32 weight
            that is trained, in a model that computes in bfloat16. The bits are those of a weight that was cast, but
            dweight is that of the float32 weight, and was never rounded to bfloat16.
        in_place: has the kernel write y to the memory of x, if that has the dtype of y. Values never change: XLA copies
            an x first that is read later, as in a program that does not donate it, or under a gradient. Needs jax 0.11,
            and rows that fill the kernel's blocks and are read once; otherwise y gets memory of its own.
        implementation: None takes the Mosaic GPU kernel where the program is lowered for an NVIDIA GPU of compute
            capability 8.0 or newer (9.0 with jax 0.10) and n has a kernel there, and lets XLA compile the reference
            elsewhere; `explain` tells which. "mosaic_gpu" or "xla" forces one. "interpret" runs the kernel in Pallas's
            interpreter, on a CPU, for tests.
        return_rstd: also return rstd = 1 / sqrt(mean(x^2) + eps), `[...]` in float32. No gradient flows through it.
        axis_name: inside jax.shard_map, the mesh axis or axes over which the rows themselves are split; x and weight
            are then the columns of this shard, n those of all shards. XLA compiles this form.

    Returns: y, `[..., n]`, of dtype out_dtype, by default promote_types(x, weight): a float32 weight makes a bfloat16 x
        float32, as in Hugging Face, unless round_weight makes it a bfloat16 one. With return_rstd, (y, rstd).

    Rounding: sums, rstd and products in float32; the normalised x is rounded to unit_dtype, and y to its own dtype. The
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
        TypeError: an operand is no array, or of another dtype, as an option is that names one; eps or weight_offset is
            traced or no real number.
        ValueError: a shape or a value does not fit, or cast_before_scale=False and a unit_dtype contradict each other,
            or axis_name is no axis of a jax.shard_map around the call.
        NotImplementedError: a forced implementation cannot run.

    Example:
        y = rms_norm(x, weight, eps=1e-5)  # jit, grad and vmap as of any function

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019; `LlamaRMSNorm` in Hugging Face's
        transformers.
    """
    y, *rstd = _norm(
        (x, None, weight),
        eps=eps,
        cast_before_scale=cast_before_scale,
        weight_offset=weight_offset,
        dtypes={"out_dtype": out_dtype, "unit_dtype": unit_dtype},
        round_weight=round_weight,
        in_place=in_place,
        implementation=implementation,
        return_rstd=return_rstd,
        axis_name=axis_name,
    )
    return (y, rstd[0]) if return_rstd else y


@overload
def add_rms_norm(
    x: Float[Array, "*batch n"],
    residual: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    return_rstd: Literal[False] = False,
    **options: Unpack[_AddOptions],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]: ...
@overload
def add_rms_norm(
    x: Float[Array, "*batch n"],
    residual: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    return_rstd: Literal[True],
    **options: Unpack[_AddOptions],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"], Float[Array, "*batch"]]: ...
def add_rms_norm(
    x: Float[Array, "*batch n"],
    residual: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: DTypeLike | None = None,
    unit_dtype: DTypeLike | None = None,
    round_weight: bool = False,
    s_dtype: DTypeLike | None = None,
    in_place: bool = False,
    implementation: Implementation | None = None,
    return_rstd: bool = False,
    axis_name: str | tuple[str, ...] | None = None,
) -> (
    tuple[Float[Array, "*batch n"], Float[Array, "*batch n"]]
    | tuple[Float[Array, "*batch n"], Float[Array, "*batch n"], Float[Array, "*batch"]]
):
    """s = round(x + residual); y = rms_norm(s): the residual form of every decoder layer, in one kernel.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32.
        residual: `[..., n]`, bfloat16, float16 or float32: its dtype may differ from that of x, as that of a float32
            residual stream does.
        s_dtype: that of s, by default the residual's.
        in_place: as for `rms_norm`; s goes to the memory of the residual in the same way.
        weight, eps, cast_before_scale, weight_offset, out_dtype, unit_dtype, round_weight, implementation, return_rstd,
            axis_name: as for `rms_norm`, of s in the place of x.

    Returns: (y, s), with return_rstd (y, s, rstd). s is the float32 sum, rounded before it is normalised, so the bits
        are those of `s = x + residual; y = rms_norm(s, weight)`, forward and backward.

    Differentiation: as `rms_norm`. The gradient of s is rounded to the dtype of s, and from there to that of x, and to
        that of the residual, where these are others.

    Raises: as `rms_norm`; TypeError also where residual is None.

    Example:
        y, s = add_rms_norm(x, residual, weight)  # s is the residual of the next layer

    Source: `LlamaDecoderLayer` in Hugging Face's transformers, where the addition and the norm are two steps.
    """
    _validate.given("residual", residual)
    y, s, *rstd = _norm(
        (x, residual, weight),
        eps=eps,
        cast_before_scale=cast_before_scale,
        weight_offset=weight_offset,
        dtypes={"out_dtype": out_dtype, "unit_dtype": unit_dtype, "s_dtype": s_dtype},
        round_weight=round_weight,
        in_place=in_place,
        implementation=implementation,
        return_rstd=return_rstd,
        axis_name=axis_name,
    )
    return (y, s, rstd[0]) if return_rstd else (y, s)


def _norm(
    given: tuple[Any, Any, Any],
    *,
    eps: Any,
    cast_before_scale: Any,
    weight_offset: Any,
    dtypes: dict[str, Any],
    round_weight: Any,
    in_place: Any,
    implementation: Any,
    return_rstd: Any,
    axis_name: Any,
) -> tuple[jax.Array, ...]:
    """given: x, residual and weight."""
    *_, weight = given
    operands = _compat.vary_alike(_validate.arrays(*given))
    cast_before_scale, unit_dtype = _validate.unit(cast_before_scale, dtypes["unit_dtype"])
    spec = Spec(
        eps=_validate.eps(eps),
        cast_before_scale=cast_before_scale,
        weight_offset=_validate.weight_offset(weight_offset, weight),
        unit_dtype=unit_dtype,
        round_weight=_validate.round_weight(round_weight, weight),
        implementation=_validate.implementation(implementation),
        axis_name=_validate.axis_name(axis_name),
        out_dtype=_validate.rounding_dtype("out_dtype", dtypes["out_dtype"]),
        s_dtype=_validate.rounding_dtype("s_dtype", dtypes.get("s_dtype")),
        in_place=_validate.flag("in_place", in_place),
    )
    with_rstd = _validate.flag("return_rstd", return_rstd)
    traced = any(isinstance(operand, jax.core.Tracer) for operand in operands.values())
    results = (_autodiff.norm if traced else _autodiff.jitted)(operands, spec, with_rstd)
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

    Example:
        print(explain(x))
    """
    _validate.rows("x", x)
    return _dispatch.explain(x, _validate.implementation(implementation))
