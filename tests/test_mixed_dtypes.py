"""Every combination of dtypes of x, residual, weight, unit, y and s: the bits of a replay, gradients of their dtypes.

XLA compiles all of them, a program for each pair of x and residual; the kernels take those that people train and serve
with, and what Hypothesis draws in the other files.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm import add_rms_norm, rms_norm
from pallas_norm._spec import Spec
from tests import oracle
from tests.oracle import BF16, DTYPES, F32, Array
from tests.strategies import backward_widths, examples, flushes, weights

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
    n, rstd, dy = x.shape[-1], found["rstd"], given["dy"]
    oracle.assert_rstd(rstd, x, EPS, oracle.depth(n, x.dtype, implementation), flushes=flush)
    oracle.assert_same(found["y"], oracle.replay(x, weight, rstd, **rounding, flushes=flush))
    residual = mix.residual is not None
    form = {"backward": True, "dy_dtype": dy.dtype, "residual": residual}
    ds, bound = oracle.input_gradient64(
        x, weight, rstd, dy, oracle.depth(n, x.dtype, implementation, **form), **rounding
    )
    if residual:  # added to the rounded gradient, and rounded
        ds = ds + given["ds"].astype(np.float64)
        bound = bound + oracle.U * np.abs(ds)
        bound = bound + oracle.spacing(np.abs(ds) + bound, x.dtype) / 2
    for name in ("x", "residual") if residual else ("x",):
        gradient = found[f"d{name}"]
        assert gradient.dtype == given[name].dtype
        narrowed = 0 if gradient.dtype == x.dtype else oracle.spacing(np.abs(ds) + bound, gradient.dtype) / 2
        oracle.assert_within(gradient, ds, bound + narrowed)
    if weight is not None:
        of_unit = {"unit_dtype": rounding["unit_dtype"]}
        oracle.assert_within(found["dweight"], *oracle.weight_gradient64(x, rstd, dy, weight.dtype, **of_unit))
        assert found["dweight"].dtype == weight.dtype


def test_the_dtypes_of_every_call_are_those_that_the_rule_gives() -> None:
    """With what is left to it, too: a weight that nothing narrows keeps its dtype, so that y does."""
    kinds = (None, *DTYPES)
    named = {None: None, **{name: dtype.name for name, dtype in DTYPES.items()}}
    seen = 0
    for x, residual, weight, unit, out, s in itertools.product(DTYPES, *[kinds] * 5):
        for cast, round_weight in itertools.product((True, False), repeat=2):
            options = {"unit_dtype": named[unit], "out_dtype": named[out], "s_dtype": named[s] if residual else None}
            options |= {"cast_before_scale": cast, "round_weight": round_weight}
            rule = Spec(**options).dtypes(named[x], named[residual], named[weight])
            assert tuple(vars(rule).values()) == oracle.roundings(
                named[x], named[weight], residual=named[residual], **options
            )
            seen += 1
    assert seen == 3 * 4**5 * 4


@pytest.mark.parametrize("step", [17, pytest.param(1, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("residual", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("x", DTYPES)
def test_every_combination_of_dtypes_has_the_bits_of_the_replay(x: str, residual: str | None, step: int) -> None:
    """Operation by operation, every seventeenth of 1,890 before each push: one takes 0.4 s with the order of the row's
    sum. All of them, before each push too: the rule above, and torch's statements."""
    with jax.disable_jit():
        for mix in itertools.islice(every(x, residual), 0, None, step):
            given = draw(mix)
            check(mix, given, call(mix, given, "xla"), "xla")


@pytest.mark.parametrize("mix", TRAINED, ids=str)
@pytest.mark.parametrize("n", [128, 1000])
def test_what_people_train_with(implementation: str, n: int, mix: Mix) -> None:
    given = draw(mix, 21, n)
    check(mix, given, jax.jit(functools.partial(call, mix, implementation=implementation))(given), implementation)


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    """Any that is allowed, also what is left to the rule."""
    kinds = st.sampled_from((None, *DTYPES))
    residual, weight = draw(kinds), draw(kinds)
    return Mix(
        draw(st.sampled_from(tuple(DTYPES))),
        residual,
        weight,
        unit_dtype=draw(kinds),
        round_weight=weight is not None and draw(st.booleans()),
        out_dtype=draw(kinds),
        s_dtype=draw(kinds) if residual else None,
        weight_offset=draw(st.sampled_from((0.0, 1.0))) if weight else 0.0,
    )


