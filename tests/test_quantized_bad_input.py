"""What rms_norm_quantized and add_rms_norm_quantized refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import add_rms_norm_quantized, rms_norm_quantized
from tests.oracle import BF16, F32


@pytest.mark.parametrize("function", [jax.jvp, jax.grad])
def test_there_is_no_derivative(function: Any) -> None:
    x = jnp.ones((2, 64))

    def total(x: Any) -> Any:
        q, scale = rms_norm_quantized(x)
        return jnp.sum(q.astype(jnp.float32) * scale)

    message = (
        "the derivative of a norm with a float8_e4m3fn result was asked for; rounding to 8 bits has the derivative 0 "
        "almost everywhere, so there is none to give: pass jax.lax.stop_gradient of the operands, or differentiate "
        "rms_norm or add_rms_norm"
    )
    with pytest.raises(NotImplementedError) as raised:
        jax.grad(total)(x) if function is jax.grad else jax.jvp(total, (x,), (x,))
    assert str(raised.value) == message
    assert not jax.grad(lambda x: total(jax.lax.stop_gradient(x)))(x).any()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"dtype": jnp.float16}, TypeError, "dtype is float16; needed float8_e4m3fn or int8, the dtype of q"),
    "no dtype": ({"dtype": None}, TypeError, "dtype is NoneType; needed float8_e4m3fn or int8, the dtype of q"),
    "text": ({"dtype": "fp8"}, TypeError, "dtype is str; needed float8_e4m3fn or int8, the dtype of q"),
    "unit_dtype": (
        {"unit_dtype": jnp.int8},
        TypeError,
        "unit_dtype is int8; needed one of bfloat16, float16, float32",
    ),
    "group type": ({"group_size": 128.0}, TypeError, "group_size is float; needed None or 128"),
    "group": ({"group_size": 64}, ValueError, "group_size is 64; needed 128, or None for one scale for each row"),
    "group of n": (
        {"group_size": 128},
        ValueError,
        "group_size is 128 but the last axis of x has length 192; needed a multiple of it: pass group_size=None for "
        "one scale for each row",
    ),
    "both": (
        {"group_size": 128, "scale": 1.0},
        ValueError,
        "scale and group_size = 128 were given both; needed one: scale is that of the whole tensor, group_size says "
        "for how many elements one is computed",
    ),
    "zero": ({"scale": 0.0}, ValueError, "scale is 0.0; needed a positive float32 number: y is divided by it"),
    "negative": (
        {"scale": np.float32([-1.0])},
        ValueError,
        "scale is -1.0; needed a positive float32 number: y is divided by it",
    ),
    "not a number": (
        {"scale": np.float32(np.nan).reshape(1)},
        ValueError,
        "scale is nan; needed a finite float32 number",
    ),
    "rounded to zero": (
        {"scale": 2.0**-150},
        ValueError,
        f"scale is {2.0**-150}; needed a positive float32 number: y is divided by it",
    ),
    "tiny": ({"scale": 1e-60}, ValueError, "scale is 1e-60; needed a positive float32 number: y is divided by it"),
    "infinite": ({"scale": float("inf")}, ValueError, "scale is inf; needed a finite float32 number"),
    "two scales": (
        {"scale": np.ones(2, F32)},
        ValueError,
        "scale is float32[2]; needed one number: pass scale=None to compute one for each row",
    ),
    "scale dtype": (
        {"scale": np.ones((), BF16)},
        TypeError,
        "scale is bfloat16[]; needed float32: cast it with astype first",
    ),
    "scale type": ({"scale": "1"}, TypeError, "scale is str; needed a Python float: pass float(scale)"),
    "return_y": ({"return_y": 1}, TypeError, "return_y is int; needed True or False"),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_told(name: str) -> None:
    options, error, message = WRONG[name]
    with pytest.raises(error) as raised:
        rms_norm_quantized(np.ones((2, 192), BF16), **options)
    assert str(raised.value) == message


def test_a_residual_is_needed_where_there_is_one() -> None:
    with pytest.raises(TypeError) as raised:
        add_rms_norm_quantized(np.ones((2, 64), BF16), None)  # pyright: ignore[reportArgumentType]
    assert str(raised.value) == "residual is None; needed an array: call rms_norm where there is nothing to add"


def test_a_forced_kernel_that_cannot_run_says_why() -> None:
    x = np.ones((2, 1152), F32)  # vectors of 8 bytes: a group of 128 lies in two warps
    with pytest.raises(NotImplementedError) as raised:
        rms_norm_quantized(x, group_size=128, implementation="interpret")
    assert str(raised.value) == (
        'implementation="interpret" cannot run: in the kernel for n = 1152 a group of 128 elements does not lie in one '
        "warp; pass implementation=None to let XLA compile the reference"
    )
