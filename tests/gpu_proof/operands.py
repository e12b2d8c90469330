"""Operands of the cases, and what the kernels must make of them, on the host in NumPy.

Of a forward pass every bit is specified; of torch's own statements the rounding is replayed from their own rstd, which
is held against its bound. The operands of a backward pass are such that every sum and product is exact in any order, so
dx and dweight are numbers known before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_norm._spec import Spec
from tests import oracle, specified
from tests.gpu_proof.kernels import Backward, ColumnSum, Forward
from tests.oracle import DTYPES, F32, Array

EPS = 1e-6
SPEC = Spec(eps=EPS)


def forward(case: Forward, rows: int) -> dict[str, Array]:
    rng, shape = np.random.default_rng(case.n), (rows, case.n)
    operands = {"x": 3 * rng.standard_normal(shape, dtype=F32)}
    if case.residual:
        operands["residual"] = rng.standard_normal(shape, dtype=F32)
    if case.weight:
        operands["weight"] = 1 + 0.3 * rng.standard_normal(case.n, dtype=F32)
    return {name: value.astype(DTYPES[case.dtype]) for name, value in operands.items()}


def check_forward(
    case: Forward, operands: dict[str, Array], results: dict[str, Any], rstd: Any, *, by_torch: bool = False
) -> None:
    """Of `results`, y and where there is one s, with the rstd of these rows. by_torch: added up in torch's order."""
    s = oracle.add(operands["x"], operands["residual"]) if case.residual else operands["x"]
    rstd, weight = np.asarray(rstd), operands.get("weight")
    if by_torch:
        oracle.assert_rstd(rstd, s, EPS, case.n)
        oracle.assert_same(results["y"], oracle.replay(s, weight, rstd))
    else:
        for found, value in zip((results["y"], rstd), specified.forward(s, weight, EPS), strict=True):
            oracle.assert_same(found, value)
    if case.residual:
        oracle.assert_same(results["s"], s)


def backward(case: Backward, rows: int) -> tuple[dict[str, Array], Array, Array]:
    """(operands, dx, the terms of dweight, one row each).

    Signs and powers of two; g * unit is 1, 2 or 3 times a power of two of the row's own, 2 on average, so that the mean
    is exact too.
    """
    rng, shape, n = np.random.default_rng(case.n), (rows, case.n), case.n
    unit = rng.choice(np.array([-1, 1], F32), shape)
    weight = rng.choice(np.array([-0.5, 0.5, 1, -2], F32), n) if case.weight else np.ones(n, F32)
    size = 2.0 ** (np.arange(rows, dtype=F32)[:, None] % 4)
    multiple = rng.permutation(np.where(np.arange(n) < n // 4 * 2, 1 + np.arange(n) % 2 * 2, 2).astype(F32))
    g = unit * size * multiple
    power = 2.0 ** (np.arange(rows, dtype=F32)[:, None] % 5 - 2)
    dx = (g - unit * 2 * size) / power
    operands = {"x": unit * power, "rstd": 1 / power[:, 0], "dy": g / weight, "weight": weight}
    if case.residual:
        operands["ds"] = rng.integers(-3, 4, shape).astype(F32)
        dx = dx + operands["ds"]
    terms = operands["dy"] * unit
    if not case.weight:
        del operands["weight"]
    dtypes = {"rstd": F32, "dy": DTYPES[case.dy_dtype]}
    dtypes["weight"] = dtypes["dy"]
    kept = {name: value.astype(dtypes.get(name, DTYPES[case.dtype])) for name, value in operands.items()}
    for name, value in kept.items():
        assert np.array_equal(value.astype(F32), operands[name]), f"{name} of {case} is rounded"
    return kept, dx.astype(DTYPES[case.dtype]), terms


def assert_equal(actual: Any, expected: Array) -> None:
    """Numbers known before: -0 is 0, a NaN is an error."""
    actual = np.asarray(actual).astype(F32)
    wrong = ~(actual == expected.astype(F32))
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        raise AssertionError(f"{wrong.sum()} of {wrong.size} differ; at {at}: {actual[at]!r}, not {expected[at]!r}")


def column_sum(case: ColumnSum, rows: int, held: int) -> tuple[Array, Array]:
    """(parts, their sum): `held` rows, those past `rows` NaN, which must not be added."""
    parts = np.random.default_rng(case.n).integers(-4, 5, (held, case.n)).astype(F32)
    total = parts[:rows].sum(axis=0)
    parts[rows:] = np.nan
    return parts, total.astype(DTYPES[case.dtype])
