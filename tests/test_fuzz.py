"""Arbitrary objects as every argument of the public functions: the specified bits, or a documented error that names an
argument at fault. Nothing that was passed changes."""

from __future__ import annotations

import fractions
import math
import numbers
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm import Explanation, Plan, add_rms_norm, dlpack, explain, plan_for, rms_norm
from tests import oracle, specified, strategies
from tests.anything import ANYTHING, SCALARS
from tests.oracle import BF16, DTYPES, F16, F32
from tests.strategies import examples

DOCUMENTED = (TypeError, ValueError, NotImplementedError)
FLUSHES = strategies.flushes("xla")  # the path of a machine without a GPU
SHAPES = ((8,), (3, 8), (2, 1, 8), (0, 8), (3, 33), (1, 33))  # each compiles, so they are few
EPS = (1e-6, 0, 0.5, np.float32(1e-5), fractions.Fraction(1, 3))
PLANNED = ("bfloat16", np.float16, BF16, ">f4")
ABSENT = object()
LARGEST = float(np.finfo(np.float32).max)


class Foreign:
    """Speaks DLPack for another array, or returns or raises what it was given."""

    def __init__(self, inner: Any, device: Any = (1, 0)) -> None:
        self.inner, self.device = inner, device
        if hasattr(inner, "dtype"):
            self.dtype = inner.dtype

    def __dlpack__(self, **options: Any) -> Any:
        if isinstance(self.inner, Exception):
            raise self.inner
        return self.inner.__dlpack__(**options) if hasattr(self.inner, "__dlpack__") else self.inner

    def __dlpack_device__(self) -> Any:
        return self.device


# --- what is drawn --------------------------------------------------------------------------------------------------


def laid_out(values: np.ndarray, layout: str) -> Any:
    """The same elements, elsewhere in memory."""
    match layout:
        case "jax":
            return jnp.asarray(values)
        case "read-only":
            values.setflags(write=False)
            return values
        case "backwards":
            return np.ascontiguousarray(values[..., ::-1])[..., ::-1]
        case "transposed":
            return np.ascontiguousarray(values.T).T
        case "every second":
            wide = np.full((*values.shape[:-1], 2 * values.shape[-1]), np.nan, values.dtype)
            wide[..., ::2] = values
            return wide[..., ::2]
        case "an odd address":
            raw = np.zeros(values.nbytes + 1, np.uint8)
            moved = raw[1:].view(values.dtype).reshape(values.shape)
            moved[...] = values
            return moved
    return values


LAYOUTS = ("plain", "jax", "read-only", "backwards", "transposed", "every second", "an odd address")


