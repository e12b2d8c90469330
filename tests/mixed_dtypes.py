"""A mix of dtypes of x, residual, weight, unit, y and s: operands, a call with its gradients, and what they must be."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_norm import add_rms_norm, rms_norm
from tests import oracle, specified
from tests.oracle import DTYPES, F32, Array
from tests.strategies import flushes, weights

EPS, N, ROWS = 1e-5, 96, 7


class Mix(NamedTuple):
    """Dtypes of the operands, and the options; None: by default, or no such operand."""

    x: str
    residual: str | None = None
    weight: str | None = None
    unit_dtype: str | None = None
    round_weight: bool = False
    out_dtype: str | None = None
    s_dtype: str | None = None
    weight_offset: float = 0.0

    @property
    def dtypes(self) -> dict[str, Any]:
        """The options that round."""
        named = {"unit_dtype": self.unit_dtype, "out_dtype": self.out_dtype, "s_dtype": self.s_dtype}
        found = {name: DTYPES[dtype].name for name, dtype in named.items() if dtype is not None}
        return found | ({"round_weight": True} if self.round_weight else {})

    @property
    def of_norm(self) -> dict[str, Any]:
        """Those of the norm of s."""
        return {name: value for name, value in self.dtypes.items() if name != "s_dtype"}

    @property
    def to(self) -> oracle.Roundings:
        given = (None if dtype is None else DTYPES[dtype] for dtype in (self.x, self.weight, self.residual))
        x, weight, residual = given
        return oracle.roundings(x, weight, residual=residual, **self.dtypes)

    def __str__(self) -> str:
        return "-".join(f"{name}={value}" for name, value in self._asdict().items() if value)


def every(x: str, residual: str | None) -> Iterator[Mix]:
    """All that are allowed of these two, each dtype named."""
    kinds = tuple(DTYPES)
    for weight, unit, out, s in itertools.product((None, *kinds), kinds, kinds, kinds if residual else (None,)):
        for round_weight in (False, True) if weight else (False,):
            yield Mix(x, residual, weight, unit, round_weight, out, s)


TRAINED = (
    Mix("bf16", None, "f32", out_dtype="bf16"),
    Mix("bf16", None, "f32", "f32", out_dtype="bf16", weight_offset=1.0),  # Gemma's
    Mix("bf16", None, "f32", round_weight=True),  # MaxText, Levanter, EasyDeL
    Mix("f32", None, "f32", "bf16", round_weight=True, out_dtype="bf16"),
    Mix("bf16", "f32", "bf16", "bf16", out_dtype="bf16"),  # a float32 stream
    Mix("bf16", "f32", "f32", "bf16", round_weight=True, out_dtype="bf16"),  # the same with float32 weights
    Mix("bf16", "bf16", "f32", out_dtype="bf16"),
    Mix("f32", "bf16", "f16"),
    Mix("f16", "f32", "f16", s_dtype="f16"),
    Mix("bf16", "bf16", None, s_dtype="f32", out_dtype="f16"),
)


def draw(mix: Mix, rows: int = ROWS, n: int = N) -> dict[str, Array]:
    rng = np.random.default_rng(n)
    found = {"x": 3 * rng.standard_normal((rows, n)), "dy": rng.standard_normal((rows, n))}
    found |= {"residual": rng.standard_normal((rows, n)), "ds": rng.standard_normal((rows, n))}
    dtypes = {"x": mix.x, "residual": mix.residual}
    arrays = {name: found[name].astype(DTYPES[dtype]) for name, dtype in dtypes.items() if dtype is not None}
    arrays |= {"dy": found["dy"].astype(mix.to.y)}
    if mix.residual is not None:
        arrays |= {"ds": found["ds"].astype(mix.to.s)}
    return arrays if mix.weight is None else arrays | {"weight": weights(rng, n, mix.weight)}


def call(mix: Mix, given: dict[str, Any], implementation: str) -> dict[str, Any]:
    """Everything of a call and its gradients, by name."""
    operands = {name: value for name, value in given.items() if name not in ("dy", "ds")}
    norm = rms_norm if mix.residual is None else add_rms_norm
    options = {"eps": EPS, "return_rstd": True, "weight_offset": mix.weight_offset, **mix.dtypes}

    def run(operands: dict[str, Any]) -> tuple[Any, ...]:
        return norm(**operands, implementation=implementation, **options)

    results, pullback = jax.vjp(run, operands)
    (gradients,) = pullback((given["dy"], *([given["ds"]] if "ds" in given else []), jnp.zeros_like(results[-1])))
    names = ("y", "rstd") if mix.residual is None else ("y", "s", "rstd")
    return dict(zip(names, results, strict=True)) | {f"d{name}": value for name, value in gradients.items()}


def check(mix: Mix, given: dict[str, Array], found: dict[str, Any], implementation: str) -> None:
    found = {name: np.asarray(value) for name, value in found.items()}
    x, weight, flush = given["x"], given.get("weight"), flushes(implementation)
    if mix.residual is not None:
        s_dtype = mix.s_dtype and DTYPES[mix.s_dtype]
        oracle.assert_same(found["s"], oracle.add(x, given["residual"], s_dtype, flushes=flush))
        x = found["s"]
    rounding = mix.of_norm | {"weight_offset": mix.weight_offset}
    if mix.unit_dtype is None:
        rounding |= {"unit_dtype": x.dtype}
    dy, (y, rstd) = given["dy"], specified.forward(x, weight, EPS, **rounding, flushes=flush)
    oracle.assert_same(found["rstd"], rstd)
    oracle.assert_same(found["y"], y)
    dx = specified.input_gradient(x, weight, rstd, dy, given.get("ds"), **rounding, flushes=flush)
    for name in ("x", "residual") if mix.residual is not None else ("x",):
        oracle.assert_same(found[f"d{name}"], oracle.round_to(dx.astype(F32), given[name].dtype))
    if weight is not None:
        of_unit = {"unit_dtype": rounding["unit_dtype"]}
        oracle.assert_within(found["dweight"], *oracle.weight_gradient64(x, rstd, dy, weight.dtype, **of_unit))
        assert found["dweight"].dtype == weight.dtype
