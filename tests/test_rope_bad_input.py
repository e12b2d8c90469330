"""What rms_norm_rope and rms_norm_rope_qkv refuse: the message says what was given, and what was needed."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import rms_norm_rope, rms_norm_rope_qkv
from tests import oracle
from tests.oracle import BF16, F32
from tests.rope_cases import operands

Q, K, ANGLES = np.ones((2, 4, 3, 64), F32), np.ones((2, 4, 1, 64), F32), np.ones((4, 64), F32)
WEIGHT = np.ones(64, F32)
WRONG: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "no array": ((Q, [1.0], ANGLES, ANGLES), TypeError, "k is a list; needed a JAX or NumPy array: wrap it with jnp.asarray (a torch tensor: use pallas_norm_torch)"),  # noqa: E501
    "one axis": ((WEIGHT, K, ANGLES, ANGLES), ValueError, "q is float32[64]; needed [..., heads, n]: an axis of heads and one of their elements"),  # noqa: E501
    "odd": ((Q[..., :63], K, ANGLES, ANGLES), ValueError, "q is float32[2,4,3,63]; needed an even last axis: its halves are rotated together"),  # noqa: E501
    "shape": ((Q, K[:, :3], ANGLES, ANGLES), ValueError, "k is float32[2,3,1,64] but q is float32[2,4,3,64]; needed the same shape but for the heads"),  # noqa: E501
    "dtype": ((Q, K.astype(BF16), ANGLES, ANGLES), TypeError, "k is bfloat16[2,4,1,64] but q is float32[2,4,3,64]; needed the same dtype: cast one of them first"),  # noqa: E501
    "sin": ((Q, K, ANGLES, ANGLES[:2]), ValueError, "sin is float32[2,64] but cos is float32[4,64]; needed the same shape"),  # noqa: E501
    "positions": ((Q, K, ANGLES[:2], ANGLES[:2]), ValueError, "cos is float32[2,64] but q is float32[2,4,3,64]; needed [2,4,64] or the last axes of it, from the positions on: a row of n angles for each token"),  # noqa: E501
    "part": ((Q, K, ANGLES[:, :32], ANGLES[:, :32]), ValueError, "cos is float32[4,32] but q is float32[2,4,3,64]; needed [2,4,64] or the last axes of it, from the positions on: a row of n angles for each token (rotate part of a head in steps of your own)"),  # noqa: E501
    "angles": ((Q, K, ANGLES.astype(BF16), ANGLES), TypeError, "cos is bfloat16[4,64]; needed float32, the dtype of what is rotated: cast it first"),  # noqa: E501
    "one weight": ((Q, K, ANGLES, ANGLES, None, WEIGHT), ValueError, "q_weight is None but k_weight is not; needed both, or none: pass ones for one of them"),  # noqa: E501
    "weight": ((Q, K, ANGLES, ANGLES, WEIGHT, WEIGHT[:2]), ValueError, "k_weight is float32[2] but q is float32[2,4,3,64]; needed one element for each of the last axis: pass the weight of this layer"),  # noqa: E501
    "weights": ((Q, K, ANGLES, ANGLES, WEIGHT, WEIGHT.astype(BF16)), TypeError, "k_weight is bfloat16[64] but q_weight is float32[64]; needed the same dtype: cast one of them first"),  # noqa: E501
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_told(name: str) -> None:
    given, error, message = WRONG[name]
    with pytest.raises(error) as raised:
        rms_norm_rope(*given)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("heads", "error", "message"),
    [
        ((2.0, 1), TypeError, "q_heads is float; needed an int: a number of heads"),
        ((1, 0), ValueError, "k_heads is 0; needed at least one head"),
        (
            (3, 2),
            ValueError,
            "qkv is float32[2,4,3,64] but q_heads + k_heads is 5; needed as many heads at least: reshape the "
            "projection to [..., heads, n]",
        ),
    ],
)
def test_a_wrong_number_of_heads_is_told(heads: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        rms_norm_rope_qkv(Q, ANGLES, ANGLES, q_heads=heads[0], k_heads=heads[1])
    assert str(raised.value) == message


def test_a_forced_kernel_that_cannot_run_says_why() -> None:
    q, k, cos, sin, *rest = operands(80, (3, 2), (7,), "bf16")
    with pytest.raises(NotImplementedError) as raised:
        pallas_norm.rms_norm_rope(q, k, cos, sin, *rest, implementation="interpret")
    assert str(raised.value) == (
        'implementation="interpret" cannot run: heads of 80 elements have no kernel that rotates them: an element and '
        "the one 40 columns away are not at the same place of two lanes of a warp; pass implementation=None to let XLA "
        "compile the reference"
    )


def test_sizes_that_no_program_knows_are_refused() -> None:
    for function, shape, message in (
        (lambda q, a: pallas_norm.rms_norm_rope(q, q, a, a), ("b, 4, 2*n", "b, 2*n"), "q is float32[b,4,2*n]; needed ints as its last axis: a kernel is compiled for it"),  # noqa: E501
        (lambda q, a: pallas_norm.rms_norm_rope_qkv(q, a, a, q_heads=2, k_heads=1), ("b, h, 64", "b, 64"), "qkv is float32[b,h,64]; needed ints as its last two axes: a kernel is compiled for it"),  # noqa: E501
    ):  # fmt: skip
        scope = jax.export.SymbolicScope()
        structs = [jax.ShapeDtypeStruct(jax.export.symbolic_shape(one, scope=scope), jnp.float32) for one in shape]
        with pytest.raises(TypeError) as raised:
            jax.export.export(jax.jit(function))(*structs)
        assert str(raised.value) == message


def test_one_row_of_angles_is_that_of_every_token() -> None:
    q, k, cos, sin, *rest = operands(64, (3, 2), (7,), "bf16")
    expected = pallas_norm.rms_norm_rope(q, k, np.tile(cos[:1], (7, 1)), np.tile(sin[:1], (7, 1)), *rest)
    for angles in ([cos[0], sin[0]], [cos[:1], sin[:1]], [cos[None, None, 0], sin[None, None, 0]]):
        for implementation in ("xla", "interpret"):
            found = pallas_norm.rms_norm_rope(q, k, *angles, *rest, implementation=implementation)
            for one, other in zip(found, expected, strict=True):
                oracle.assert_same(one, other)
