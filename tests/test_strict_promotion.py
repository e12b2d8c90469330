"""Who has JAX widen and broadcast nothing by itself can use every function. conftest.py runs all tests under these
flags; here it is shown that they are on, and that no public function needs them off.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import dlpack, gated_reference, quantized_reference, reference, rope_reference
from pallas_norm._dtypes import Dtypes

equinox = pytest.importorskip("equinox", reason="needs equinox (pip install equinox)")
nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")
MODULES = {name: importlib.import_module(f"pallas_norm.{name}").RMSNorm for name in ("nnx", "linen", "equinox")}

# Several dtypes and ranks beside each other: what JAX would promote by itself.
N = 128
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, N)), jnp.bfloat16)
HALF, WIDE, RSTD = X.astype(jnp.float16), X.astype(jnp.float32), jnp.ones((2, 3), jnp.float32)
WEIGHT = jnp.linspace(0.5, 1.5, N, dtype=jnp.float32)
MODEL = equinox.nn.RMSNorm(N, use_bias=False, dtype=jnp.float32)


def gradients(function: Callable[..., Any], *operands: Any, **options: Any) -> Any:
    """Also of second order: of the sum, whose cotangents are ones."""

    def once(*operands: Any) -> Any:
        results, pullback = jax.vjp(lambda *operands: function(*operands, **options), *operands)
        return results, pullback(jax.tree.map(jnp.ones_like, results))

    results, pullback = jax.vjp(once, *operands)
    return pullback(jax.tree.map(jnp.ones_like, results))


def each_way(function: Callable[..., Any], *operands: Any) -> Any:
    options = {"weight_offset": 1.0}, {"round_weight": True}, {"cast_before_scale": False, "return_rstd": True}
    return (
        [gradients(function, *operands, implementation="xla", **one) for one in options],
        jax.vjp(lambda *operands: function(*operands, implementation="interpret"), *operands)[1],
        jax.vmap(function)(*operands[:-1], jnp.stack([WEIGHT, WEIGHT])),
        jax.jit(lambda *operands: gradients(function, *operands)).trace(*operands).lower(lowering_platforms=("cuda",)),
    )


def eight_bits(function: Callable[..., Any], *operands: Any) -> Any:
    given: list[dict[str, Any]] = [{}, {"scale": 0.5, "dtype": jnp.int8}, {"group_size": N, "return_y": True}]
    return (
        [function(*operands, implementation=way, **one) for one in given for way in ("xla", "interpret")],
        jax.vmap(function)(*operands[:-1], jnp.stack([WEIGHT, WEIGHT])),
        [jax.jit(lambda *operands: function(*operands)).trace(*operands).lower(lowering_platforms=("cuda",))],
    )


FORM = gated_reference.Form("silu", norm_before_gate=True, group=32)
GATED: list[dict[str, Any]] = [
    {"cast_before_scale": False, "weight_offset": 1.0},
    {"norm_before_gate": False, "activation": "sigmoid", "group_size": 32},
]


def gated(*operands: Any) -> Any:
    function, (x, *_, weight) = pallas_norm.rms_norm_gated, operands
    return (
        [gradients(function, *operands, **one) for one in GATED],
        jax.vjp(lambda *operands: function(*operands, implementation="interpret"), x, x, weight)[1],
        jax.vmap(function)(*operands[:-1], jnp.stack([weight, weight])),
        jax.jit(lambda *operands: gradients(function, *operands)).trace(*operands).lower(lowering_platforms=("cuda",)),
    )


def rope(function: Callable[..., Any], *heads: Any, **options: Any) -> Any:
    """Angles of y's dtype, which a float32 weight makes float32."""
    rest = *([jnp.ones((3, N), jnp.float32)] * 2), WEIGHT, WEIGHT

    def run(*heads: Any, implementation: Any = None) -> Any:
        return function(*heads, *rest, weight_offset=1.0, implementation=implementation, **options)

    return (
        gradients(run, *heads, implementation="xla"),
        run(*heads, implementation="interpret"),
        jax.vmap(run)(*heads),
        jax.jit(lambda *heads: gradients(run, *heads)).trace(*heads).lower(lowering_platforms=("cuda",)),
    )


