"""The torch functions on tensors of any layout, dtype and kind, and on what is no tensor: the bits of the same call on
plain copies, or a documented error that names an argument at fault. Nothing that is not `out` changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm_torch import (
    RMSNorm,
    add_rms_norm,
    is_supported_rmsnorm_hf_hidden_size,
    rms_norm,
    rmsnorm_hf,
    to_jax,
)
from tests import oracle
from tests.anything import ANYTHING
from tests.interop.cases import DTYPES, assert_same
from tests.interop.tensors import EVERY_DTYPE, NO_OPERAND, SHAPES, WARNINGS, N, attempt, filled, memory, plain, views
from tests.strategies import examples

Tensor = torch.Tensor

# --- what is drawn ----------------------------------------------------------------------------------------------------


@st.composite
def calls(draw: st.DrawFn, *, with_residual: bool) -> tuple[dict[str, Any], set[str]]:
    """The arguments, and the names of those that break the contract."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(DTYPES))
    arguments: dict[str, Any] = {"x": draw(views(shape, dtype))}
    if with_residual:
        arguments["residual"] = draw(views(shape, dtype))
    arguments["weight"] = draw(st.none() | st.sampled_from(DTYPES).flatmap(lambda kind: views((N,), kind)))
    for name in draw(st.sets(st.sampled_from(tuple(arguments)))):
        if arguments[name] is not None:
            arguments[name].requires_grad_(draw(st.booleans()))
    arguments["eps"] = draw(st.sampled_from((1e-6, 0, 0.5)))
    arguments["cast_before_scale"] = draw(st.booleans())
    wrong = draw(st.sets(st.sampled_from(("x", "residual", "weight", "eps", "cast_before_scale")), max_size=1))
    wrong &= set(arguments)
    for name in wrong & {"x", "residual", "weight"}:
        arguments[name] = draw(NO_OPERAND.filter(lambda value: value is not None))
    for name in wrong - {"x", "residual", "weight"}:
        arguments[name] = draw(st.sampled_from(("1e-6", None, [], torch.tensor(1e-6), float("nan"), 10**400, -1)))
    if "x" in wrong and isinstance(arguments["x"], Tensor) and arguments["x"].device.type == "meta":
        # The device of x is right whatever it is, and what lies elsewhere is wrong.
        wrong = {name for name in ("residual", "weight") if arguments.get(name) is not None}
    return arguments, wrong


# --- what is compared -------------------------------------------------------------------------------------------------


def outcome(function: Callable[..., Any], arguments: dict[str, Any], wrong: set[str]) -> Any:
    """The result, or None after an error that names one of `wrong`."""
    before = {name: memory(value) for name, value in arguments.items()}
    result, error = attempt(function, **arguments)
    if error is None:
        assert not wrong, f"{wrong} went unnoticed"
    else:
        assert wrong, f"a right call was refused: {error}"
        pattern = "|".join(wrong)
        assert re.match(rf"({pattern})\b", str(error)), f"{error!r} names none of {pattern}"
    for name, value in arguments.items():
        if name != "out" or error is not None:
            assert memory(value) == before[name], f"{name} changed"
    return result


def on_the_host(tensor: Tensor | None) -> Any:
    return None if tensor is None else np.asarray(to_jax(plain(tensor), copy=True))


def replayed(x: Tensor, weight: Tensor | None, eps: float, *, cast_before_scale: bool) -> None:
    """The operator's y is that of its own rstd, bit for bit."""
    x, weight = plain(x), plain(weight)
    y, rstd = torch.ops.pallas_norm.rms_norm(x, weight, eps, cast_before_scale, 0.0)
    expected = oracle.replay(
        on_the_host(x),
        on_the_host(weight),
        on_the_host(rstd),
        cast_before_scale=cast_before_scale,
    )
    oracle.assert_same(on_the_host(y), expected)


pytestmark = pytest.mark.filterwarnings(*WARNINGS)


# --- the properties ---------------------------------------------------------------------------------------------------


@given(calls(with_residual=False))
def test_rms_norm(drawn: tuple[dict[str, Any], set[str]]) -> None:
    arguments, wrong = drawn
    y = outcome(rms_norm, arguments, wrong)
    if y is None or y.device.type == "meta":
        return
    assert y.is_contiguous()
    copies = {name: plain(value) for name, value in arguments.items()}
    assert_same(y.detach(), rms_norm(**copies))
    replayed(**copies)
    operands = [value for value in (arguments["x"], arguments["weight"]) if value is not None and value.requires_grad]
    assert y.requires_grad == bool(operands)


