"""The order in which a row is added up: what it is, that no accident changes it, and that every path follows it."""

from __future__ import annotations

import hashlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import _inverse_root, _row_sum, add_rms_norm
from pallas_norm._spec import Spec
from pallas_norm.kernels import forward as forward_kernel
from pallas_norm.plans.backward import backward_order
from pallas_norm.plans.forward import forward_order
from pallas_norm.plans.lengths import LARGEST_N, SMALLEST_N
from pallas_norm.plans.order import Order
from pallas_norm.regimes import plan_for
from tests import computed, kernel_text, oracle, specified, strategies
from tests.oracle import DTYPES, F32

# Rows of every kind: all short ones, and of long ones those that vectors of each width divide.
SAMPLE = [n for n in range(1, LARGEST_N + 3) if n <= 4200 or n % 64 == 0 or n % 37 == 0 or n % 1000 == 0]
BACKWARD = {
    f"{dtype}, dy {dy_dtype}{', ds' if residual else ''}": {"dtype": dtype, "dy_dtype": dy_dtype, "residual": residual}
    for dtype, dy_dtype in (("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32"))
    for residual in (False, True)
}
# A change of one of these is a change of version, named in CHANGELOG.md.
RECORDED = {
    "bfloat16": "83c71aec4e64a25d",
    "float32": "f966f93d26eeabe0",
    "bfloat16, dy bfloat16": "a4d0d0115f1126e7",
    "bfloat16, dy bfloat16, ds": "a4d0d0115f1126e7",
    "bfloat16, dy float32": "a4d0d0115f1126e7",
    "bfloat16, dy float32, ds": "00e345cfba8aa666",
    "float32, dy float32": "35e9df3504468a17",
    "float32, dy float32, ds": "35e9df3504468a17",
}


def digest(orders: list[Order]) -> str:
    return hashlib.sha256(" ".join(f"{order.n}:{order.width}" for order in orders).encode()).hexdigest()[:16]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_widths_of_the_forward_pass_are_those_recorded(dtype: str) -> None:
    assert digest([forward_order(n, dtype) for n in SAMPLE]) == RECORDED[dtype]
    assert forward_order(4096, "float16") == forward_order(4096, "bfloat16")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", BACKWARD)
def test_the_widths_of_the_backward_pass_are_those_recorded(form: str) -> None:
    assert digest([backward_order(n, **BACKWARD[form]) for n in SAMPLE]) == RECORDED[form]


def test_an_order_covers_a_row_once() -> None:
    for order in [forward_order(n, "bfloat16") for n in SAMPLE]:
        assert order.width & (order.width - 1) == 0
        assert 1 <= order.width <= order.n
        assert 0 <= order.overlap < order.width
        assert order.blocks * order.width - order.overlap == order.n


def test_rows_without_a_kernel_have_few_blocks() -> None:
    """XLA compiles an addition for each."""
    assert [forward_order(n, "bfloat16").width for n in (1, 2, 3, 7, 8, 31)] == [1, 2, 2, 4, 8, 16]
    for n in (LARGEST_N + 1, 200_000, 1_000_000, 123_456_789):
        assert 8 <= forward_order(n, "float32").blocks <= 16
    assert forward_order(SMALLEST_N, "float32").width == 32


def test_the_order_of_the_docs_picture() -> None:
    """Powers of two far apart: each sum keeps the larger only, so the result says what was added to what."""
    values = np.array([2.0**30, 1, -(2.0**30), 1, 1, 1, 1, 1, 1, 1, 1], F32)
    # Columns: 2^30 + 1 -> 2^30; 1 + 1 + 1; -2^30 + 1 + 1 -> -2^30; 1 + 1 + 1. Then 2^30 + 3 -> 2^30, and minus it.
    assert float(_row_sum.row_sum(jnp.asarray(values), Order(11, 4))[0]) == 0.0
    assert float(specified.row_sum(values, 4)) == 0.0
    assert float(values.astype(np.float64).sum()) == 9.0


