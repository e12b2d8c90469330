"""Every rewrite of the real kernels, of the specification and of the dtypes' rule is killed by a property of the suite,
and what they rewrite by none. `-s` prints who killed whom.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm._spec import Spec
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import (
    golden_cases,
    mixed_dtypes,
    oracle,
    rewrites,
    specified,
    strategies,
    test_backward_properties,
    test_forward_properties,
    test_golden,
    test_mixed_dtypes,
    test_order,
    test_residual_gradients,
)
from tests.killers import ROWS, draw, killers, operands
from tests.oracle import F32
from tests.strategies import Case

PACKAGE = Path(__file__).parents[1] / "pallas_norm"

# --- the real kernels, in the interpreter ---------------------------------------------------------------------------


def interpreted(n: int, rows: int, dtype: str = "bf16") -> None:
    """Forward with a residual, then backward with ds, of the kernel that n takes."""
    kind = oracle.DTYPES[dtype]
    o = operands(rows, n, kind)
    residual, ds = draw(13, kind, rows, n), draw(14, kind, rows, n)
    names = {"x": o["x"], "residual": residual, "weight": o["weight"]}
    plan, spec = plan_for(n, kind), Spec(eps=0.5)
    given = {name: jnp.asarray(value) for name, value in names.items()}
    forward, backward = (sys.modules[f"pallas_norm.kernels.{name}"] for name in ("forward", "backward"))  # of a mutant
    results = forward.forward(given, plan=plan, spec=spec, with_rstd=True, interpret=True)
    y, s, rstd = (np.asarray(results[name]) for name in ("y", "s", "rstd"))
    oracle.assert_same(s, oracle.add(o["x"], residual))
    oracle.assert_same(y, oracle.replay(s, o["weight"], rstd))
    oracle.assert_same(rstd, specified.rstd(s, 0.5))

    given = {name: jnp.asarray(value) for name, value in (o | {"ds": ds}).items()}
    # Two programs, so that each takes several steps.
    plan = dataclasses.replace(backward_plan_for(n, kind, residual=True), programs=2)
    gradients = backward.backward(given, plan=plan, spec=spec, with_dweight=True, interpret=True)
    alone = {name: value for name, value in given.items() if name != "ds"}
    dx = backward.backward(alone, plan=plan, spec=spec, with_dweight=False, interpret=True)["dx"]
    oracle.assert_same(
        np.asarray(dx), specified.input_gradient(o["x"], o["weight"], o["rstd"], o["dy"], width=plan.width)
    )
    expected = oracle.round_to(np.asarray(dx).astype(F32) + ds.astype(F32), kind)
    oracle.assert_same(np.asarray(gradients["dx"]), expected)
    exact, bound = oracle.weight_gradient64(o["x"], o["rstd"], o["dy"], F32)
    oracle.assert_within(gradients["dweight"], exact, bound)


@pytest.mark.slow
@pytest.mark.parametrize("name", rewrites.SOURCE)
def test_a_rewritten_kernel_is_killed(name: str) -> None:
    """By a wrong number: a rewrite that does not run would show nothing."""
    rewrite = rewrites.SOURCE[name]
    with rewrites.rewritten(rewrite), pytest.raises(AssertionError) as killed:
        interpreted(rewrite.n, rewrite.rows, rewrite.dtype)
    print(f"\n{name:45} killed by {str(killed.value).splitlines()[0][:60]}")  # noqa: T201


@pytest.mark.slow
@pytest.mark.parametrize(("n", "rows", "dtype"), sorted({(r.n, r.rows, r.dtype) for r in rewrites.SOURCE.values()}))
def test_the_real_kernels_are_killed_by_nothing(n: int, rows: int, dtype: str) -> None:
    interpreted(n, rows, dtype)


# --- the XLA path ---------------------------------------------------------------------------------------------------


def narrow(n: int) -> Case:
    return Case(n, ROWS, "bf16", "bf16", "normal", seed=0)


def mixed(n: int) -> Case:
    return dataclasses.replace(narrow(n), weight_dtype="f32")


BY_XLA: dict[str, Callable[[int], None]] = {  # properties of the suite itself; n is the length of the rows
    "1 replay": lambda n: test_forward_properties.check(narrow(n), "xla"),
    "1 replay, float32": lambda n: test_forward_properties.check(dataclasses.replace(narrow(n), dtype="f32"), "xla"),
    "golden bits": lambda n: test_golden.test_xla_on_a_cpu_has_the_recorded_bits(golden_cases.case(n, "float32")),
    "zeros": lambda _: test_order.test_a_sum_of_negative_zeros_is_one(),
    "roots": lambda _: test_order.test_a_root_and_a_quotient_that_are_off_are_put_right(2, 2),
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


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_programs")
@pytest.mark.parametrize("name", rewrites.REFERENCE)
def test_a_rewritten_specification_is_killed(name: str) -> None:
    rewrite = rewrites.REFERENCE[name]
    with rewrites.rewritten(rewrite):
        found = killers(rewrite.n, BY_XLA)
    print(f"\n{name:45} killed by {', '.join(found)}")  # noqa: T201
    assert found, f"{name} survives"


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_programs")
@pytest.mark.parametrize("n", sorted({rewrite.n for rewrite in rewrites.REFERENCE.values()}))
def test_the_specification_is_killed_by_nothing(n: int) -> None:
    assert killers(n, BY_XLA) == []


# --- mixed dtypes ---------------------------------------------------------------------------------------------------


def roundings(rewrite: rewrites.Rewrite) -> None:
    if rewrite.module == "_dtypes":
        test_mixed_dtypes.test_the_dtypes_of_every_call_are_those_that_the_rule_gives()
        return
    mix, path = mixed_dtypes.TRAINED[rewrite.n], "xla" if rewrite.module == "reference" else "interpret"
    given = mixed_dtypes.draw(mix, 5, 128)
    mixed_dtypes.check(mix, given, mixed_dtypes.call(mix, given, path), path)


@pytest.mark.sampled(20)
@pytest.mark.parametrize("name", rewrites.MIXED)
def test_a_rounding_to_another_dtype_is_killed(name: str) -> None:
    rewrite = rewrites.MIXED[name]
    roundings(rewrite)
    with rewrites.rewritten(rewrite), pytest.raises(AssertionError) as killed:
        roundings(rewrite)
    print(f"\n{name:45} killed by {str(killed.value).splitlines()[0][:60]}")  # noqa: T201


def test_every_rewrite_in_the_tests_has_its_place() -> None:
    """What becomes of them is slow: one whose text had moved was seen by chance."""
    found = 0
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Rewrite":
                words = [argument.value for argument in node.args[:2] if isinstance(argument, ast.Constant)]
                if len(words) == 2:
                    module, old = words
                    places = (PACKAGE / folder / f"{module.replace('.', '/')}.py" for folder in ("kernels", ""))
                    assert old in next(place for place in places if place.exists()).read_text(), (path.name, old)
                    found += 1
    assert found >= 100
