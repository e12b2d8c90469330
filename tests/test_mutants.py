"""Every mutant is killed by a property of the suite, and the right kernel by none. `-s` prints who killed whom."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm._spec import Spec
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import (
    mutants,
    oracle,
    rewrites,
    specified,
    strategies,
    test_backward_properties,
    test_forward_properties,
    test_mixed_dtypes,
    test_order,
    test_residual_gradients,
)
from tests.oracle import BF16, F16, F32, Array
from tests.strategies import Case

N, ROWS = 41, 4  # odd, and no multiple of any vector or padding


def draw(seed: int, dtype: Any, *shape: int, size: float = 3.0) -> Array:
    return (size * np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).astype(dtype)


# --- forward --------------------------------------------------------------------------------------------------------


def replay(kernel: mutants.Forward) -> None:
    for dtype, weight_dtype in ((BF16, BF16), (F16, F16), (F32, F32), (BF16, F32)):
        x, weight = draw(1, dtype, 64, N), draw(2, weight_dtype, N, size=1.0)
        y, rstd = kernel(x, weight, 1e-6)
        oracle.assert_same(y, oracle.replay(x, weight, rstd))


def rstd_bound(kernel: mutants.Forward) -> None:
    for eps, size in ((1e-6, 1e-3), (0.37, 1.0), (0.0, 300.0), (1e-6, 3.0)):
        for dtype in (BF16, F16, F32):
            x = draw(3, dtype, 32, N, size=size)
            _, rstd = kernel(x, draw(4, dtype, N), eps)
            assert (oracle.rstd_error(rstd, x, eps) <= oracle.rstd_bound(N)).all()


def special_values(kernel: mutants.Forward) -> None:
    x, weight = draw(5, BF16, 5, N), draw(6, BF16, N)
    x[0, 3], x[1, 4], x[2], x[3, 0] = np.nan, np.inf, 0, -0.0
    weight[7] = -0.0
    x[4] = np.full(N, 1e-40, BF16)  # subnormal
    y, rstd = kernel(x, weight, 1e-6)
    oracle.assert_same(y, oracle.replay(x, weight, rstd))
    assert np.isnan(y[0]).all()
    with np.errstate(invalid="ignore"):  # a mutant's NaN is no number greater than 0, and no warning either
        assert (np.abs(y[4]) > 0).sum() >= N - 1


def rows_of_one_magnitude(kernel: mutants.Forward) -> None:
    weight = draw(15, BF16, N)
    for power in (-12, 0, 5):
        sign = np.sign(draw(16, BF16, 8, N)).astype(F32)
        y, _ = kernel((sign * 2.0**power).astype(BF16), weight, 0.0)
        oracle.assert_same(y, (sign * weight.astype(F32)).astype(BF16))


def batch_invariance(kernel: mutants.Forward) -> None:
    x, weight = draw(7, F32, 64, N), draw(8, F32, N)
    whole, alone = kernel(x, weight, 1e-6)[1], np.concatenate([kernel(row[None], weight, 1e-6)[1] for row in x])
    oracle.assert_same(whole, alone)


FORWARD: dict[str, Callable[[mutants.Forward], None]] = {
    "1 replay": replay,
    "2 rstd bound": rstd_bound,
    "13 rows of one magnitude": rows_of_one_magnitude,
    "14 special values": special_values,
    "8 batch invariance": batch_invariance,
}

# --- backward -------------------------------------------------------------------------------------------------------


def operands(rows: int = ROWS, n: int = N, dtype: Any = BF16) -> dict[str, Array]:
    x = draw(9, dtype, rows, n)
    return {
        "x": x,
        "weight": draw(10, dtype, n, size=1.0),
        "rstd": oracle.rstd64(x, 1e-6).astype(F32),
        "dy": draw(11, dtype, rows, n),
    }


def dx_bound(kernel: mutants.Backward) -> None:
    for dtype in (BF16, F32):
        o = operands(64, N, dtype)
        dx, _ = kernel(**o)
        oracle.assert_within(dx, *oracle.input_gradient64(o["x"], o["weight"], o["rstd"], o["dy"], N))


def dx_of_residual(kernel: mutants.Backward) -> None:
    """dx is rounded before ds is added: bits of the composition."""
    o, ds = operands(64), draw(12, BF16, 64, N)
    expected = oracle.round_to(kernel(**o)[0].astype(F32) + ds.astype(F32), BF16)
    oracle.assert_same(kernel(**o, ds=ds)[0], expected)


def exact_sums(kernel: mutants.Backward) -> None:
    """Of sums that are exact in any order, over a row as long as the additions of a bound would hide an element of."""
    for n, weight_dtype in ((N, "bf16"), (4096, "f32")):
        case = Case(n, ROWS, "bf16", weight_dtype, "normal", seed=0)
        x, weight, dy = case.exact()
        rstd = np.ones(ROWS, F32)
        dx, dweight = kernel(x, weight, rstd, dy)
        oracle.assert_within(dx, *oracle.input_gradient64(x, weight, rstd, dy, 0))
        oracle.assert_same(dweight, (x.astype(F32) * dy.astype(F32)).sum(axis=0).astype(weight.dtype))


def subnormal_g(kernel: mutants.Backward) -> None:
    x = (2.0**-7 * np.sign(draw(17, F32, ROWS, N))).astype(F16)
    dy = (np.random.default_rng(18).integers(-1023, 1024, x.shape) * 2.0**-24).astype(F16)
    weight, rstd = np.ones(N, F16), np.full(ROWS, 2.0**7, F32)
    oracle.assert_within(kernel(x, weight, rstd, dy)[0], *oracle.input_gradient64(x, weight, rstd, dy, N))


def euler(kernel: mutants.Backward) -> None:
    o = operands(64, N, BF16) | {"weight": draw(10, F32, N), "dy": draw(11, F32, 64, N)}
    _, dweight = kernel(**o)
    y = oracle.replay(o["x"], o["weight"], o["rstd"]).astype(np.float64)
    _, of_dweight = oracle.weight_gradient64(o["x"], o["rstd"], o["dy"], F32)
    weight64, dy64 = o["weight"].astype(np.float64), o["dy"].astype(np.float64)
    error = np.sum(np.abs(weight64) * of_dweight) + oracle.U * np.sum(np.abs(y * dy64))
    assert abs(np.sum(weight64 * dweight.astype(np.float64)) - np.sum(y * dy64)) <= error


def two_batches(kernel: mutants.Backward) -> None:
    x, weight, dy = Case(N, 9, "bf16", "f32", "normal", seed=0).exact()
    rstd = np.ones(9, F32)
    whole, *parts = (
        kernel(x[rows], weight, rstd[rows], dy[rows])[1] for rows in (slice(None), slice(4), slice(4, None))
    )
    oracle.assert_same(whole, parts[0] + parts[1])


def dweight_bound(kernel: mutants.Backward) -> None:
    o = operands(64, N, BF16) | {"weight": draw(10, F32, N)}
    _, dweight = kernel(**o)
    oracle.assert_within(dweight, *oracle.weight_gradient64(o["x"], o["rstd"], o["dy"], F32))


BACKWARD: dict[str, Callable[[mutants.Backward], None]] = {
    "23 dx bound": dx_bound,
    "residual form": dx_of_residual,
    "23 dweight bound": dweight_bound,
    "23 exact sums": exact_sums,
    "23 subnormal g": subnormal_g,
    "27 weight times dweight": euler,
    "29 two batches": two_batches,
}

# --- the real kernels, in the interpreter ---------------------------------------------------------------------------


def interpreted(n: int, rows: int) -> None:
    """Forward with a residual, then backward with ds, of the kernel that n takes."""
    o = operands(rows, n)
    residual, ds = draw(13, BF16, rows, n), draw(14, BF16, rows, n)
    names = {"x": o["x"], "residual": residual, "weight": o["weight"]}
    plan, spec = plan_for(n, BF16), Spec(eps=0.5)
    given = {name: jnp.asarray(value) for name, value in names.items()}
    forward, backward = (sys.modules[f"pallas_norm.kernels.{name}"] for name in ("forward", "backward"))  # of a mutant
    results = forward.forward(given, plan=plan, spec=spec, with_rstd=True, interpret=True)
    y, s, rstd = (np.asarray(results[name]) for name in ("y", "s", "rstd"))
    oracle.assert_same(s, oracle.add(o["x"], residual))
    oracle.assert_same(y, oracle.replay(s, o["weight"], rstd))
    oracle.assert_same(rstd, specified.rstd(s, 0.5))

    given = {name: jnp.asarray(value) for name, value in (o | {"ds": ds}).items()}
    # Two programs, so that each takes several steps.
    plan = dataclasses.replace(backward_plan_for(n, BF16, residual=True), programs=2)
    gradients = backward.backward(given, plan=plan, spec=spec, with_dweight=True, interpret=True)
    alone = {name: value for name, value in given.items() if name != "ds"}
    dx = backward.backward(alone, plan=plan, spec=spec, with_dweight=False, interpret=True)["dx"]
    oracle.assert_same(
        np.asarray(dx), specified.input_gradient(o["x"], o["weight"], o["rstd"], o["dy"], width=plan.width)
    )
    expected = oracle.round_to(np.asarray(dx).astype(F32) + ds.astype(F32), BF16)
    oracle.assert_same(np.asarray(gradients["dx"]), expected)
    exact, bound = oracle.weight_gradient64(o["x"], o["rstd"], o["dy"], F32)
    oracle.assert_within(gradients["dweight"], exact, bound)


# --- the XLA path ---------------------------------------------------------------------------------------------------


def narrow(n: int) -> Case:
    return Case(n, ROWS, "bf16", "bf16", "normal", seed=0)


def mixed(n: int) -> Case:
    return dataclasses.replace(narrow(n), weight_dtype="f32")


BY_XLA: dict[str, Callable[[int], None]] = {  # properties of the suite itself; n is the length of the rows
    "1 replay": lambda n: test_forward_properties.check(narrow(n), "xla"),
    "1 replay, float32": lambda n: test_forward_properties.check(dataclasses.replace(narrow(n), dtype="f32"), "xla"),
    "a product": lambda _: test_order.test_a_product_is_rounded_before_it_is_added((64, 1024)),
    "2 rstd of integers": lambda n: test_forward_properties.check_integers(narrow(n), "xla"),
    "23 gradients": lambda n: test_backward_properties.check(narrow(n), "xla"),
    "23 gradients, another dtype of dy": lambda n: test_backward_properties.check(mixed(n), "xla"),
    "23 exact sums": lambda n: test_backward_properties.check_exact(mixed(n), "xla"),
    "23 subnormal g": lambda _: test_backward_properties.test_a_subnormal_float16_g_is_kept("xla", 128),
    "residual form": lambda _: test_residual_gradients.test_a_gradient_of_the_sum_is_added_to_dx_after_dx_was_rounded(
        "xla", "bf16"
    ),
}


@pytest.fixture
def no_compiled_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of earlier tests: a mutant's are its own."""
    monkeypatch.setattr(strategies, "_norm", strategies._norm.__wrapped__)
    monkeypatch.setattr(strategies, "_gradients", strategies._gradients.__wrapped__)