@st.composite
def operands(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> Any:
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    values = draw(st.sampled_from(("normal", "tiny", "special", "bits", "subnormal")))
    return laid_out(strategies.numbers(rng, shape, dtype, values), draw(st.sampled_from(LAYOUTS)))


@st.composite
def calls(draw: st.DrawFn, *, with_residual: bool) -> dict[str, Any]:
    """Every argument, of which up to two are anything at all."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(tuple(DTYPES)))
    arguments = {
        "x": draw(operands(shape, dtype)),
        **({"residual": draw(operands(shape, dtype))} if with_residual else {}),
        "weight": draw(st.none() | st.sampled_from(tuple(DTYPES)).flatmap(lambda kind: operands(shape[-1:], kind))),
        "eps": draw(st.sampled_from(EPS)),
        "cast_before_scale": draw(st.booleans()),
        "weight_offset": draw(st.sampled_from((0.0, 1))),
        "implementation": draw(st.sampled_from((None, "xla"))),
        "return_rstd": draw(st.sampled_from((True, True, False))),
    }
    for name in draw(st.lists(st.sampled_from(tuple(arguments)), max_size=2)):
        arguments[name] = draw(ANYTHING)
    return arguments


# --- what is right, by the table of the README ------------------------------------------------------------------------


def is_operand(value: Any) -> bool:
    return (
        isinstance(value, (np.ndarray, jax.Array))
        and not isinstance(value, np.ma.MaskedArray)
        and value.dtype in (BF16, F16, F32)  # of this machine's byte order
    )


def is_number(value: Any) -> bool:
    if isinstance(value, (bool, np.timedelta64)) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(float(value)) and abs(float(value)) <= LARGEST
    except OverflowError:
        return False


def at_fault(
    x: Any, weight: Any = None, eps: Any = 0.0, cast_before_scale: Any = ABSENT, weight_offset: Any = 0.0,
    implementation: Any = None, return_rstd: Any = ABSENT, **residual: Any,
) -> set[str]:  # fmt: skip
    """The names of the arguments that break the contract."""
    right_x = is_operand(x) and x.ndim > 0 and x.shape[-1] > 0
    right = {
        "x": right_x,
        "weight": weight is None or (is_operand(weight) and (not right_x or weight.shape == x.shape[-1:])),
        "eps": is_number(eps) and float(eps) >= 0,
        "cast_before_scale": cast_before_scale is ABSENT or isinstance(cast_before_scale, (bool, np.bool_)),
        "weight_offset": is_number(weight_offset) and not (float(weight_offset) and weight is None),
        "implementation": implementation is None or (isinstance(implementation, str) and implementation == "xla"),
        "return_rstd": return_rstd is ABSENT or isinstance(return_rstd, (bool, np.bool_)),
    }
    for value in residual.values():
        same = not right_x or (is_operand(value) and (value.shape, value.dtype) == (x.shape, x.dtype))
        right["residual"] = is_operand(value) and same
    return {name for name, fine in right.items() if not fine}


def snapshot(value: Any) -> Any:
    if isinstance(value, Foreign):
        return snapshot(value.inner)
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.strides, value.tolist() if value.dtype.hasobject else value.tobytes()
    if isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return value.dtype, value.shape, np.asarray(value).tobytes()
    return None


def outcome(function: Callable[..., Any], arguments: dict[str, Any], names: set[str] | None) -> Any:
    """The result, or None for an error that names one of `names`; None where either is right."""
    before = {name: snapshot(value) for name, value in arguments.items()}
    try:
        result, error = function(**arguments), None
    except DOCUMENTED as raised:
        result, error = None, raised
    if error is None:
        assert not names, f"{names} went unnoticed"
    else:
        assert type(error) in DOCUMENTED
        assert names is None or names, f"a right call was refused: {error}"
        pattern = "|".join(names or arguments)
        assert re.match(rf"({pattern})\b", str(error)), f"{error!r} names none of {pattern}"
    assert {name: snapshot(value) for name, value in arguments.items()} == before
    return result


def assert_bits(y: Any, s: Any, rstd: Any, arguments: dict[str, Any]) -> None:
    """y and rstd of s by the host, bit for bit."""
    weight = arguments["weight"]
    s, weight = np.asarray(s), None if weight is None else np.asarray(weight)
    options = {"cast_before_scale": bool(arguments["cast_before_scale"])}
    options["weight_offset"] = float(arguments["weight_offset"])
    expected = specified.forward(s, weight, float(arguments["eps"]), **options, flushes=FLUSHES)
    for found, value in zip((y, rstd), expected, strict=True):
        oracle.assert_same(found, value)


# --- the properties ---------------------------------------------------------------------------------------------------


@given(calls(with_residual=False))
def test_rms_norm(arguments: dict[str, Any]) -> None:
    results = outcome(rms_norm, arguments, at_fault(**arguments))
    if results is None:
        return
    y = results[0] if arguments["return_rstd"] else results
    x, weight = arguments["x"], arguments["weight"]
    assert y.shape == x.shape
    assert y.dtype == oracle.result_dtype(x.dtype, None if weight is None else weight.dtype)
    if arguments["return_rstd"]:
        assert_bits(y, x, results[1], arguments)


@examples(0.5)
@given(calls(with_residual=True))
def test_add_rms_norm(arguments: dict[str, Any]) -> None:
    results = outcome(add_rms_norm, arguments, at_fault(**arguments))
    if results is None:
        return
    x, residual = arguments["x"], arguments["residual"]
    oracle.assert_same(results[1], oracle.add(np.asarray(x), np.asarray(residual), flushes=FLUSHES))
    if arguments["return_rstd"]:
        assert_bits(results[0], results[1], results[2], arguments)


@examples(2.0)
@given(operands((3, 33), "bf16") | ANYTHING, st.sampled_from((None, "xla")) | ANYTHING)
def test_explain(x: Any, implementation: Any) -> None:
    shape = getattr(x, "shape", None)
    names: set[str] | None = at_fault(x, implementation=implementation)
    if "x" in names and isinstance(shape, tuple):  # a ShapeDtypeStruct, or what looks like one, may do
        names = None
    found = outcome(explain, {"x": x, "implementation": implementation}, names)
    assert found is None or isinstance(found, Explanation)


@examples(2.0)
@given(st.integers(-1, 140_000) | ANYTHING, st.sampled_from(PLANNED) | ANYTHING)
def test_plan_for(n: Any, dtype: Any) -> None:
    integer = isinstance(n, (int, np.integer)) and not isinstance(n, (bool, np.timedelta64))
    names = None if integer and 32 <= n <= 131072 else {"n", "dtype", "no kernel for rows"}
    found = outcome(plan_for, {"n": n, "dtype": dtype}, names)
    if found is None:
        assert names or not isinstance(dtype, (str, type, np.dtype)) or dtype not in PLANNED
    else:
        assert isinstance(found, Plan)
        assert found.n == n


@given(calls(with_residual=False), st.sampled_from(("as it is", "foreign", "broken")), st.data())
def test_dlpack(arguments: dict[str, Any], kind: str, data: st.DataObject) -> None:
    del arguments["implementation"], arguments["return_rstd"]
    names: set[str] | None = at_fault(**arguments)
    if kind == "foreign":
        for name in ("x", "weight"):
            if hasattr(arguments[name], "__dlpack__"):
                arguments[name] = Foreign(arguments[name])
        # What NumPy or JAX does not pass on, strided, read-only or of bfloat16, is refused.
        names = names | {"x", "weight"} if names else None
    elif kind == "broken":
        errors = st.sampled_from((RuntimeError("no"), BufferError("no"), AttributeError("no"), ValueError("no")))
        devices = st.sampled_from(((1, 0), (1, 7), (2, 0), (99, 0), None, (1,), "ab"))
        arguments["x"] = Foreign(data.draw(errors | SCALARS), data.draw(devices))
        names = {"x"}
    y = outcome(dlpack.rms_norm, arguments, names)
    if y is not None:
        x = arguments["x"].inner if kind == "foreign" else arguments["x"]
        assert isinstance(y, np.ndarray if isinstance(arguments["x"], np.ndarray) else jax.Array)
        assert y.shape == x.shape
