"""Normalised and rotated heads on a GPU, forward and backward: every bit against the oracle, or of a gradient against
the specification's program; times beside a copy kernel of the same bytes and the same steps unfused.

    python -m bench.rope OUT.json [--short] [--commit=SHA]    --short: fewer shapes
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_norm import rms_norm, rms_norm_rope, rms_norm_rope_qkv, rope_reference
from tests import oracle, rope_oracle

from . import copy_kernel, results, timing

Array = np.ndarray[Any, Any]


class Shape(NamedTuple):
    tokens: int
    q_heads: int
    k_heads: int
    n: int


# Qwen3 8B and 30B-A3B with 128 elements a head, others with 64, 96 and 256; the last ones are decode steps.
SHAPES = (
    Shape(16384, 32, 8, 128),
    Shape(4096, 32, 8, 128),
    Shape(16384, 32, 4, 128),
    Shape(16384, 16, 8, 64),
    Shape(8192, 32, 8, 96),
    Shape(8192, 16, 4, 256),
    Shape(64, 32, 8, 128),
    Shape(1, 32, 8, 128),
)
OF_BITS = (
    Shape(37, 5, 3, 32),
    Shape(37, 5, 3, 64),
    Shape(37, 5, 3, 96),
    Shape(37, 5, 3, 128),
    Shape(64, 32, 8, 128),
    Shape(1, 3, 1, 128),
    Shape(37, 5, 3, 192),
    Shape(37, 5, 3, 256),
    Shape(37, 5, 3, 512),
    Shape(37, 5, 3, 50),
)
LEAVES = ("q", "k", "q_weight", "k_weight")
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def operands(shape: Shape, dtype: Any, *, positions: int = 0) -> dict[str, Array]:
    """Rows of several magnitudes, one with a NaN, one with an infinity, one of zeros; angles of every size."""
    tokens, q_heads, k_heads, n = shape
    rng = np.random.default_rng(n)
    made: dict[str, Array] = {}
    for name, heads in (("q", q_heads), ("k", k_heads)):
        x = rng.standard_normal((tokens, heads, n)) * 2.0 ** rng.integers(-4, 5, (tokens, heads, 1))
        x[tokens // 2, 0], x[tokens // 3, -1, 0], x[tokens // 4, 0, -1] = 0, np.nan, np.inf
        made[name] = x.astype(dtype)
    angles = rng.uniform(0, 2 * np.pi, (positions or tokens, n))
    made |= {"cos": np.cos(angles).astype(dtype), "sin": (np.sin(angles) * 2.0**-130).astype(dtype)}
    made["sin"][::2] = np.sin(angles[::2]).astype(dtype)
    weights = {name: (rng.standard_normal(n) * 2.0 ** rng.integers(-3, 4, n)).astype(dtype) for name in "qk"}
    return made | {f"{name}_weight": weight for name, weight in weights.items()}


def compare(shape: Shape, dtype: Any, implementation: str | None) -> Iterator[tuple[str, bool]]:
    given = operands(shape, dtype, positions=1 if shape.tokens == 1 else shape.tokens)
    fused = {name: value for name, value in given.items() if name not in "qk"}
    fused["qkv"] = np.concatenate([given["q"], given["k"], given["k"]], axis=1)
    calls: dict[str, Callable[[], Any]] = {
        "apart": lambda: jax.jit(functools.partial(rms_norm_rope, implementation=implementation))(**given),
        "qkv": lambda: jax.jit(
            functools.partial(
                rms_norm_rope_qkv, q_heads=shape.q_heads, k_heads=shape.k_heads, implementation=implementation
            )
        )(**fused),
    }
    for form, call in calls.items():
        what = f"{implementation or 'kernel'} {form} {tuple(shape)} {np.dtype(dtype).name}"
        try:
            for name, found in zip("qk", call(), strict=True):
                y = jax.jit(functools.partial(rms_norm, implementation=implementation))(
                    given[name], given[f"{name}_weight"]
                )
                expected = rope_oracle.rotated(np.asarray(y), given["cos"], given["sin"])
                oracle.assert_same(np.asarray(found), expected)
            yield what, True
        except AssertionError as error:
            print(what, str(error)[:200])
            yield what, False


def pulled_back(function: Any, given: dict[str, Any], dr: Any) -> Callable[[], Any]:
    """The gradients of q, k and the weights."""
    cos, sin, leaves = given["cos"], given["sin"], [given[name] for name in LEAVES]

    def gradients(dr: Any, cos: Any, sin: Any, *leaves: Any) -> Any:
        return jax.vjp(lambda q, k, *weights: function(q, k, cos, sin, *weights), *leaves)[1](dr)

    return functools.partial(jax.jit(gradients), dr, cos, sin, *leaves)


def compare_gradients(shape: Shape, dtype: Any) -> Iterator[tuple[str, bool]]:
    given = operands(shape, dtype)
    dr = tuple(operands(shape._replace(n=2 * shape.n), dtype)[name][..., : shape.n] for name in "qk")
    what = f"gradients {tuple(shape)} {np.dtype(dtype).name}"
    kernel, by_xla = (functools.partial(rms_norm_rope, implementation=name) for name in (None, "xla"))
    try:
        for found, expected in zip(*(pulled_back(one, given, dr)()[:2] for one in (kernel, by_xla)), strict=True):
            oracle.assert_same(np.asarray(found), np.asarray(expected))
        yield what, True
    except AssertionError as error:
        print(what, str(error)[:200])
        yield what, False


def bits() -> dict[str, bool]:
    found: dict[str, bool] = {}
    for shape in OF_BITS:
        for dtype in DTYPES:
            found |= compare(shape, dtype, None)
            found |= compare_gradients(shape, dtype)
    return found | dict(compare(OF_BITS[3], jnp.bfloat16, "xla"))


def unfused(q: Any, k: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any) -> Any:
    y = rms_norm(q, q_weight), rms_norm(k, k_weight)
    return tuple(rope_reference.rotated(one, cos, sin) for one in y)


def unfused_back(dr: Any, cos: Any, sin: Any, *leaves: Any) -> Any:
    """The gradients in steps."""
    dy = tuple(rope_reference.rotated_back(one, cos, sin) for one in dr)
    return jax.vjp(lambda q, k, *weights: tuple(map(rms_norm, (q, k), weights)), *leaves)[1](dy)


def backward_variants(shape: Shape) -> dict[str, Callable[[], Any]]:
    given = {name: jnp.asarray(value) for name, value in operands(shape, jnp.bfloat16).items()}
    dr = given["q"][..., ::-1], given["k"][..., ::-1]
    # The bytes: of x and the gradient both in, of dx out, and of cos and sin.
    size = given["q"].size + given["k"].size + 2 * given["cos"].size // 3
    granule = copy_kernel.granule(jnp.bfloat16)
    source = [jnp.full((-(-size // granule) * granule,), i, jnp.bfloat16) for i in range(2)]
    copy = jax.jit(functools.partial(copy_kernel.copy, outputs=1))
    by_xla = functools.partial(rms_norm_rope, implementation="xla")
    steps = functools.partial(jax.jit(unfused_back), dr, given["cos"], given["sin"], *(given[name] for name in LEAVES))
    return {
        "kernel": pulled_back(rms_norm_rope, given, dr),
        "copy": lambda: copy(source),
        "unfused": steps,
        "xla": pulled_back(by_xla, given, dr),
    }


def variants(shape: Shape) -> dict[str, Callable[[], Any]]:
    given = {name: jnp.asarray(value) for name, value in operands(shape, jnp.bfloat16).items()}
    # The bytes: of q and k both ways, of cos and sin one.
    size = given["q"].size + given["k"].size + given["cos"].size
    granule = copy_kernel.granule(jnp.bfloat16)
    source = [jnp.zeros((-(-size // granule) * granule,), jnp.bfloat16)]
    kernel, by_xla = jax.jit(rms_norm_rope), jax.jit(functools.partial(rms_norm_rope, implementation="xla"))
    copy, steps = jax.jit(functools.partial(copy_kernel.copy, outputs=1)), jax.jit(unfused)
    return {
        "kernel": lambda: kernel(**given),
        "copy": lambda: copy(source),
        "unfused": lambda: steps(**given),
        "xla": lambda: by_xla(**given),
    }


def times(shapes: tuple[Shape, ...]) -> list[dict[str, Any]]:
    flush, found = timing.Flush(), []
    for shape in shapes:
        for backward, of_shape in ((False, variants), (True, backward_variants)):
            measured = timing.measure(of_shape(shape), repetitions=15, flush=flush)
            row = shape._asdict() | {"backward": backward}
            found.append(row | {name: value.row() for name, value in measured.items()})
            us = {name: value.median_us for name, value in measured.items()}
            each = " ".join(f"{name} {value:7.2f}" for name, value in us.items())
            of_copy, gain = us["copy"] / us["kernel"], us["unfused"] / us["kernel"]
            name = f"{tuple(shape)!s:21} {'backward' if backward else 'forward'}"
            print(f"{name:30} {each}  of copy {of_copy:.3f}  against unfused {gain:.2f}", flush=True)
    return found


def main(out: str, *options: str) -> None:
    right = bits()
    print(f"bits: {sum(right.values())} of {len(right)} cases right", flush=True)
    results.write_form(out, right, times(SHAPES[:3] if "--short" in options else SHAPES), options)


if __name__ == "__main__":
    main(*sys.argv[1:])
