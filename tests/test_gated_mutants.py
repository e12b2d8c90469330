"""Wrong gated norms that must be seen: rewrites of the kernels and of the specification, and what kills each."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm._spec import Spec
from pallas_norm.plans.backward import backward_order, backward_plan_for
from pallas_norm.plans.fitting import Misfit
from pallas_norm.plans.forward import plan_for
from tests import gated_oracle, oracle
from tests.gated_oracle import Gate, Results
from tests.oracle import BF16, F32, Array
from tests.rewrites import Rewrite, rewritten
from tests.test_activation import EVERY, NEAR

ROWS = 5
GROUPS = {33: 1, 1000: 1, 1024: 3, 8192: 1}  # of each row length
HOW = (Gate(), Gate(norm_before_gate=False), Gate("sigmoid", cast_before_scale=False, out_dtype=BF16))

# n is a row length of GROUPS.
GATED: dict[str, Rewrite] = {
    "no rounding before the weight": Rewrite("gated", "unit = block.narrowed(unit, dtypes.unit).astype(F32)", "unit = unit"),  # noqa: E501
    "no rounding before the gate": Rewrite("gated", "block.narrowed(v, product_dtype(dtypes)).astype(F32) * act", "v * act"),  # noqa: E501
    "x * a rounded": Rewrite("gated", "block.widened(x) * a for x, a", "(block.widened(x) * a).astype(x.dtype) for x, a"),  # noqa: E501
    "the gate on the wrong side": Rewrite("gated", "    if form.norm_before_gate:\n        return given", "    if not form.norm_before_gate:\n        return given"),  # noqa: E501
    "all groups have the first weight": Rewrite("block", "lax.rem(jnp.int32(self.row), jnp.int32(ref.shape[0]))", "jnp.int32(0)", n=1024),  # noqa: E501
    "programs with rows of several groups": Rewrite("gated", "plan.programs // groups * groups", "plan.programs", n=0),
    "backward: dunit not rounded": Rewrite("gated_backward", "dunit = block.rounded(dv if factor is None else block.product(dv, factor), dtypes.unit)", "dunit = dv if factor is None else block.product(dv, factor)"),  # noqa: E501
    "backward: dv not rounded": Rewrite("gated_backward", "block.rounded(block.product(dy, a), product_dtype(dtypes))", "block.product(dy, a)"),  # noqa: E501
    "backward: dgate of a v that is not rounded": Rewrite("gated_backward", "da = dy * block.rounded(unit if factor is None else unit * factor, product_dtype(dtypes))", "da = dy * (unit if factor is None else unit * factor)"),  # noqa: E501
    "backward: dgate without the slope": Rewrite("gated_backward", "(da * slope(terms.gate, terms.s, form.activation, block.product))", "da"),  # noqa: E501
    "backward: dx without a": Rewrite("gated_backward", "dh if form.norm_before_gate else dh * terms.a", "dh"),
    "backward: dweight of dy": Rewrite("gated_backward", "dv * unit, x", "dy * unit, x"),
    "backward: groups' dweights mixed": Rewrite("gated_backward", "parts = parts.reshape(len(parts) // groups, groups * n)", "parts = parts.reshape(groups, len(parts) // groups, n).swapaxes(0, 1).reshape(len(parts) // groups, groups * n)", n=1024),  # noqa: E501
    "xla: another polynomial": Rewrite("_activation", "0.04189784", "0.0418978"),
    "xla: log(2) in one part": Rewrite("_activation", "- product(k, LN2_REST)", ""),
    "xla: gates beyond the range": Rewrite("_activation", "jnp.where(gate > -LEAST, F32(-LEAST), jnp.where(gate < -MOST, F32(-MOST), gate))", "gate"),  # noqa: E501
    "xla: silu's slope": Rewrite("_activation", "s * (times(gate, rest) + F32(1))", "s * (times(gate, s) + F32(1))"),
    "xla: v not rounded": Rewrite("gated_reference", "round_to(v, product_dtype(dtypes)).astype(F32) * a", "v * a"),
    "xla: unit not rounded": Rewrite("gated_reference", "unit = round_to(h * rstd, dtypes.unit).astype(F32)", "unit = h * rstd"),  # noqa: E501
    "xla: added up in the order of float32": Rewrite("gated_reference", "forward_order(form.group, x.dtype)", "forward_order(form.group, F32)", n=1024),  # noqa: E501
    "xla: added up in the forward pass's order": Rewrite("gated_reference", "backward_order(form.group, x.dtype, dy_dtype=dy.dtype, residual=True)", "forward_order(form.group, x.dtype)", n=8192),  # noqa: E501
    "xla: dv not rounded": Rewrite("gated_reference", "dv = round_to(product(wide_dy, a), to).astype(F32)", "dv = product(wide_dy, a)"),  # noqa: E501
    "xla: dgate of a v that is not rounded": Rewrite("gated_reference", "round_to(unit if factor is None else unit * factor, to).astype(F32)", "(unit if factor is None else unit * factor)"),  # noqa: E501
    "xla: dweight of dy": Rewrite("gated_reference", "product(dv, unit).reshape", "product(wide_dy, unit).reshape"),
}  # fmt: skip


def operands(n: int, groups: int, dtype: Any = BF16) -> list[Array]:
    """x, gate, weight and dy."""
    rng = np.random.default_rng(n)
    shape = (ROWS, n * groups)
    x, gate, weight, dy = (rng.standard_normal(size) for size in (shape, shape, shape[1], shape))
    gate[0, :4] = 200, -200, 0, 87.5
    return [value.astype(dtype) for value in (x, 3 * gate, weight, dy)]


def compare(found: dict[str, Any], expected: Results) -> None:
    for name in ("rstd", "y", "dx", "dgate"):
        wanted = getattr(expected, name)
        oracle.assert_same(np.asarray(found[name]).reshape(wanted.shape), wanted)
    assert expected.dweight is not None
    bound = expected.dweight_error + oracle.spacing(np.abs(expected.dweight), F32)
    oracle.assert_within(np.asarray(found["dweight"]).reshape(-1), expected.dweight, bound)


def kernel(n: int) -> None:
    modules = {name: sys.modules[f"pallas_norm.kernels.{name}"] for name in ("gated", "gated_backward")}  # of a mutant
    form = sys.modules["pallas_norm.gated_reference"].Form
    x, gate, weight, dy = operands(n, GROUPS[n])
    rows = {"x": x, "gate": gate, "dy": dy}
    flat = {name: jnp.asarray(value.reshape(-1, n)) for name, value in rows.items()} | {"weight": jnp.asarray(weight)}
    plans = plan_for(n, BF16, residual=True), backward_plan_for(n, BF16, residual=True)
    forward, backward = (modules["gated"].fitted(plan, GROUPS[n]) for plan in plans)
    for how in HOW:
        spec = Spec(cast_before_scale=how.cast_before_scale, out_dtype=how.out_dtype and "bfloat16")
        options: dict[str, Any] = {"spec": spec, "form": form(how.activation, how.norm_before_gate, n)}
        given = {name: flat[name] for name in ("x", "gate", "weight")}
        found = modules["gated"].forward(given, plan=forward, with_rstd=True, interpret=True, **options)
        gradients = modules["gated_backward"].backward(
            flat | {"rstd": found["rstd"]}, plan=backward, with_dweight=True, interpret=True, **options
        )
        expected = gated_oracle.results(x, gate, weight, dy, how._replace(group_size=n), 1e-6, flushes=True)
        compare(found | gradients, expected)


def specification(n: int) -> None:
    reference = sys.modules["pallas_norm.gated_reference"]
    for dtype in (BF16, F32):
        x, gate, weight, dy = operands(n, GROUPS[n], dtype)
        for how in HOW:
            form = reference.Form(how.activation, how.norm_before_gate, n)
            rounding: Any = {"cast_before_scale": how.cast_before_scale}

            def call(
                x: Any, gate: Any, weight: Any, dy: Any, how: Any = how, form: Any = form, r: Any = rounding
            ) -> Any:
                y, rstd = reference.forward(x, gate, weight, form, eps=1e-6, out_dtype=how.out_dtype, **r)
                dx, dgate, terms = reference.gradients(x, gate, weight, rstd, dy, form, **r)
                dweight = reference.weight_gradient(terms)
                return {"y": y, "rstd": rstd, "dx": dx, "dgate": dgate, "dweight": dweight}

            found = jax.jit(call)(x, gate, weight, dy)
            compare(found, gated_oracle.results(x, gate, weight, dy, how._replace(group_size=n), 1e-6, flushes=True))


def activations(_: int) -> None:
    sigmoid = sys.modules["pallas_norm._activation"].sigmoid
    for gates in (np.concatenate([NEAR, -NEAR]), *EVERY.values()):
        oracle.assert_same(jax.jit(lambda g: sigmoid(g))(gates), gated_oracle.sigmoid(oracle.flushed(gates)))


def fitted(_: int) -> None:
    for groups in (1, 2, 5, 7, 8):
        plan = sys.modules["pallas_norm.kernels.gated"].fitted(backward_plan_for(1024, BF16, residual=True), groups)
        assert plan.programs % groups == 0
        assert plan.programs > 792 - groups


def holds(name: str) -> Any:
    rewrite = GATED[name]
    if rewrite.module == "_activation":
        return specification if "slope" in name else activations
    return specification if name.startswith("xla") else kernel if rewrite.n else fitted


@pytest.mark.slow
@pytest.mark.parametrize("name", GATED)
def test_a_rewrite_is_killed(name: str) -> None:
    with rewritten(GATED[name]), pytest.raises(AssertionError):
        holds(name)(GATED[name].n)


@pytest.mark.slow
@pytest.mark.parametrize("n", [33, 1000, 1024])
def test_the_real_kernels_are_killed_by_nothing(n: int) -> None:
    kernel(n)


@pytest.mark.slow
@pytest.mark.parametrize("n", GROUPS)
def test_the_specification_is_killed_by_nothing(n: int) -> None:
    specification(n)


def test_the_activation_is_killed_by_nothing() -> None:
    activations(0)


def test_plans_of_several_weights_keep_the_order_and_give_each_program_one_group() -> None:
    fitted(0)
    gated = sys.modules["pallas_norm.kernels.gated"]
    plan = backward_plan_for(1024, BF16, residual=True)
    assert gated.fitted(plan, 5).order == backward_order(1024, BF16, residual=True)
    for n, groups in ((128, 2), (1024, 129), (1024, 793), (65536, 3)):
        with pytest.raises(Misfit):
            gated.fitted(backward_plan_for(n, BF16, residual=True), groups)