# --- verdicts -------------------------------------------------------------------------------------------------------


def killers(kernel: Any, properties: dict[str, Callable[[Any], None]]) -> list[str]:
    found = []
    for name, holds in properties.items():
        try:
            holds(kernel)
        except AssertionError:
            found.append(name)
    return found


@pytest.mark.parametrize("name", mutants.FORWARD)
def test_a_wrong_forward_kernel_is_killed(name: str) -> None:
    found = killers(mutants.FORWARD[name], FORWARD)
    print(f"\n{name:45} killed by {', '.join(found)}")  # noqa: T201
    assert found, f"{name} survives"


@pytest.mark.parametrize("name", mutants.BACKWARD)
def test_a_wrong_backward_kernel_is_killed(name: str) -> None:
    found = killers(mutants.BACKWARD[name], BACKWARD)
    print(f"\n{name:45} killed by {', '.join(found)}")  # noqa: T201
    assert found, f"{name} survives"


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", rewrites.SOURCE)
def test_a_rewritten_kernel_is_killed(name: str) -> None:
    """By a wrong number: a rewrite that does not run would show nothing."""
    rewrite = rewrites.SOURCE[name]
    with rewrites.rewritten(rewrite), pytest.raises(AssertionError) as killed:
        interpreted(rewrite.n, rewrite.rows)
    print(f"\n{name:45} killed by {str(killed.value).splitlines()[0][:60]}")  # noqa: T201


