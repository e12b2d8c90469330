"""What bad calls raise: the type and the whole message, word for word."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export

from pallas_norm import add_rms_norm, explain, plan_for, rms_norm

SUGGESTION = ". Did you mean 'out_dtype'?" if sys.version_info >= (3, 13) else ""  # of Python's own message
X = np.ones((8, 128), ml_dtypes.bfloat16)
W = np.ones(128, ml_dtypes.bfloat16)


class Tensor:
    """Has a shape and a dtype, as a torch tensor does, and is none of ours."""

    shape = (8, 128)
    dtype = "torch.bfloat16"


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Bad(NamedTuple):
    name: str
    call: Callable[[], Any]
    error: type[Exception]
    message: str


def wrong_dtype(operand: str) -> str:
    return f"{operand}; needed one of bfloat16, float16, float32: cast it with astype first"


def no_array(operand: str) -> str:
    return f"{operand}; needed a JAX or NumPy array: wrap it with jnp.asarray (a torch tensor: use pallas_norm_torch)"


def wrong_weight(shape: str) -> str:
    return (
        f"weight has shape {shape} but the last axis of x has length 128 (x: bfloat16[8,128]); "
        "pass the weight of this layer, or slice x"
    )


def no_float(name: str, value: str) -> str:
    return f"{name} is {value}; needed a Python float: pass float({name})"


def traced(name: str) -> str:
    return (
        f"{name} is traced (float32[]); needed a Python float, because it is compiled into the kernel: "
        f"mark it static (jax.jit(..., static_argnames='{name}')) or close over it"
    )


def wrong_residual(residual: str) -> str:
    return f"residual is {residual} but x is bfloat16[8,128]; needed the same shape: broadcast it first"


def unknown(implementation: str) -> str:
    return (
        f"implementation is {implementation}; needed None (the kernel where it runs, XLA elsewhere), "
        '"mosaic_gpu", "xla" or "interpret"'
    )


def cannot_run(implementation: str, n: int) -> str:
    return (
        f'implementation="{implementation}" cannot run: no kernel for rows of {n} elements: '
        "the kernels take 32 <= n <= 131072; pass implementation=None"
    )


def no_plan(n: int) -> str:
    return (
        f"no kernel for rows of {n} elements: the kernels take 32 <= n <= 131072; "
        'leave implementation at None or pass "xla"'
    )


NO_GPU = (
    'implementation="mosaic_gpu" cannot run: this process has no CUDA device; pass implementation=None to let XLA '
    "compile the reference where there is no such GPU"
)
NO_AXIS = "{0} is float32[]; needed at least one axis, the row to normalise: pass {0}[None]"
NOT_FINITE = "{} is {}; needed a finite float32 number"

BAD = (
    # x
    Bad("x of rank 0", lambda: rms_norm(np.ones((), np.float32)), ValueError, NO_AXIS.format("x")),
    Bad("x int32", lambda: rms_norm(X.astype(np.int32)), TypeError, wrong_dtype("x is int32[8,128]")),
    Bad("x complex64", lambda: rms_norm(X.astype(np.complex64)), TypeError, wrong_dtype("x is complex64[8,128]")),
    Bad("x float64", lambda: rms_norm(X.astype(np.float64)), TypeError, wrong_dtype("x is float64[8,128]")),
    Bad("x bool", lambda: rms_norm(X > 0), TypeError, wrong_dtype("x is bool[8,128]")),
    Bad("x float8", lambda: rms_norm(jnp.asarray(X, "float8_e5m2")), TypeError, wrong_dtype("x is float8_e5m2[8,128]")),
    Bad("x objects", lambda: rms_norm(np.array([None, None])), TypeError, wrong_dtype("x is object[2]")),
    # JAX's own error named a "stage", not x: it takes no foreign byte order
    Bad("x big-endian", lambda: rms_norm(X.astype(">f4")), TypeError, wrong_dtype("x is >f4[8,128]")),
    Bad("x masked", lambda: rms_norm(np.ma.array(X)), TypeError, "x is a masked array; needed a plain one: pass x.filled(0), say"),  # noqa: E501
    Bad("x a list", lambda: rms_norm([1.0, 2.0]), TypeError, no_array("x is a list")),
    Bad("x None", lambda: rms_norm(None), TypeError, no_array("x is a NoneType")),
    Bad("x of another library", lambda: rms_norm(Tensor()), TypeError, no_array("x is a Tensor")),
    Bad("x missing", lambda: rms_norm(), TypeError, "rms_norm() missing 1 required positional argument: 'x'"),
    # weight
    Bad("weight of rank 2", lambda: rms_norm(X, W[None]), ValueError, wrong_weight("(1, 128)")),
    Bad("weight too short", lambda: rms_norm(X, W[:64]), ValueError, wrong_weight("(64,)")),
    Bad("weight of length 1", lambda: rms_norm(X, W[:1]), ValueError, wrong_weight("(1,)")),
    Bad("weight int32", lambda: rms_norm(X, W.astype(np.int32)), TypeError, wrong_dtype("weight is int32[128]")),
    Bad("weight a list", lambda: rms_norm(X, [1.0] * 128), TypeError, no_array("weight is a list")),
    Bad("weight a number", lambda: rms_norm(X, 1.0), TypeError, no_array("weight is a float")),
    # eps
    Bad(
        "eps negative",
        lambda: rms_norm(X, eps=-1e-6),
        ValueError,
        "eps is -1e-06; needed eps >= 0: it is added to a mean of squares",
    ),
    Bad("eps NaN", lambda: rms_norm(X, eps=float("nan")), ValueError, NOT_FINITE.format("eps", "nan")),
    Bad("eps infinite", lambda: rms_norm(X, eps=float("inf")), ValueError, NOT_FINITE.format("eps", "inf")),
    Bad("eps beyond float32", lambda: rms_norm(X, eps=1e39), ValueError, NOT_FINITE.format("eps", "1e+39")),
    Bad("eps a string", lambda: rms_norm(X, eps="1e-6"), TypeError, no_float("eps", "str")),
    Bad("eps a bool", lambda: rms_norm(X, eps=True), TypeError, no_float("eps", "bool")),
    Bad("eps None", lambda: rms_norm(X, eps=None), TypeError, no_float("eps", "NoneType")),
    Bad("eps complex", lambda: rms_norm(X, eps=1j), TypeError, no_float("eps", "complex")),
    Bad("eps a JAX scalar", lambda: rms_norm(X, eps=jnp.float32(1)), TypeError, no_float("eps", "float32[]")),
    Bad("eps an array", lambda: rms_norm(X, eps=np.ones(3, np.float32)), TypeError, "eps is float32[3]; needed one Python float"),  # noqa: E501
    Bad("eps beyond float64", lambda: rms_norm(X, eps=10**400), ValueError, "eps is inf; needed a finite float32 number"),  # noqa: E501
    # to NumPy a timedelta64 is an integer: it was an eps of 3, and NaT ended in float()'s own error
    Bad("eps a time", lambda: rms_norm(X, eps=np.timedelta64(3, "s")), TypeError, no_float("eps", "timedelta64[s][]")),
    Bad("eps with a shape that is none", lambda: rms_norm(X, eps=SimpleNamespace(shape=None, dtype=None)), TypeError, no_float("eps", "SimpleNamespace")),  # noqa: E501
    # Python writes no int of 5000 digits: the message itself raised
    Bad("n too long to print", lambda: plan_for(10**5000, "float32"), ValueError, "n is an int of 16610 bits; needed the length of a row"),  # noqa: E501
    Bad("implementation without a repr", lambda: rms_norm(X, implementation=Unprintable()), ValueError, unknown("Unprintable")),  # noqa: E501
    # NumPy parses it as Python, which was a SyntaxError
    Bad("a plan for half a dtype", lambda: plan_for(64, "f4,("), TypeError, "dtype is 'f4,('; needed one of bfloat16, float16, float32"),  # noqa: E501
    Bad("a plan for the dtype of an array", lambda: plan_for(64, jnp.ones(1)), TypeError, "dtype is Array([1.], dtype=float32); needed one of bfloat16, float16, float32"),  # noqa: E501
    Bad("n a float", lambda: plan_for(64.0, "float32"), TypeError, "n is 64.0; needed an int: the length of a row"),
    Bad("n a flag", lambda: plan_for(True, "float32"), TypeError, "n is True; needed an int: the length of a row"),  # noqa: FBT003
    Bad("a plan for integers", lambda: plan_for(64, "int32"), TypeError, "dtype is int32; needed one of bfloat16, float16, float32"),  # noqa: E501
    Bad("a plan for no dtype", lambda: plan_for(64, None), TypeError, "dtype is None; needed one of bfloat16, float16, float32"),  # noqa: E501
    Bad("explain a shape that is none", lambda: explain(SimpleNamespace(shape=3, dtype=np.float32)), TypeError, "x is a SimpleNamespace; needed an array or a jax.ShapeDtypeStruct"),  # noqa: E501
    Bad("explain a symbolic n", lambda: explain(jax.ShapeDtypeStruct(export.symbolic_shape("8, n"), jnp.float32)), TypeError, "x is float32[8,n]; needed an int as its last axis: a kernel is compiled for it"),  # noqa: E501
    Bad("explain nothing", lambda: explain(None), TypeError, "x is a NoneType; needed an array or a jax.ShapeDtypeStruct"),  # noqa: E501
    Bad("a weight of rank 0", lambda: rms_norm(X, W[0]), TypeError, no_array("weight is a bfloat16")),
    Bad("eps traced", lambda: jax.jit(lambda eps: rms_norm(X, eps=eps))(1e-6), TypeError, traced("eps")),
    Bad("eps by position", lambda: rms_norm(X, W, 1e-5), TypeError, "rms_norm() takes from 1 to 2 positional arguments but 3 were given"),  # noqa: E501
    # weight_offset
    Bad(
        "weight_offset without a weight",
        lambda: rms_norm(X, weight_offset=1.0),
        ValueError,
        "weight_offset is 1.0 but weight is None: there is nothing to add it to; pass a weight",
    ),
    Bad("offset a string", lambda: rms_norm(X, W, weight_offset="1"), TypeError, no_float("weight_offset", "str")),
    Bad(
        "weight_offset infinite",
        lambda: rms_norm(X, W, weight_offset=float("-inf")),
        ValueError,
        NOT_FINITE.format("weight_offset", "-inf"),
    ),
    Bad(
        "weight_offset traced",
        lambda: jax.jit(lambda offset: rms_norm(X, W, weight_offset=offset))(1.0),
        TypeError,
        traced("weight_offset"),
    ),
    # residual
    Bad("residual None", lambda: add_rms_norm(X, None, W), TypeError, "residual is None; needed an array: call rms_norm where there is nothing to add"),  # noqa: E501
    Bad("residual to broadcast", lambda: add_rms_norm(X, X[:1], W), ValueError, wrong_residual("bfloat16[1,128]")),
    Bad("residual in float64", lambda: add_rms_norm(X, X.astype("float64")), TypeError, wrong_dtype("residual is float64[8,128]")),  # noqa: E501
    Bad("residual a list", lambda: add_rms_norm(X, [1.0]), TypeError, no_array("residual is a list")),
    # dtypes
    *(
        Bad(f"{name} {shown}", functools.partial(add_rms_norm, X, X, W, **{name: value}), TypeError, f"{name} is {shown}; needed one of bfloat16, float16, float32")  # noqa: E501
        for name in ("out_dtype", "unit_dtype", "s_dtype")
        for value, shown in (("float64", "float64"), (jnp.float8_e4m3fn, "float8_e4m3fn"), (Unprintable(), "Unprintable"))  # noqa: E501
    ),
    Bad("two units", lambda: rms_norm(X, W, cast_before_scale=False, unit_dtype="bfloat16"), ValueError, "unit_dtype is bfloat16 but cast_before_scale is False, which is unit_dtype float32 by another name; pass one of them"),  # noqa: E501
    Bad("no weight to round", lambda: rms_norm(X, round_weight=True), ValueError, "round_weight is True but weight is None: there is nothing to round; pass a weight"),  # noqa: E501
    Bad("round_weight a dtype", lambda: rms_norm(X, W, round_weight="bfloat16"), TypeError, "round_weight is str; needed True or False"),  # noqa: E501
    Bad("in_place a dict", lambda: add_rms_norm(X, X, W, in_place={0: 0}), TypeError, "in_place is dict; needed True or False"),  # noqa: E501
    Bad("s_dtype without a residual", lambda: rms_norm(X, W, s_dtype="float32"), TypeError, f"rms_norm() got an unexpected keyword argument 's_dtype'{SUGGESTION}"),  # noqa: E501
    Bad("a plan for rows of int8", lambda: plan_for(64, "float32", read=("int8",)), TypeError, "read is int8; needed one of bfloat16, float16, float32"),  # noqa: E501
    # implementation
    Bad("implementation unknown", lambda: rms_norm(X, implementation="triton"), ValueError, unknown("'triton'")),
    Bad("implementation a list", lambda: rms_norm(X, implementation=[]), ValueError, unknown("[]")),
    Bad("kernel at n = 31", lambda: rms_norm(X[:, :31], implementation="mosaic_gpu"), NotImplementedError, cannot_run("mosaic_gpu", 31)),  # noqa: E501
    Bad("kernel at n = 131073", lambda: rms_norm(np.ones(131073, np.float32), implementation="interpret"), NotImplementedError, cannot_run("interpret", 131073)),  # noqa: E501
    # plan_for and explain
    Bad("plan for n = 31", lambda: plan_for(31, "bfloat16"), NotImplementedError, no_plan(31)),
    Bad("plan for n = -1", lambda: plan_for(-1, "float32"), NotImplementedError, no_plan(-1)),
    Bad("plan for n = 131073", lambda: plan_for(131073, "float32"), NotImplementedError, no_plan(131073)),
    Bad("explain rank 0", lambda: explain(jax.ShapeDtypeStruct((), jnp.float32)), ValueError, NO_AXIS.format("x")),
    Bad("explain int32", lambda: explain(jax.ShapeDtypeStruct((8, 64), jnp.int32)), TypeError, wrong_dtype("x is int32[8,64]")),  # noqa: E501
    Bad("explain n = 31", lambda: explain(X[:, :31], implementation="mosaic_gpu"), NotImplementedError, cannot_run("mosaic_gpu", 31)),  # noqa: E501
    Bad("explain unknown", lambda: explain(X, implementation="cuda"), ValueError, unknown("'cuda'")),
)  # fmt: skip


def raised_by(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (the type and the text are compared as a whole)
        call()
    return caught.value


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_call_says_what_came_what_was_needed_and_what_to_do(bad: Bad) -> None:
    error = raised_by(bad.call)
    assert (type(error), str(error)) == (bad.error, bad.message)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the message is that of a machine without a GPU")
@pytest.mark.parametrize("call", [lambda **how: rms_norm(X, W, **how), lambda **how: add_rms_norm(X, X, W, **how)])
def test_the_kernel_cannot_be_forced_without_a_gpu(call: Callable[..., Any]) -> None:
    error = raised_by(lambda: call(implementation="mosaic_gpu"))
    assert (type(error), str(error)) == (NotImplementedError, NO_GPU)


def test_neither_bad_nor_good_calls_touch_their_inputs() -> None:
    for bad in BAD:
        raised_by(bad.call)
    rms_norm(X, W)
    add_rms_norm(X, X, W)
    assert np.all(X == 1)
    assert np.all(W == 1)


@pytest.mark.parametrize("eps", [0, 0.0, -0.0, 1e-5, np.float32(1e-5), np.float64(1e-5), 3.4e38])
def test_every_real_number_that_is_a_finite_float32_is_an_eps(eps: float) -> None:
    assert rms_norm(X, W, eps=eps).shape == X.shape


def test_a_float_that_equals_an_int_does_not_answer_for_it_from_the_cache() -> None:
    """plan_for(64.0) was taken, and 64.0 == 64 to functools.cache: every later call for 64 got a Plan with n = 64.0."""
    with pytest.raises(TypeError):
        plan_for(64.0, "float32")
    assert isinstance(plan_for(64, "float32").n, int)


def test_a_weight_of_another_dtype_is_promoted_whatever_the_program_around_allows() -> None:
    """Under strict promotion JAX's own promote_types raised TypePromotionError out of reference.result_dtype."""
    with jax.numpy_dtype_promotion("strict"):
        assert rms_norm(X, W.astype(np.float32)).dtype == jnp.float32
