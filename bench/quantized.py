"""8-bit results on a GPU: every bit against the oracle, and times beside a copy kernel of the same bytes and the same
steps unfused.

    python -m bench.quantized OUT.json [--short] [--commit=SHA]    --short: fewer widths and shapes
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_norm import add_rms_norm, add_rms_norm_quantized, rms_norm, rms_norm_quantized
from tests import oracle, quantized_oracle

from . import copy_kernel, results, timing

F32 = np.dtype(np.float32)
WIDTHS = (33, 128, 384, 768, 1000, 1024, 1152, 4096, 4097, 5120, 8192, 16384, 32768, 65536, 131072)
OTHER_DTYPES = (128, 1000, 4096, 16384)  # also in float16 and float32
SCALES = (0.02, 3e-39, 1e38, 2.0**70, 0.0, np.inf, np.nan)
SHAPES = ((16384, 4096), (16384, 5120), (8192, 8192), (4096, 16384), (65536, 128), (4096, 4096), (64, 4096))
FORMS: dict[str, dict[str, Any]] = {"tensor": {"scale": F32.type(0.02)}, "row": {}, "group": {"group_size": 128}}


def rows(n: int, dtype: Any) -> np.ndarray[Any, Any]:
    """Normal ones of several magnitudes, one with an outlier, zeros, a NaN, an infinity."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((37, n)) * 2.0 ** rng.integers(-4, 5, (37, 1))
    x[3, n // 2], x[4] = 1000, 0
    x[5, -1], x[6, 0] = np.nan, np.inf
    return x.astype(dtype)


def compare(n: int, dtype: Any, implementation: str | None, *, residual: bool) -> Iterator[tuple[str, bool]]:
    """(what, whether every bit is right) of each form."""
    x, rng = rows(n, dtype), np.random.default_rng(n + 1)
    weight = (rng.standard_normal(n) * 2.0 ** rng.integers(-3, 4, n)).astype(dtype)
    operands = (x, np.roll(x, 1, axis=0), weight) if residual else (x, weight)
    norm = add_rms_norm if residual else rms_norm
    quantized = add_rms_norm_quantized if residual else rms_norm_quantized
    expected = jax.jit(functools.partial(norm, implementation=implementation))(*operands)
    for form in FORMS:
        if form == "group" and n % 128:
            continue
        for kind in quantized_oracle.DTYPES:
            options: dict[str, Any] = {"dtype": kind, "return_y": True, "implementation": implementation}
            group = {"tensor": 0, "row": n, "group": 128}[form]
            options |= {"group_size": 128} if form == "group" else {}
            call = jax.jit(functools.partial(quantized, **options))
            for scale in SCALES if form == "tensor" else (None,):
                given = {} if scale is None else {"scale": F32.type(scale)}
                q, scales, *s, y = (np.asarray(value) for value in call(*operands, **given))
                what = f"{implementation or 'kernel'} {n} {np.dtype(dtype).name} {form} {kind} {scale or ''} {residual}"
                try:
                    oracle.assert_same(y, expected[0] if residual else expected)
                    if residual:
                        oracle.assert_same(s[0], expected[1])
                    quantized_oracle.assert_quantized(y, q, scales, kind, group)
                    yield what, True
                except AssertionError as error:
                    print(what, str(error)[:200])
                    yield what, False


def bits(widths: tuple[int, ...]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for n in widths:
        for dtype in (jnp.bfloat16, *((jnp.float16, jnp.float32) if n in OTHER_DTYPES else ())):
            found |= compare(n, dtype, None, residual=n % 256 == 0)
    for n in (384, 4096):
        found |= compare(n, jnp.bfloat16, "xla", residual=False)
    return found


def plain(y: Any, kind: str, form: str, scale: Any) -> tuple[Any, Any]:
    """A quantiser as one writes it, for XLA."""
    wide = y.astype(jnp.float32)
    largest = 448.0 if kind == "float8_e4m3fn" else 127.0
    parts = wide.reshape(*wide.shape[:-1], -1, 128) if form == "group" else wide
    if form != "tensor":
        scale = jnp.max(jnp.abs(parts), axis=-1, keepdims=True) / largest
    quotient = jnp.clip(parts / scale, -largest, largest)
    quotient = jnp.round(quotient) if kind == "int8" else quotient
    return quotient.astype(kind).reshape(y.shape), scale


def variants(shape: tuple[int, int], form: str, kind: str, *, residual: bool) -> dict[str, Callable[[], Any]]:
    keys = jax.random.split(jax.random.key(0), 3)
    x, r = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
    weight = jax.random.normal(keys[2], shape[1:], jnp.bfloat16)
    operands = (x, r, weight) if residual else (x, weight)
    function, norm = (add_rms_norm_quantized, add_rms_norm) if residual else (rms_norm_quantized, rms_norm)
    options = FORMS[form] | {"dtype": kind}
    scale = jnp.float32(0.02)
    given = {"scale": scale} if form == "tensor" else {}
    static = {name: value for name, value in options.items() if name != "scale"}

    def unfused(*operands: Any) -> Any:
        found = norm(*operands)
        y, *s = found if residual else (found,)
        return (*plain(y, kind, form, scale), *s)

    # The bytes: of x, residual and s two for each element, of q one. Arrays of their own, or the reads hit in L2.
    inputs = [jnp.full((x.size // 2,), i, jnp.bfloat16) for i in range(4 if residual else 2)]
    outputs = 3 if residual else 1
    kernel = jax.jit(functools.partial(function, **static))
    by_xla = jax.jit(functools.partial(function, **static, implementation="xla"))
    copy, steps = jax.jit(functools.partial(copy_kernel.copy, outputs=outputs)), jax.jit(unfused)
    return {
        "kernel": lambda: kernel(*operands, **given),
        "copy": lambda: copy(inputs),
        "unfused": lambda: steps(*operands),
        "xla": lambda: by_xla(*operands, **given),
    }


def times(shapes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    flush, found = timing.Flush(), []
    for shape in shapes:
        for form in FORMS:
            for kind in quantized_oracle.DTYPES:
                for residual in (False, True) if shape == SHAPES[0] else (False,):
                    measured = timing.measure(
                        variants(shape, form, kind, residual=residual), repetitions=15, flush=flush
                    )
                    rows, n = shape
                    case = {"rows": rows, "n": n, "form": form, "dtype": kind, "residual": residual}
                    found.append(case | {name: value.row() for name, value in measured.items()})
                    us = {name: value.median_us for name, value in measured.items()}
                    of_copy, gain = us["copy"] / us["kernel"], us["unfused"] / us["kernel"]
                    name = f"{rows:6} x {n:6} {form:6} {kind:13} {'add' if residual else '':3}"
                    each = " ".join(f"{name} {value:7.2f}" for name, value in us.items())
                    print(f"{name} {each}  of copy {of_copy:.3f}  against unfused {gain:.2f}", flush=True)
    return found


def main(out: str, *options: str) -> None:
    short = "--short" in options
    right = bits((128, 1000, 1024, 4096, 16384, 65536) if short else WIDTHS)
    print(f"bits: {sum(right.values())} of {len(right)} cases right")
    results.write_form(out, right, times(SHAPES[:1] if short else SHAPES), options)


if __name__ == "__main__":
    main(*sys.argv[1:])