@pytest.mark.sampled(5)
@pytest.mark.usefixtures("no_compiled_programs")
@pytest.mark.parametrize("name", rewrites.REFERENCE)
def test_a_rewritten_specification_is_killed(name: str) -> None:
    rewrite = rewrites.REFERENCE[name]
    with rewrites.rewritten(rewrite):
        found = killers(rewrite.n, BY_XLA)
    print(f"\n{name:45} killed by {', '.join(found)}")  # noqa: T201
    assert found, f"{name} survives"


def mixed_dtypes(rewrite: rewrites.Rewrite) -> None:
    if rewrite.module == "_dtypes":
        test_mixed_dtypes.test_the_dtypes_of_every_call_are_those_that_the_rule_gives()
        return
    mix, path = test_mixed_dtypes.TRAINED[rewrite.n], "xla" if rewrite.module == "reference" else "interpret"
    given = test_mixed_dtypes.draw(mix, 5, 128)
    test_mixed_dtypes.check(mix, given, test_mixed_dtypes.call(mix, given, path), path)


@pytest.mark.parametrize("name", rewrites.MIXED)
def test_a_rounding_to_another_dtype_is_killed(name: str) -> None:
    rewrite = rewrites.MIXED[name]
    mixed_dtypes(rewrite)
    with rewrites.rewritten(rewrite), pytest.raises(AssertionError) as killed:
        mixed_dtypes(rewrite)
    print(f"\n{name:45} killed by {str(killed.value).splitlines()[0][:60]}")  # noqa: T201


@pytest.mark.usefixtures("no_compiled_programs")
@pytest.mark.parametrize("n", sorted({rewrite.n for rewrite in rewrites.REFERENCE.values()}))
def test_the_specification_is_killed_by_nothing(n: int) -> None:
    assert killers(n, BY_XLA) == []


def test_the_right_kernels_are_killed_by_nothing() -> None:
    assert killers(mutants.forward, FORWARD) == []
    assert killers(mutants.backward, BACKWARD) == []


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("n", "rows"), sorted({(r.n, r.rows) for r in rewrites.SOURCE.values()}))
def test_the_real_kernels_are_killed_by_nothing(n: int, rows: int) -> None:
    interpreted(n, rows)


def test_there_are_at_least_forty_mutants() -> None:
    assert len(mutants.FORWARD) + len(mutants.BACKWARD) + len(rewrites.SOURCE) + len(rewrites.REFERENCE) >= 40