@examples(0.5)
@given(calls(with_residual=True))
def test_add_rms_norm(drawn: tuple[dict[str, Any], set[str]]) -> None:
    arguments, wrong = drawn
    results = outcome(add_rms_norm, arguments, wrong)
    if results is None or results[0].device.type == "meta":
        return
    y, s = results
    x, residual = on_the_host(arguments["x"]), on_the_host(arguments["residual"])
    oracle.assert_same(on_the_host(s), oracle.add(x, residual))
    expected_y, expected_s = add_rms_norm(**{name: plain(value) for name, value in arguments.items()})
    assert_same(y.detach(), expected_y)
    assert_same(s.detach(), expected_s)


@st.composite
def outs(draw: st.DrawFn) -> dict[str, Any]:
    """x, weight and out in one storage, anywhere."""
    buffer = filled(128, torch.float32, draw(st.integers(0, 2**16)))

    def rows() -> Tensor:
        strides = draw(st.sampled_from(((N, 1), (2 * N, 1), (0, 1), (1, 1), (1, 3), (N, 2), (N + 1, 1))))
        return buffer.as_strided((3, N), strides, draw(st.integers(0, 64)))

    weight = buffer[draw(st.integers(0, 120)) :][:N]
    x = rows()
    out = x.as_strided(x.shape, x.stride()) if draw(st.booleans()) else rows()
    return {"x": x, "weight": weight, "out": out}


def addresses(tensor: Tensor) -> list[int]:
    index = np.indices(tensor.shape).reshape(tensor.ndim, -1)
    return (tensor.storage_offset() + np.array(tensor.stride()) @ index).tolist()


@given(outs())
def test_out_anywhere(arguments: dict[str, Any]) -> None:
    out, x, weight = arguments["out"], arguments["x"], arguments["weight"]
    buffer = out.as_strided((128,), (1,), 0)
    places, of_x, of_weight = addresses(out), addresses(x), addresses(weight)
    right = (
        len(set(places)) == len(places)
        and (places == of_x or not set(places) & set(of_x))
        and not set(places) & set(of_weight)
    )
    # What is told by addresses alone, without looking at which elements lie between which.
    in_order = out.stride() in ((N, 1), (2 * N, 1), (N + 1, 1))
    behind = min(places) > max(of_x + of_weight) or max(places) < min(of_x + of_weight)
    before, expected = buffer.clone(), rms_norm(plain(x), plain(weight))
    found, error = attempt(rms_norm, **arguments)
    if error is not None:
        assert not (right and in_order and behind), error
        assert str(error).startswith("out ")
        assert_same(buffer, before)
    else:
        assert right, "out shares memory with an operand or itself"
        assert found is out
        assert_same(plain(out), expected)
        buffer[places], before[places] = 0, 0
        assert_same(buffer, before)  # nothing beside it was written


@given(st.sampled_from(SHAPES[1:]), st.sampled_from(DTYPES), st.data())
def test_out_of_every_kind(shape: tuple[int, ...], dtype: torch.dtype, data: st.DataObject) -> None:
    x = data.draw(views(shape, dtype))
    plain_out = views(data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(DTYPES)))
    out = data.draw(plain_out | NO_OPERAND.filter(lambda value: value is not None))
    right = type(out) is Tensor and (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    if right and out.layout is torch.strided and not out.is_neg():
        return  # test_out_anywhere is of these
    outcome(rms_norm, {"x": x, "out": out}, {"out"})


@given(views((3, N), torch.bfloat16) | NO_OPERAND, views((N,), torch.bfloat16) | NO_OPERAND)
def test_rmsnorm_hf(x: Any, weight: Any) -> None:
    """RuntimeError for another dtype, as SGLang's."""
    both = isinstance(x, Tensor) and isinstance(weight, Tensor)
    if both and (x.dtype not in (torch.bfloat16, torch.float16) or weight.dtype != x.dtype):
        with pytest.raises(RuntimeError, match=r"^rmsnorm_hf: (input|weight) must") as caught:
            rmsnorm_hf(x, weight)
        assert type(caught.value) is RuntimeError
        return
    y, error = attempt(rmsnorm_hf, x, weight)
    if error is None:
        assert_same(y, rms_norm(plain(x), plain(weight)))
    else:
        assert re.match(r"(input|weight|x)\b", str(error)), error


@given(st.integers(-1, 3) | ANYTHING)
def test_the_hidden_sizes_that_sglang_asks_for(size: Any) -> None:
    supported = is_supported_rmsnorm_hf_hidden_size(size)
    assert type(supported) is bool
    assert not supported or int(size) > 0


@given(st.integers(-1, 3) | ANYTHING, st.none() | st.sampled_from(EVERY_DTYPE) | ANYTHING)
def test_the_module(size: Any, dtype: Any) -> None:
    if isinstance(size, (int, np.integer)) and size > 1024:
        size = 2**70  # not a test of how much memory there is
    norm, error = attempt(RMSNorm, size, dtype=dtype)
    if error is not None:
        assert re.match(r"(hidden_size|dtype)\b", str(error)), error
    else:
        assert norm.weight is not None
        assert norm.weight.shape == (size,)
        assert norm.weight.dtype == (dtype or torch.get_default_dtype())