SHARE = {"xla": 0.2, "interpret": 0.05, "mosaic_gpu": 0.1}


def test_any_mix_in_rows_of_any_length(implementation: str) -> None:
    widths = backward_widths(implementation)

    @examples(SHARE[implementation])
    @given(mixes(), st.sampled_from(widths if implementation == "interpret" else widths[:20]), st.integers(1, 23))
    def holds(mix: Mix, n: int, rows: int) -> None:
        given = draw(mix, rows, n)
        check(mix, given, jax.jit(functools.partial(call, mix, implementation=implementation))(given), implementation)

    holds()


def test_a_stream_of_float32_beside_a_bfloat16_x_in_kernels_whose_warps_share_a_row() -> None:
    mix = TRAINED[5]
    given = draw(mix, 3, 1536)
    check(mix, given, call(mix, given, "interpret"), "interpret")


@pytest.mark.parametrize("unit", DTYPES)
@pytest.mark.parametrize("weight", DTYPES)
def test_the_bits_of_a_rounded_weight_are_those_of_one_that_was_cast(weight: str, unit: str) -> None:
    mix = Mix("f32", None, weight, unit_dtype=unit, out_dtype="f32")
    given = draw(mix)
    x, own = given["x"], given["weight"]
    cast = own if unit == "f32" else own.astype(DTYPES[unit])
    options = mix.dtypes | {"eps": EPS}
    oracle.assert_same(rms_norm(x, own, round_weight=True, **options), rms_norm(x, cast, **options))


def test_dweight_of_a_float32_weight_is_within_float32s_bounds_where_that_of_a_cast_one_is_not() -> None:
    """Of 65,536 rows. The bound is that of a float32 sum in any order; a bfloat16 dweight is 2^-9 off."""
    mix = Mix("bf16", None, "f32", round_weight=True)
    given = draw(mix, 65_536, 32)
    x, weight, dy = (given[name] for name in ("x", "weight", "dy"))

    def dweight(norm: Any) -> Array:
        return np.asarray(jax.jit(lambda: jax.vjp(norm, jnp.asarray(weight))[1](jnp.asarray(dy))[0])())

    rstd = np.asarray(rms_norm(x, return_rstd=True)[1])
    exact, bound = oracle.weight_gradient64(x, rstd, dy, F32)
    # No more than the square root of the rows, many times: a sum over all rows in one float32 would be further off.
    bound = bound / 65_537 * 64
    rounded = dweight(lambda weight: rms_norm(x, weight, round_weight=True))
    assert rounded.dtype == F32
    oracle.assert_within(rounded, exact, bound)
    with pytest.raises(AssertionError, match="outside the bound"):
        oracle.assert_within(dweight(lambda weight: rms_norm(x, weight.astype(BF16))), exact, bound)


def test_a_float32_unit_has_two_names_and_one_program() -> None:
    x, weight = (draw(Mix("bf16", None, "bf16"))[name] for name in ("x", "weight"))
    texts = {
        jax.jit(functools.partial(rms_norm, **options)).lower(x, weight).as_text()
        for options in ({"unit_dtype": "float32"}, {"cast_before_scale": False}, {"unit_dtype": np.float32})
    }
    assert len(texts) == 1
    assert rms_norm(x, weight, cast_before_scale=False, unit_dtype="float32").dtype == BF16


@pytest.mark.parametrize("mix", TRAINED, ids=str)
def test_members_with_and_without_weights_of_their_own_are_those_of_a_loop(mix: Mix) -> None:
    given = [draw(mix, 3, 64) for _ in range(2)]
    given[1] = {name: (2 * value.astype(F32)).astype(value.dtype) for name, value in given[0].items()}
    whole = {name: jnp.stack([one[name] for one in given]) for name in given[0]}
    loop = [call(mix, one, "xla") for one in given]
    batched = jax.vmap(functools.partial(call, mix, implementation="xla"))(whole)
    for name, value in batched.items():
        oracle.assert_same(value, np.stack([np.asarray(one[name]) for one in loop]))