def test_a_sum_of_negative_zeros_is_one() -> None:
    row_sum = sys.modules["pallas_norm._row_sum"].row_sum  # of a mutant
    for n, width in ((11, 4), (8, 8), (5, 2)):
        total = row_sum(jnp.full((1, n), -0.0, jnp.float32), Order(n, width))
        oracle.assert_same(np.asarray(total), np.full((1, 1), -0.0, F32))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 33, 80, 1000, 4096, 5120, 12289, 131073])
def test_the_specification_is_within_its_bounds_of_float64(n: int, dtype: str) -> None:
    """What every path is held to bit for bit is held to this, once."""
    given = drawn(n, 9, dtype, 3)
    for residual in (False, True):
        found = specified.results(given, 1e-6, residual=residual)
        x, rstd = found["s"] if residual else given["x"], found["rstd"]
        oracle.assert_rstd(rstd, x, 1e-6, forward_order(n, x.dtype).depth)
        additions = backward_order(n, x.dtype, residual=residual).depth
        dx = specified.input_gradient(x, given["weight"], rstd, given["dy"])
        oracle.assert_within(dx, *oracle.input_gradient64(x, given["weight"], rstd, given["dy"], additions))
        oracle.assert_same(found["dx"], oracle.add(dx, given["ds"]) if residual else dx)


# --- products and roots that no compiler improves ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (64, 1024), (257, 96)])
def test_a_product_is_rounded_before_it_is_added(shape: tuple[int, int]) -> None:
    """x * y + z as one instruction differs in a quarter of the elements, and XLA's CPU code has it in some shapes."""
    x, y, z = np.random.default_rng(0).standard_normal((3, *shape)).astype(F32)

    def added(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
        return z - sys.modules["pallas_norm._row_sum"].product(x, y)  # of a mutant

    oracle.assert_same(jax.jit(added)(x, y, z), z - x * y)
    oracle.assert_same(jax.jit(lambda y, z: added(jnp.asarray(x), y, z))(y, z), z - x * y)  # one is a constant


def test_what_is_not_finite_is_multiplied_as_ever() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e38, -1e38], F32)
    with np.errstate(all="ignore"):
        expected = values[:, None] * values
    oracle.assert_same(jax.jit(_row_sum.product)(np.broadcast_to(values[:, None], (7, 7)), values[None]), expected)


