"""The public functions of heads that are normalised and rotated: validate, then call what can be differentiated."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.core

from . import _compat, _rope, _rope_autodiff, _sharding, _validate, _validate_rope
from ._spec import Implementation, Spec

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_jitted = jax.jit(_rope_autodiff.rope, static_argnums=(1, 2))  # as _api's


def rms_norm_rope(
    q: Float[Array, "*batch q_heads n"],
    k: Float[Array, "*batch k_heads n"],
    cos: Float[Array, "... n"],
    sin: Float[Array, "... n"],
    q_weight: Float[Array, " n"] | None = None,
    k_weight: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch q_heads n"], Float[Array, "*batch k_heads n"]]:
    """rotate(rms_norm(q, q_weight)), rotate(rms_norm(k, k_weight)): q and k norm with rotary embedding, in one kernel.

    Each head is normalised as `rms_norm` does, then rotated as Hugging Face's `apply_rotary_pos_emb` does:
    y * cos + rotate_half(y) * sin, with rotate_half((y1, y2)) = (-y2, y1).

    Arguments:
        q, k: the heads of each token, `[..., heads, n]`, of one dtype, with the same leading axes. n is even.
        cos, sin: `[..., n]`, of the dtype of y = rms_norm(q, q_weight): a row for each token. Their leading axes are
            those of q before its heads, or the last ones of them, after any axes of size 1: `[positions, n]` and
            `[1, positions, n]` fit a q of `[batch, positions, heads, n]`.
        q_weight, k_weight: `[n]`, of one dtype, or both None.
        eps, cast_before_scale, weight_offset, implementation: as for `rms_norm`.

    Returns: q and k rotated, in the dtype of y.

    Rounding: y is rounded to its dtype, then y * cos, rotate_half(y) * sin, and their sum, each once more, to the same
        dtype: the bits of the steps. `pallas_norm.rope_reference` has the statements.

    Special values: as the steps have them.

    Sharding: inside shard_map the kernel runs on local heads. In other programs of several devices XLA compiles the
        reference, and divides it. On Explicit axes a last axis that is split is gathered first: halves of a head meet.

    Differentiation: reverse mode, twice, of q, k and the weights, with the bits of the steps: the gradient of the
        rotation with Hugging Face's roundings, then that of the norm; in one kernel and the sums of dweight, where
        there is one (docs/rope.md). cos and sin have none: NotImplementedError.

    Raises:
        TypeError: an operand is no array or of another dtype.
        ValueError: a shape or a value does not fit, one weight is given without the other, or n is odd.
        NotImplementedError: a derivative of cos or sin is asked for, or a forced implementation cannot run.

    Example:
        q, k = rms_norm_rope(q, k, cos, sin, q_weight, k_weight)

    Source: `Qwen3Attention.forward` and `apply_rotary_pos_emb` in Hugging Face's transformers.
    """
    pair = {"q": q, "k": k}
    options: dict[str, Any] = {"eps": eps, "cast_before_scale": cast_before_scale, "weight_offset": weight_offset}
    return _rotated(pair, cos, sin, (q_weight, k_weight), None, options, implementation)


def rms_norm_rope_qkv(
    qkv: Float[Array, "*batch heads n"],
    cos: Float[Array, "... n"],
    sin: Float[Array, "... n"],
    q_weight: Float[Array, " n"] | None = None,
    k_weight: Float[Array, " n"] | None = None,
    *,
    q_heads: int,
    k_heads: int,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "*batch q_heads n"], Float[Array, "*batch k_heads n"]]:
    """`rms_norm_rope` of q and k where a fused projection has left them, which are read there.

    Arguments:
        qkv: `[..., heads, n]`: q's heads, then k's, then any others, such as v's, which are not read.
        q_heads, k_heads: how many q and k have.
        cos, sin, q_weight, k_weight, eps, cast_before_scale, weight_offset, implementation: as for `rms_norm_rope`.

    Returns: q and k, as `rms_norm_rope`.

    Raises: as `rms_norm_rope`; also where q_heads or k_heads is no positive int, or qkv has fewer heads.

    Example:
        q, k = rms_norm_rope_qkv(qkv, cos, sin, q_weight, k_weight, q_heads=32, k_heads=8)  # qkv [..., 48, n]

    Source: as `rms_norm_rope`.
    """
    heads = _count("q_heads", q_heads), _count("k_heads", k_heads)
    options: dict[str, Any] = {"eps": eps, "cast_before_scale": cast_before_scale, "weight_offset": weight_offset}
    return _rotated({"qkv": qkv}, cos, sin, (q_weight, k_weight), heads, options, implementation)


def _count(name: str, value: Any) -> int:
    if not _validate.is_int(value):
        raise TypeError(f"{name} is {_validate.describe(value)}; needed an int: a number of heads")
    if value < 1:
        raise ValueError(f"{name} is {value}; needed at least one head")
    return int(value)


def _rotated(
    tensors: dict[str, Any],
    cos: Any,
    sin: Any,
    weights: tuple[Any, Any],
    heads: tuple[int, int] | None,
    options: dict[str, Any],
    implementation: Any,
) -> tuple[Any, Any]:
    named = dict(zip(_rope.WEIGHTS, weights, strict=True))
    spec = Spec(
        eps=_validate.eps(options["eps"]),
        cast_before_scale=_validate.flag("cast_before_scale", options["cast_before_scale"]),
        weight_offset=_validate.weight_offset(options["weight_offset"], weights[0]),
        implementation=_validate.implementation(implementation),
    )
    given = _operands(tensors | {"cos": cos, "sin": sin}, named, heads, spec)
    # Halves of a head meet, so no part of one is rotated alone.
    given = {name: _sharding.last_axis_whole(value) for name, value in given.items()}
    operands = _compat.vary_alike(given, weights=_rope.WEIGHTS)
    traced = any(isinstance(operand, jax.core.Tracer) for operand in operands.values())
    results: Any = (_rope_autodiff.rope if traced else _jitted)(operands, spec, heads)
    return results["q_out"], results["k_out"]


def _operands(
    rows: dict[str, Any], weights: dict[Any, Any], heads: tuple[int, int] | None, spec: Spec
) -> dict[str, jax.Array]:
    found = {name: _validate.array(name, value) for name, value in rows.items()}
    first = found[name := "qkv" if heads else "q"]
    if not all(map(_validate.is_int, first.shape[-2 if heads else -1 :])):  # a symbolic dimension of jax.export, say
        what = "last two axes" if heads else "last axis"
        found_as = _validate.describe(first)
        raise TypeError(f"{name} is {found_as}; needed ints as its {what}: a kernel is compiled for it")
    found |= {name: _validate.array(name, value) for name, value in weights.items() if value is not None}
    angles = {name: found.pop(name) for name in _rope.ANGLES}
    found = {name: _validate.settled(value, first) for name, value in found.items()}
    weight = found.get("q_weight")
    y_dtype = spec.dtypes(first.dtype, weight=None if weight is None else weight.dtype).y
    found |= {name: value.astype(y_dtype) if value.weak_type else value for name, value in angles.items()}
    _validate_rope.fit(weights | found, heads, y_dtype, _validate.describe)
    for name in _rope.ANGLES:
        found[name] = found[name].reshape(_validate_rope.without_ones(found[name].shape))
    return found
