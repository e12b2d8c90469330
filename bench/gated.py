"""Gated norms on a GPU: every bit against the oracle, and times beside a copy kernel of the same bytes and the same
steps unfused.

    python -m bench.gated OUT.json [--short] [--times] [--commit=SHA]

--short: fewer widths and shapes; --times: no bits
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

from pallas_norm import rms_norm, rms_norm_gated
from tests import gated_oracle, oracle
from tests.gated_oracle import Gate

from . import copy_kernel, results, timing

WIDTHS = (33, 128, 384, 1000, 1024, 2880, 4096, 4097, 5120, 8192, 16384, 32768, 65536)
OTHER_DTYPES = (128, 1000, 4096)  # also in float16 and float32
SHAPES = ((16384, 4096), (16384, 5120), (8192, 8192), (65536, 128), (262144, 128), (4096, 4096), (64, 4096))
FORMS = {
    "mamba2": Gate(norm_before_gate=False),
    "mamba2, groups": Gate(norm_before_gate=False, group_size=1024),
    "qwen3-next": Gate(),
    "kimi": Gate(activation="sigmoid", cast_before_scale=False, out_dtype=jnp.bfloat16),
}


def operands(n: int, dtype: Any) -> list[np.ndarray[Any, Any]]:
    """x, gate, weight and dy: of several magnitudes; in the last row a NaN, an infinity."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal((37, n)) * 2.0 ** rng.integers(-4, 5, (37, 1))
    gate = rng.standard_normal((37, n)) * 2.0 ** rng.integers(-3, 5, (37, 1))
    gate[3, :4] = 100, -100, -87.5, 0
    x[36, -1], gate[36, 0] = np.nan, np.inf
    weight, dy = rng.standard_normal(n) + 0.5, rng.standard_normal((37, n))
    return [value.astype(dtype) for value in (x, gate, weight, dy)]


def compare(n: int, dtype: Any, implementation: str | None) -> Iterator[tuple[str, bool]]:
    """(what, whether every bit is right) of each form."""
    x, gate, weight, dy = operands(n, dtype)
    for form, how in FORMS.items():
        if n % (how.group_size or n):
            continue
        options = how._asdict() | {"implementation": implementation, "out_dtype": dtype}
        call = functools.partial(rms_norm_gated, **options)

        def all_of(x: Any, gate: Any, weight: Any, dy: Any, call: Any = call) -> Any:
            y, pullback = jax.vjp(call, x, gate, weight)
            return y, *pullback(dy)

        y, dx, dgate, dweight = (np.asarray(value) for value in jax.jit(all_of)(x, gate, weight, dy))
        expected = gated_oracle.results(x, gate, weight, dy, how._replace(out_dtype=dtype), 1e-6)
        for name, found in (("y", y), ("dx", dx), ("dgate", dgate)):
            what = f"{implementation or 'kernel'} {n} {np.dtype(dtype).name} {form} {name}"
            try:
                oracle.assert_same(found, getattr(expected, name))
                yield what, True
            except AssertionError as error:
                print(what, str(error)[:200])
                yield what, False
        bound = expected.dweight_error + oracle.spacing(np.abs(expected.dweight), dtype)
        with np.errstate(all="ignore"):
            right = ~(np.abs(dweight.astype(np.float64) - expected.dweight) > bound)
        yield f"{implementation or 'kernel'} {n} {np.dtype(dtype).name} {form} dweight", bool(right.all())


def bits(widths: tuple[int, ...]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for n in widths:
        for dtype in (jnp.bfloat16, *((jnp.float16, jnp.float32) if n in OTHER_DTYPES else ())):
            found |= compare(n, dtype, None)
    for n in (384, 4096) if widths else ():
        found |= compare(n, jnp.bfloat16, "xla")
    return found


def plain(x: Any, gate: Any, weight: Any, how: Gate) -> Any:
    """The norm's own kernel and the gate as one writes it, for XLA."""
    wide = gate.astype(jnp.float32)
    a = jax.nn.silu(wide) if how.activation == "silu" else jax.nn.sigmoid(wide)
    if how.norm_before_gate:
        out = x.dtype if how.cast_before_scale else jnp.float32
        y = rms_norm(x, weight, cast_before_scale=how.cast_before_scale, out_dtype=out)
        return (y.astype(jnp.float32) * a).astype(x.dtype)
    h = x.astype(jnp.float32) * a
    size = how.group_size or x.shape[-1]
    unit = rms_norm(h.reshape(-1, size), unit_dtype=x.dtype, out_dtype=x.dtype).reshape(x.shape)
    return unit * weight


def variants(shape: tuple[int, int], how: Gate, *, backward: bool) -> dict[str, Callable[[], Any]]:
    keys = jax.random.split(jax.random.key(0), 4)
    x, gate, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:3])
    weight = jax.random.normal(keys[3], shape[1:], jnp.bfloat16)
    fused = functools.partial(rms_norm_gated, **how._asdict())
    by_xla = functools.partial(fused, implementation="xla")
    functions: dict[str, Any] = {"kernel": fused, "unfused": functools.partial(plain, how=how), "xla": by_xla}
    inputs = [jnp.full((x.size,), i, jnp.bfloat16) for i in range(3 if backward else 2)]
    copy = jax.jit(functools.partial(copy_kernel.copy, outputs=2 if backward else 1))
    found: dict[str, Callable[[], Any]] = {"copy": lambda: copy(inputs)}
    for name, function in functions.items():
        if backward:
            _, pullback = jax.vjp(function, x, gate, weight)
            step = jax.jit(pullback)
            found[name] = functools.partial(step, dy)
        else:
            found[name] = functools.partial(jax.jit(function), x, gate, weight)
    return found


def times(shapes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    flush, found = timing.Flush(), []
    for rows, n in shapes:
        for form, how in FORMS.items():
            if n % (how.group_size or n):
                continue
            for backward in (False, True):
                given = variants((rows, n), how, backward=backward)
                measured = timing.measure(given, repetitions=15, flush=flush)
                case = {"rows": rows, "n": n, "form": form, "backward": backward}
                found.append(case | {name: value.row() for name, value in measured.items()})
                us = {name: value.median_us for name, value in measured.items()}
                of_copy, gain = us["copy"] / us["kernel"], us["unfused"] / us["kernel"]
                each = " ".join(f"{name} {value:7.2f}" for name, value in us.items())
                name = f"{rows:6} x {n:5} {form:14} {'backward' if backward else 'forward':8}"
                print(f"{name} {each}  of copy {of_copy:.3f}  against unfused {gain:.2f}", flush=True)
    return found


def main(out: str, *options: str) -> None:
    short = "--short" in options
    widths = () if "--times" in options else (128, 1000, 1024, 4096, 16384, 65536) if short else WIDTHS
    right = bits(widths)
    print(f"bits: {sum(right.values())} of {len(right)} cases right", flush=True)
    results.write_form(out, right, times((SHAPES[0], SHAPES[3]) if short else SHAPES), options)


if __name__ == "__main__":
    main(*sys.argv[1:])