@pytest.mark.parametrize("mix", TRAINED, ids=str)
def test_rows_on_four_devices_are_those_on_one_but_for_the_order_of_dweight(mix: Mix) -> None:
    devices = jax.devices("cpu")[:4]
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,), devices=devices)
    given = draw(mix, 16, 64)

    def placed(name: str, value: Array) -> jax.Array:
        spec = jax.P() if name == "weight" else jax.P("rows")
        return jax.device_put(value, jax.NamedSharding(mesh, spec))

    run = jax.jit(functools.partial(call, mix, implementation="xla"))
    with jax.set_mesh(mesh):
        spread = run({name: placed(name, value) for name, value in given.items()})
    check(mix, given, spread, "xla")
    assert "dweight" not in spread or spread["dweight"].sharding.spec == jax.P(None)


@pytest.mark.parametrize("mix", TRAINED[:6], ids=str)
def test_second_derivatives_are_of_the_dtypes_of_what_they_are_of(mix: Mix) -> None:
    given = {name: jnp.asarray(value) for name, value in draw(mix, 3, 64).items()}
    operands = {name: given[name] for name in ("x", "residual", "weight") if name in given}
    norm = rms_norm if mix.residual is None else add_rms_norm

    def loss(operands: dict[str, Any]) -> Any:
        y = norm(**operands, weight_offset=mix.weight_offset, **mix.dtypes)
        return sum(jnp.sum(one.astype(F32) ** 3) for one in jax.tree.leaves(y))

    def length(operands: dict[str, Any]) -> Any:
        return sum(jnp.sum(one.astype(F32) ** 2) for one in jax.tree.leaves(jax.grad(loss)(operands)))

    second = jax.jit(jax.grad(length))(operands)
    for name, value in second.items():
        assert value.dtype == operands[name].dtype
        assert np.isfinite(np.asarray(value).astype(F32)).all()
        assert (np.asarray(value) != 0).any()


def test_the_second_derivative_of_a_rounded_weight_is_not_rounded_on_the_way() -> None:
    given = draw(Mix("bf16", None, "f32", round_weight=True), 4, 64)
    x, dy = jnp.asarray(given["x"]), jnp.asarray(given["dy"])

    def dx(weight: Any) -> Any:
        return jax.vjp(lambda x: rms_norm(x, weight, round_weight=True, out_dtype="float32"), x)[1](dy.astype(F32))[0]

    second = np.asarray(jax.grad(lambda weight: jnp.sum(dx(weight).astype(F32)))(jnp.asarray(given["weight"])))
    assert second.dtype == F32
    assert (second.astype(BF16).astype(F32) != second).mean() > 0.9


def test_where_y_is_not_used_the_gradient_of_s_is_passed_on_as_it_is_but_for_its_dtype() -> None:
    given = draw(TRAINED[4])

    def of_s(x: Any, residual: Any) -> Any:
        return add_rms_norm(x, residual, given["weight"], out_dtype="bfloat16", unit_dtype="bfloat16")[1]

    dx, dresidual = jax.vjp(of_s, jnp.asarray(given["x"]), jnp.asarray(given["residual"]))[1](jnp.asarray(given["ds"]))
    oracle.assert_same(dx, given["ds"].astype(BF16))
    oracle.assert_same(dresidual, given["ds"])


def test_an_exported_program_keeps_the_dtypes() -> None:
    mix = TRAINED[5]
    given = {name: jnp.asarray(value) for name, value in draw(mix).items()}
    run = jax.jit(functools.partial(call, mix, implementation="xla"))
    again = jax.export.deserialize(jax.export.export(run)(given).serialize())
    for name, value in again.call(given).items():
        oracle.assert_same(value, np.asarray(run(given)[name]))
