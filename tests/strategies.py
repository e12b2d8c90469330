"""What the property tests draw: a Case, from which NumPy builds the arrays; and how the tests run it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import hypothesis
import jax
import numpy as np
from hypothesis import strategies as st

import pallas_norm
from pallas_norm.regimes import plan_for
from tests.oracle import DTYPES, Array, Roundings, result_dtype, roundings

# Each n compiles, so the pool is finite. Vector tails, one warp's rows, both sides of every limit of the tables.
WIDTHS = (32, 33, 50, 64, 80, 96, 128, 200, 256, 511, 512, 513, 767, 768, 1000, 1023, 1024, 1536, 2880, 4096, 4097)
SHARED = (8192, 8193)  # several warpgroups share a row: the interpreter takes seconds
NARROW = (1, 2, 7, 8, 31)  # no kernel
WIDE = (12288, 16384, 16385, 32768, 32769, 65536, 65537, 131072)
EPS = (0.0, 1e-40, 1e-12, 1e-6, 1e-5, 0.5, 1e30)
VALUES = ("normal", "tiny", "huge", "wide", "integers", "powers", "sparse", "subnormal", "special", "bits")
FINITE = VALUES[:7]


def widths(implementation: str) -> tuple[int, ...]:
    """The pool of row lengths, small ones first: Hypothesis shrinks to them."""
    if implementation == "interpret":
        return WIDTHS + SHARED[:1]
    return (*(NARROW if implementation == "xla" else ()), *WIDTHS, *SHARED, *WIDE)


def backward_widths(implementation: str) -> tuple[int, ...]:
    """Those of `widths`. Of the interpreter one or two for each way to read a row: it takes 1 to 5 s for each call."""
    return (32, 33, 50, 64, 128, 256, 513, 768, 1024, 2880) if implementation == "interpret" else widths(implementation)


def flushes(implementation: str) -> bool:
    """XLA's CPU code, which also runs the interpreter, treats subnormal float32 numbers as zeros."""
    return implementation != "mosaic_gpu" and jax.default_backend() == "cpu"


def examples(share: float = 1.0) -> hypothesis.settings:
    """That share of the profile's examples, for tests whose examples compile much."""
    return hypothesis.settings(max_examples=max(1, round(hypothesis.settings().max_examples * share)))


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    rows: int
    dtype: str
    weight_dtype: str | None
    values: str
    seed: int
    eps: float = 1e-6
    cast_before_scale: bool = True
    weight_offset: float = 0.0
    unit_dtype: str | None = None
    round_weight: bool = False
    out_dtype: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"eps": self.eps, **self.rounding}

    @property
    def rounding(self) -> dict[str, Any]:
        return {"weight_offset": self.weight_offset, "out_dtype": self._named(self.out_dtype), **self.of_unit} | (
            {"round_weight": True} if self.round_weight else {}
        )

    @property
    def of_unit(self) -> dict[str, Any]:
        return {"cast_before_scale": self.cast_before_scale, "unit_dtype": self._named(self.unit_dtype)}

    @property
    def to(self) -> Roundings:
        rounding = {name: value for name, value in self.rounding.items() if name != "weight_offset"}
        return roundings(DTYPES[self.dtype], self.weight_dtype and DTYPES[self.weight_dtype], **rounding)

    @staticmethod
    def _named(dtype: str | None) -> str | None:
        return None if dtype is None else DTYPES[dtype].name

    def rng(self, stream: int = 0) -> np.random.Generator:
        return np.random.default_rng((self.seed, stream))

    def x(self) -> Array:
        return numbers(self.rng(), (self.rows, self.n), self.dtype, self.values)

    def weight(self) -> Array | None:
        return None if self.weight_dtype is None else weights(self.rng(1), self.n, self.weight_dtype)

    def dy(self, y_dtype: Any) -> Array:
        """Each row of another magnitude: of float16 down to subnormal numbers."""
        shape = (self.rows, self.n)
        magnitude = 2.0 ** self.rng(3).integers(-20, 8, (self.rows, 1))
        return (self.rng(2).standard_normal(shape) * magnitude).astype(y_dtype)

    def exact(self) -> tuple[Array, Array, Array]:
        """(x, weight, dy) of which, without eps and offset, every product and sum is exact in any order: signs, powers
        of two, integers. g * unit is 2 in most columns, 1 or 3 in the others, so the projection cancels nearly all."""
        dtype = DTYPES[self.dtype]
        weight_dtype = dtype if self.weight_dtype is None else DTYPES[self.weight_dtype]
        sign = self.rng().choice([-1.0, 1.0], (self.rows, self.n))
        weight = self.rng(1).choice([-0.5, 0.5, 1.0, -2.0], self.n)
        g = self.rng(2).choice([1.0, 2.0, 2.0, 2.0, 3.0], (self.rows, self.n))
        return (
            sign.astype(dtype),
            weight.astype(weight_dtype),
            (g * sign / weight).astype(result_dtype(dtype, weight_dtype)),
        )


