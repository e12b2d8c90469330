"""The public function of a gated norm: validate, then call what can be differentiated, batched and sharded."""

# pyright: reportPrivateUsage=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.core

from . import _compat, _gated_autodiff, _validate
from ._activation import ACTIVATIONS
from ._spec import Implementation, Spec
from .gated_reference import Form

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

_jitted = jax.jit(_gated_autodiff.norm, static_argnums=(1, 2))  # as _api's


def rms_norm_gated(
    x: Float[Array, "*batch n"],
    gate: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    activation: str = "silu",
    norm_before_gate: bool = True,
    group_size: int | None = None,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch n"]:
    """y = rms_norm(x, weight) * silu(gate), or rms_norm(x * silu(gate), weight): a norm and a gate in one kernel, with
    Hugging Face's rounding.

    Arguments:
        x: `[..., n]`, bfloat16, float16 or float32.
        gate: `[..., n]`, one of these dtypes, which may be another than that of x.
        weight, eps, cast_before_scale, weight_offset, implementation: as for `rms_norm`.
        activation: "silu" or "sigmoid".
        norm_before_gate: True multiplies the norm by the activated gate, False normalises the product of x with it.
        group_size: of neighbouring elements that are normalised together; it has to divide n. None: the whole row.
        out_dtype: that of y; None: promote_types(x, weight).

    Rounding: the activation is computed in float32, and so is its product with x, which is not rounded. x * rstd is
        rounded to the dtype of x, with cast_before_scale=False it is not. Before a gate that follows, its product with
        the weight is rounded to the dtype to which torch would promote the two. y is rounded once more.
        `pallas_norm.gated_reference` has the statements, and `_activation` those of silu and sigmoid: kernels, the
        interpreter and XLA have the same bits. silu is within 4 units in the last place of float32 of the true value,
        and within 5 of torch's.

    Special values: as in torch silu(-inf) is NaN and sigmoid(-inf) 0. Below about -87.34 sigmoid is 0, and silu is -0,
        where torch's is a small normal number, of a magnitude of 1e-36 or less, down to about -88.7.

    Sharding: rows shared out over any mesh axes need no communication; a last axis that is split is gathered first.

    Differentiation: reverse mode, of any order; in one kernel where x and gate have one dtype.

    Raises:
        TypeError: an operand is no array or of another dtype; another argument is of another type.
        ValueError: a shape or a value does not fit.
        NotImplementedError: a forced implementation cannot run.

    Example:
        y = rms_norm_gated(x, gate, weight)                                             # Qwen3-Next
        y = rms_norm_gated(x, gate, weight, norm_before_gate=False, group_size=512)     # Mamba2, in groups

    Source: the bodies that docs/gated.md lists, of Hugging Face's transformers.
    """
    _validate.given("gate", gate, "no gate")
    operands = _validate.arrays(x, gate, weight, beside="gate")
    n = operands["x"].shape[-1]
    form = Form(
        activation_of(activation), _validate.flag("norm_before_gate", norm_before_gate), group_of(n, group_size)
    )
    cast_before_scale, _ = _validate.unit(cast_before_scale, None)
    spec = Spec(
        eps=_validate.eps(eps),
        cast_before_scale=cast_before_scale,
        weight_offset=_validate.weight_offset(weight_offset, weight),
        implementation=_validate.implementation(implementation),
        out_dtype=_validate.rounding_dtype("out_dtype", out_dtype),
    )
    operands = _compat.vary_alike(operands)
    traced = any(isinstance(operand, jax.core.Tracer) for operand in operands.values())
    return (_gated_autodiff.norm if traced else _jitted)(operands, spec, form)


def activation_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f'activation is {_validate.describe(value)}; needed "silu" or "sigmoid"')
    if value not in ACTIVATIONS:
        raise ValueError(f'activation is {value!r}; needed "silu" or "sigmoid"')
    return value


def group_of(n: int, group_size: Any) -> int:
    """Elements that are normalised together."""
    if group_size is None:
        return n
    if not _validate.is_int(group_size):
        raise TypeError(f"group_size is {_validate.describe(group_size)}; needed None or an int")
    if group_size < 1 or n % group_size:
        raise ValueError(
            f"group_size is {group_size} but the last axis of x has length {n}; needed a number that divides it: "
            "pass group_size=None to normalise whole rows"
        )
    return int(group_size)