def planted(function: object, units: int) -> object:
    """`function`, that many units in the last place off."""

    def off(values: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(function(values), jnp.int32)  # type: ignore[operator]
        return jax.lax.bitcast_convert_type(bits + units, jnp.float32)

    return off


def roots(values: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return F32.type(1) / np.sqrt(values)


@pytest.mark.parametrize(("of_root", "of_quotient"), [(0, 0), (1, -1), (-1, 1), (2, 2), (-2, -2), (2, -2), (0, 1)])
def test_a_root_and_a_quotient_that_are_off_are_put_right(of_root: int, of_quotient: int) -> None:
    edges = [np.arange(edge - 2000, edge + 2000) for edge in (0x3F800000, 0x40000000, 0x40800000)]
    mantissas = np.concatenate([*edges, np.random.default_rng(0).integers(0x3F800000, 0x40800000, 1 << 17)])
    values = np.ldexp(mantissas.astype(np.uint32).view(F32), 2 * np.array([[-62], [-20], [0], [62]]))

    @jax.jit
    def corrected(values: jax.Array) -> jax.Array:
        root, module = planted(jnp.sqrt, of_root), sys.modules["pallas_norm._inverse_root"]  # of a mutant
        return module.corrected(values, root, planted(lambda root: jnp.float32(1) / root, of_quotient))

    oracle.assert_same(corrected(values), roots(values))


@pytest.mark.nightly
@pytest.mark.parametrize(("of_root", "of_quotient"), [(r, q) for r in range(-2, 3) for q in range(-2, 3)])
def test_every_mantissa_is_put_right(of_root: int, of_quotient: int) -> None:
    values = np.arange(0x3F800000, 0x40800000, dtype=np.uint32).view(F32)
    root, quotient = planted(jnp.sqrt, of_root), planted(lambda root: jnp.float32(1) / root, of_quotient)
    found = jax.jit(lambda values: _inverse_root.corrected(values, root, quotient))(values)
    oracle.assert_same(found, roots(values))


def test_roots_of_what_is_no_ordinary_number() -> None:
    values = np.array([0.0, -0.0, np.inf, np.nan, -1.0, 2.0**-126, np.finfo(F32).max], F32)
    for function in (_inverse_root.corrected, _inverse_root.inverse_root):
        oracle.assert_same(jax.jit(function)(values), roots(values))
    assert jax.grad(lambda value: _inverse_root.inverse_root(value))(jnp.float32(4)) == -1 / 16


# --- every path -------------------------------------------------------------------------------------------------------


def drawn(n: int, rows: int, dtype: str, seed: int) -> computed.Arrays:
    rng = np.random.default_rng((n, rows, seed))
    given = {
        name: rng.standard_normal((rows, n)) * 2.0 ** rng.integers(-6, 6) for name in ("x", "residual", "dy", "ds")
    }
    given["weight"] = 1 + 0.3 * rng.standard_normal(n)
    return {name: value.astype(DTYPES[dtype]) for name, value in given.items()}


WIDTHS = (*strategies.NARROW, *strategies.WIDTHS, 8192, 12288, 16385)


@pytest.mark.sampled(30)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS[::3])
def test_xla_has_the_bits_of_the_specification_in_numpy(n: int, dtype: str) -> None:
    """By itself, with rstd, in the residual form, and their gradients."""
    rows = int(np.random.default_rng(n).integers(1, 40))
    given = drawn(n, rows, dtype, 0)
    for residual in (False, True):
        found = computed.results(given, 1e-6, residual=residual, implementation="xla")
        for name, value in specified.results(given, 1e-6, residual=residual).items():
            oracle.assert_same(found[name], value)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("n", [80, 1000, 1024])
def test_eager_and_jitted_and_interpreted_calls_have_the_same_bits(n: int) -> None:
    given = drawn(n, 9, "bf16", 1)
    x, residual, weight = given["x"], given["residual"], given["weight"]
    expected = specified.results(given, 1e-6, residual=True)
    for implementation in ("xla", "interpret"):
        for call in (add_rms_norm, jax.jit(add_rms_norm, static_argnames=("implementation", "return_rstd"))):
            y, s, rstd = call(x, residual, weight, implementation=implementation, return_rstd=True)
            for name, value in {"y": y, "s": s, "rstd": rstd}.items():
                oracle.assert_same(value, expected[name])


@pytest.mark.parametrize(("n", "lanes"), [(128, 16), (1000, 32), (4096, 32)])
def test_mosaic_adds_up_lanes_and_warps_as_neighbours(n: int, lanes: int) -> None:
    """Its reduction is private: were the order another one in some version of JAX, the kernels would have to say it."""

    def kernel(x: jax.Array) -> dict[str, jax.Array]:
        options = {"spec": Spec(), "with_rstd": True, "interpret": False}
        return forward_kernel.forward({"x": x}, plan=plan_for(n, "bfloat16"), **options)

    (module,) = kernel_text.modules(kernel, jax.ShapeDtypeStruct((40, n), jnp.bfloat16))
    text = kernel_text.text(module)
    distances = [int(distance) for distance in re.findall(r"shfl\.sync bfly .*?%c(\d+)_i32, %c31_i32", text)]
    assert distances
    assert distances == [2**i for i in range(int(np.log2(lanes)))] * (len(distances) // int(np.log2(lanes)))
    if n == 4096:  # of a warpgroup: %a, %b, %c, %d are the four warps, in their order
        parts = re.findall(r"(%\d+) = vector\.extract_strided_slice %\d+ \{?offsets = \[(\d)\]", text)
        (a, b, c, d) = (name for name, _ in sorted(parts, key=lambda part: part[1]))
        sums = re.findall(r"(%\d+) = arith\.addf (%\d+), (%\d+) fastmath<contract> : vector<1xf32>", text)[-3:]
        assert [set(operands) for _, *operands in sums] == [{a, b}, {c, d}, {sums[0][0], sums[1][0]}]