def weights(rng: np.random.Generator, n: int, dtype: str) -> Array:
    """Of both signs, hardly two alike, never all ones; one is -0, which adding an offset of zero would turn into 0."""
    values = (rng.standard_normal(n) + 0.5) * 2.0 ** rng.integers(-3, 4, n)
    values[rng.integers(n)] = -0.0
    return values.astype(DTYPES[dtype])


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, values: str) -> Array:
    """An array of one of VALUES."""
    kind = DTYPES[dtype]
    normal = rng.standard_normal(shape)
    sign = rng.choice([-1.0, 1.0], shape)
    wide = 2.0 ** (5 if dtype == "f16" else 30)
    with np.errstate(over="ignore"):
        match values:
            case "normal":
                return (3 * normal).astype(kind)
            case "tiny":
                return (normal / wide).astype(kind)
            case "huge":  # the sum of squares stays finite
                return (normal * wide).astype(kind)
            case "wide":  # each row of another magnitude, a few elements of another yet
                magnitude = rng.uniform(-1, 1, (*shape[:-1], 1)) + rng.uniform(-0.5, 0.5, shape)
                return (sign * wide**magnitude).astype(kind)
            case "integers":
                return rng.integers(-4, 5, shape).astype(np.float32).astype(kind)
            case "powers":  # every row +-2^k: with eps = 0, rstd is exact
                return (sign * 2.0 ** rng.integers(-6, 7, (*shape[:-1], 1))).astype(kind)
            case "sparse":
                return np.where(rng.random(shape) < 0.05, 100 * normal, np.copysign(0.0, sign)).astype(kind)
            case "subnormal":
                smallest = {"bf16": 2.0**-133, "f16": 2.0**-24, "f32": 2.0**-149}[dtype]
                return (sign * rng.integers(0, 128, shape) * smallest).astype(kind)
            case "special":  # at most one of them a row, so that the others show
                specials = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 3e38], np.float32)
                at = np.arange(shape[-1]) == rng.integers(0, shape[-1], (*shape[:-1], 1))
                return np.where(at, rng.choice(specials, (*shape[:-1], 1)), 3 * normal).astype(np.float32).astype(kind)
            case "bits":
                raw = np.uint16 if kind.itemsize == 2 else np.uint32
                return rng.integers(0, 1 << (8 * kind.itemsize), shape, dtype=raw).view(kind)
    raise AssertionError(values)


def row_counts(n: int, dtype: str) -> st.SearchStrategy[int]:
    """Around every edge of a block of rows."""
    block = plan_for(n, DTYPES[dtype]).block if n >= 32 else 1
    edges = {1, 2, 3, block - 1, block, block + 1, 2 * block, 2 * block + 1} - {0}
    return st.sampled_from(sorted(edges))


@st.composite
def cases(
    draw: st.DrawFn,
    implementation: str,
    *,
    values: tuple[str, ...] = VALUES,
    eps: tuple[float, ...] = EPS,
    widths_of: tuple[int, ...] | None = None,
    weighted: bool | None = None,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    mixed: bool = False,
) -> Case:
    """mixed: with dtypes of their own for y and what the weight multiplies."""
    n = draw(st.sampled_from(widths_of or widths(implementation)))
    dtype = draw(st.sampled_from(dtypes))
    kinds = {None: (None, *DTYPES), True: tuple(DTYPES), False: (None,)}[weighted]
    weight_dtype = draw(st.sampled_from(kinds))
    named = st.sampled_from((None, *DTYPES)) if mixed else st.none()
    cast_before_scale = draw(st.booleans())
    return Case(
        n=n,
        rows=draw(row_counts(n, dtype)),
        dtype=dtype,
        weight_dtype=weight_dtype,
        values=draw(st.sampled_from(values)),
        seed=draw(st.integers(0, 2**16)),
        eps=draw(st.sampled_from(eps)),
        cast_before_scale=cast_before_scale,
        weight_offset=draw(st.sampled_from((0.0, 1.0, -0.375))) if weight_dtype else 0.0,
        unit_dtype=draw(named) if cast_before_scale else None,
        round_weight=weight_dtype is not None and mixed and draw(st.booleans()),
        out_dtype=draw(named),
    )


def norm(implementation: str, x: Array, weight: Array | None, **options: Any) -> tuple[Array, Array]:
    """(y, rstd), as NumPy arrays."""
    y, rstd = _norm(implementation, tuple(sorted(options.items())))(x, weight)
    return np.asarray(y), np.asarray(rstd)


@functools.cache
def _norm(implementation: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return jax.jit(
        functools.partial(pallas_norm.rms_norm, **dict(options), implementation=implementation, return_rstd=True)
    )


def gradients(
    implementation: str, x: Array, weight: Array | None, dy: Array, **options: Any
) -> tuple[Array, Array | None, Array]:
    """(dx, dweight, rstd), as NumPy arrays."""
    return outputs_and_gradients(implementation, x, weight, dy, **options)[1:]


def outputs_and_gradients(
    implementation: str, x: Array, weight: Array | None, dy: Array, **options: Any
) -> tuple[Array, Array, Array | None, Array]:
    """(y, dx, dweight, rstd), as NumPy arrays, of one program."""
    y, dx, dweight, rstd = _gradients(implementation, tuple(sorted(options.items())))(x, weight, dy)
    return np.asarray(y), np.asarray(dx), None if dweight is None else np.asarray(dweight), np.asarray(rstd)


@functools.cache
def _gradients(implementation: str, options: tuple[tuple[str, Any], ...]) -> Any:
    norm = functools.partial(pallas_norm.rms_norm, **dict(options), implementation=implementation)

    @jax.jit
    def run(x: Any, weight: Any, dy: Any) -> Any:
        (y, rstd), pullback = jax.vjp(functools.partial(norm, return_rstd=True), x, weight)
        return y, *pullback((dy, jax.numpy.zeros_like(rstd))), rstd

    return run
