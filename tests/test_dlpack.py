"""Arrays of other frameworks: what comes back is of their kind, has the bits of rms_norm, and their memory is read."""

from __future__ import annotations

import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import dlpack
from tests import oracle
from tests.oracle import BF16, F16, F32, Array


def operands(dtype: np.dtype, n: int = 64) -> tuple[Array, Array]:
    rng = np.random.default_rng(n)
    return rng.standard_normal((3, n)).astype(dtype), rng.standard_normal(n).astype(dtype)


def expected(x: Array, weight: Array | None = None, **options: Any) -> Array:
    """Without jit, as dlpack calls it: the same program, the same bits."""
    arrays = [jnp.asarray(value) for value in (x, weight) if value is not None]
    return np.asarray(pallas_norm.rms_norm(*arrays, **options))


class Foreign:
    """An array of a framework that has nothing but __dlpack__; `namespace` is what its __array_namespace__ would be."""

    def __init__(self, values: Array, namespace: Any = None) -> None:
        self.values = jnp.asarray(values)
        self.dtype = self.values.dtype
        if namespace is not None:
            self.__array_namespace__ = lambda: namespace

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self.values.__dlpack_device__()


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_numpy_gets_numpy_that_it_may_write_to(dtype: np.dtype) -> None:
    x, weight = operands(dtype)
    before = x.copy(), weight.copy()
    y = dlpack.rms_norm(x, weight, eps=1e-5)
    assert isinstance(y, np.ndarray)
    oracle.assert_same(y, expected(x, weight, eps=1e-5))
    y[:] = 0
    for value, was in zip((x, weight), before, strict=True):
        oracle.assert_same(value, was)


def test_the_dtypes_are_named() -> None:
    x, weight = operands(BF16)
    options = {"out_dtype": "float16", "unit_dtype": "float32", "round_weight": True}
    y = dlpack.rms_norm(x, weight.astype(F32), **options)
    oracle.assert_same(y, expected(x, weight.astype(F32), **options))
    assert y.dtype == F16
    with pytest.raises(TypeError, match=r"^out_dtype is float64; needed one of bfloat16, float16, float32$"):
        dlpack.rms_norm(x, weight, out_dtype="float64")


def test_the_options_and_no_weight() -> None:
    x, weight = operands(BF16)
    oracle.assert_same(dlpack.rms_norm(x), expected(x))
    options = {"eps": 0.5, "cast_before_scale": False, "weight_offset": 1.0}
    y = dlpack.rms_norm(x, weight, **options)
    oracle.assert_same(y, expected(x, weight, **options))
    assert (y != expected(x, weight)).any()


def test_jax_gets_jax() -> None:
    x, weight = operands(BF16)
    y = dlpack.rms_norm(jnp.asarray(x), weight)
    assert isinstance(y, jax.Array)
    oracle.assert_same(np.asarray(y), expected(x, weight))


def test_a_kind_with_a_namespace_gets_its_own_kind_of_the_same_memory() -> None:
    x, weight = operands(F32)
    taken = []

    def from_dlpack(y: Any) -> Foreign:
        taken.append(y)
        return Foreign(y)

    y = dlpack.rms_norm(Foreign(x, types.SimpleNamespace(from_dlpack=from_dlpack)), Foreign(weight))
    assert isinstance(y, Foreign)
    assert y.values is taken[0]
    oracle.assert_same(np.asarray(y.values), expected(x, weight))


def test_a_kind_is_made_by_the_package_that_defines_it(monkeypatch: pytest.MonkeyPatch) -> None:
    home = types.ModuleType("a_framework")
    home.from_dlpack = lambda y: ("a_framework's", y)  # pyright: ignore
    monkeypatch.setitem(sys.modules, "a_framework", home)
    kind = type("Kind", (Foreign,), {"__module__": "a_framework.arrays"})
    x, _ = operands(F32)
    name, y = dlpack.rms_norm(kind(x))
    assert name == "a_framework's"
    oracle.assert_same(np.asarray(y), expected(x))


@pytest.mark.parametrize("error", [None, TypeError, ValueError, BufferError, RuntimeError])
def test_a_kind_that_cannot_take_the_result_gets_a_jax_array(error: type[Exception] | None) -> None:
    def refuses(_: Any) -> Any:
        assert error is not None
        raise error("bfloat16 is not supported")

    x, weight = operands(BF16)
    namespace = types.SimpleNamespace() if error is None else types.SimpleNamespace(from_dlpack=refuses)
    y = dlpack.rms_norm(Foreign(x, namespace), Foreign(weight))
    assert isinstance(y, jax.Array)
    oracle.assert_same(np.asarray(y), expected(x, weight))


def test_an_absent_x_is_not_replaced_by_the_weight() -> None:
    """None was left out of the operands before they were passed by position, so the weight came back normalised."""
    missing = "x is a NoneType, which has no __dlpack__; needed an array that speaks DLPack"
    with pytest.raises(TypeError, match=f"^{missing}"):
        dlpack.rms_norm(None, np.ones(8, np.float32))


class Refusing(Foreign):
    """As NumPy where an array is read-only, or XLA where it has gaps."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __dlpack__(self, **options: Any) -> Any:
        raise self.error

    def __dlpack_device__(self) -> Any:
        return 1, 0


@pytest.mark.parametrize("name", ["x", "weight"])
@pytest.mark.parametrize("error", [BufferError, RuntimeError, AttributeError, ValueError, TypeError])
def test_what_jax_cannot_take_is_refused_by_name(name: str, error: type[Exception]) -> None:
    """The exporter's error came through as it was, a BufferError among them, and named neither operand."""
    x, weight = operands(F32)
    given = {"x": x, "weight": weight, name: Refusing(error("no"))}
    message = rf"^{name} is a Refusing that JAX cannot take by DLPack \(no\); .* pass a contiguous copy$"
    with pytest.raises(TypeError if error is TypeError else ValueError, match=message) as caught:
        dlpack.rms_norm(**given)
    assert isinstance(caught.value.__cause__, error)


def test_what_is_refused() -> None:
    x, weight = operands(F32)
    missing = (
        "is a list, which has no __dlpack__; needed an array that speaks DLPack: convert it with numpy.asarray first"
    )
    with pytest.raises(TypeError, match=f"^x {missing}$"):
        dlpack.rms_norm([1.0, 2.0], weight)
    with pytest.raises(TypeError, match=f"^weight {missing}$"):
        dlpack.rms_norm(x, [1.0, 2.0])
    wide = Foreign(x)
    wide.dtype = np.dtype(np.float64)
    cast = "x is a Foreign of float64; needed bfloat16, float16 or float32: cast it first"
    with pytest.raises(TypeError, match=f"^{cast}$"):
        dlpack.rms_norm(wide)
    with pytest.raises(TypeError, match="float64"):
        dlpack.rms_norm(x.astype(np.float64))
    with pytest.raises(ValueError, match=r"weight has shape \(32,\)"):
        dlpack.rms_norm(Foreign(x), Foreign(weight[:32]))
    with pytest.raises(ValueError, match="eps"):
        dlpack.rms_norm(Foreign(x), eps=-1.0)
