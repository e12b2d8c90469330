"""The shapes and dtypes that signatures tell hold while the tests run: conftest.py installs tests/typed.py."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

import pallas_norm
from pallas_norm import quantized_reference, reference
from tests import typed

if (reason := typed.missing()) is not None:
    pytest.skip(reason, allow_module_level=True)

import jaxtyping

X, WEIGHT, RSTD = jnp.ones((2, 3, 64), jnp.bfloat16), jnp.ones(64, jnp.float32), jnp.ones((2, 3), jnp.float32)


def test_the_specification_takes_what_its_signatures_tell() -> None:
    y, rstd = reference.forward(X, WEIGHT)
    assert (y.shape, rstd.shape) == (X.shape, RSTD.shape)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("parameter", "function", "operands"),
    [
        ("weight", reference.forward, (X, jnp.ones(32))),  # another n
        ("weight", reference.forward, (X, jnp.ones((3, 64)))),  # another rank
        ("x", reference.forward, (jnp.ones((2, 64), jnp.int32), WEIGHT)),  # no float
        ("residual", reference.add, (X, X[:1])),  # other rows, which would be broadcast
        ("rstd", reference.input_gradient, (X, WEIGHT, RSTD[..., None], X)),
        ("dy", reference.weight_gradient, (X, RSTD, X[..., :32])),
        ("scale", quantized_reference.by_scale, (X, RSTD[0], "int8")),
    ],
)
def test_another_shape_or_dtype_is_caught(parameter: str, function: object, operands: tuple, *, traced: bool) -> None:
    arrays = [value for value in operands if isinstance(value, jax.Array)]
    others = operands[len(arrays) :]

    def call(*arrays: jax.Array) -> object:
        return function(*arrays, *others)  # pyright: ignore[reportCallIssue]

    with pytest.raises(jaxtyping.TypeCheckError, match=f"typechecking parameter '{parameter}'"):
        (jax.eval_shape if traced else lambda call, *arrays: call(*arrays))(call, *arrays)


def test_a_result_that_is_not_what_a_public_function_tells_is_caught() -> None:
    """y without a row, and rstd in another place: what its types refuse once it has returned."""

    def norm(x: jaxtyping.Float[jax.Array, "*batch n"]) -> jaxtyping.Float[jax.Array, "*batch n"]:
        return x[:-1]

    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        typed.after(norm)(X)


def test_what_a_public_function_refuses_it_says_itself() -> None:
    with pytest.raises(ValueError, match="pass the weight of this layer, or slice x"):
        pallas_norm.rms_norm(X, WEIGHT[:32])


def test_every_name_of_a_public_function_is_the_checked_one() -> None:
    for home, names in typed.PUBLIC.items():
        for name in names:
            assert hasattr(getattr(pallas_norm, name), "__wrapped__")
            assert getattr(pallas_norm, name) is getattr(sys.modules[home], name)


def test_the_package_itself_needs_neither() -> None:
    program = f"""
import sys
for name in {typed.NEEDED}:
    sys.modules[name] = None  # an import of it raises
import jax, pallas_norm
assert pallas_norm.rms_norm(jax.numpy.ones((2, 8))).shape == (2, 8)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