CALLS: dict[str, Callable[[], Any]] = {
    "rms_norm": lambda: [each_way(pallas_norm.rms_norm, x, WEIGHT) for x in (X, HALF)],
    "add_rms_norm": lambda: each_way(pallas_norm.add_rms_norm, X, WIDE, WEIGHT),
    "rms_norm_quantized": lambda: eight_bits(pallas_norm.rms_norm_quantized, X, WEIGHT),
    "add_rms_norm_quantized": lambda: eight_bits(pallas_norm.add_rms_norm_quantized, X, WIDE, WEIGHT),
    "rms_norm_gated": lambda: gated(X, WIDE, WEIGHT),
    "rms_norm_rope": lambda: rope(pallas_norm.rms_norm_rope, X[:, :, None], X[:, :, None]),
    "rms_norm_rope_qkv": lambda: rope(
        pallas_norm.rms_norm_rope_qkv, jnp.stack([X, X, X], axis=2), q_heads=1, k_heads=1
    ),
    "explain": lambda: str(pallas_norm.explain(X)),
    "plan_for": lambda: pallas_norm.plan_for(N, jnp.float16),
    "patch": lambda: pallas_norm.patch(MODEL)[0](WIDE[0, 0]),
    "unpatch": lambda: pallas_norm.unpatch(pallas_norm.patch(MODEL)[0])[0],
    "dlpack.rms_norm": lambda: dlpack.rms_norm(np.asarray(WIDE), np.asarray(WEIGHT)),
    "nnx.RMSNorm": lambda: MODULES["nnx"](N, rngs=nnx.Rngs(0))(X),
    "linen.RMSNorm": lambda: MODULES["linen"]().init_with_output(jax.random.key(0), X),
    "equinox.RMSNorm": lambda: MODULES["equinox"](N, use_bias=False)(X[0, 0]),
    "reference.add": lambda: reference.add(X, WIDE),
    "reference.backward": lambda: reference.backward(X, WEIGHT, RSTD, WIDE, X, weight_offset=1.0),
    "reference.forward": lambda: reference.forward(X, WEIGHT, weight_offset=1.0),
    "reference.input_gradient": lambda: reference.input_gradient(X, WEIGHT, RSTD, WIDE),
    "reference.narrowed": lambda: reference.narrowed(WIDE, jnp.float16),
    "reference.passed_on": lambda: reference.passed_on(WIDE, reference.GradientDtypes("float16", "bfloat16")),
    "reference.round_to": lambda: [reference.round_to(WIDE, dtype) for dtype in ("bfloat16", "float16", "float32")],
    "reference.scale": lambda: reference.scale(WEIGHT, 1.0, jnp.float16),
    "reference.weight_gradient": lambda: reference.weight_gradient(X, RSTD, WIDE),
    "quantized_reference.amax": lambda: quantized_reference.amax(X, 32),
    "quantized_reference.by_group": lambda: quantized_reference.by_group(X, "float8_e4m3fn", 32),
    "quantized_reference.by_scale": lambda: quantized_reference.by_scale(X, RSTD[..., None], "int8"),
    "quantized_reference.cast": lambda: [quantized_reference.cast(WIDE, q) for q in quantized_reference.LARGEST],
    "quantized_reference.largest": lambda: quantized_reference.largest(jnp.abs(WIDE)),
    "quantized_reference.quotient": lambda: quantized_reference.quotient(WIDE, WIDE),
    "quantized_reference.scale_of": lambda: quantized_reference.scale_of(RSTD, "int8"),
    "gated_reference.forward": lambda: gated_reference.forward(X, WIDE, WEIGHT, FORM, eps=1e-6, weight_offset=1.0),
    "gated_reference.gradients": lambda: gated_reference.gradients(
        X, WIDE, WEIGHT, jnp.ones((2, 3, 4), jnp.float32), WIDE, FORM, weight_offset=1.0
    ),
    "gated_reference.grouped": lambda: gated_reference.grouped(X, 32),
    "gated_reference.product_dtype": lambda: gated_reference.product_dtype(Dtypes.of("bfloat16", weight="float16")),
    "rope_reference.rotate_half": lambda: rope_reference.rotate_half(X),
    "rope_reference.rotated": lambda: rope_reference.rotated(X[:, :, None], X[0], X[1]),
    "rope_reference.rotated_back": lambda: rope_reference.rotated_back(HALF[:, :, None], HALF[0], HALF[1]),
    "gated_reference.weight_gradient": lambda: gated_reference.weight_gradient(WIDE),
}


def public() -> set[str]:
    """Functions by the module that they are of; and the classes that a model is made of."""
    found = {name for name, value in vars(pallas_norm).items() if inspect.isfunction(value)}
    for module in (reference, quantized_reference, gated_reference, rope_reference, dlpack):
        home = module.__name__
        own = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == home}
        found |= {
            f"{home.partition('.')[2]}.{name}"
            for name in own | ({"quotient"} & set(vars(module)))
            if name[0] != "_" and not inspect.isclass(vars(module)[name])
        }
    return found | {f"{home}.RMSNorm" for home in MODULES}


def test_no_public_function_is_left_out() -> None:
    assert set(CALLS) == public()


@pytest.mark.sampled(39)
@pytest.mark.parametrize("name", CALLS)
def test_a_function_leaves_no_promotion_to_jax(name: str) -> None:
    with pytest.raises(jax.dtypes.TypePromotionError):
        X * RSTD[..., None]
    with pytest.raises(ValueError, match="jax_numpy_rank_promotion='raise'"):
        WIDE * WEIGHT
    assert CALLS[name]() is not None
