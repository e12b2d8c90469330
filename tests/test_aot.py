"""No kernel spills registers: compiled for an H200, where the wheels for that are installed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from pallas_norm import _backward, _forward
from pallas_norm._spec import Spec
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import aot

pytestmark = pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))

# One width for each row of the tables and each source of the backward pass, odd ones among them.
WIDTHS = (32, 33, 80, 128, 200, 511, 512, 768, 896, 1000, 1024, 1536, 2880, 4096, 4097, 8191, 8192, 16383, 16384)
LONG = (32767, 32768, 65535, 65536, 131072)
ROWS = 1000


def structs(n: int, dtype: str, names: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    shapes = {"weight": (n,), "rstd": (ROWS,)}
    return {
        name: jax.ShapeDtypeStruct(shapes.get(name, (ROWS, n)), jnp.float32 if name == "rstd" else dtype)
        for name in names
    }


def compiled_forward(n: int, dtype: str, names: tuple[str, ...]) -> aot.Report:
    def kernel(*values: jax.Array) -> dict[str, jax.Array]:
        operands = dict(zip(names, values, strict=True))
        return _forward.forward(operands, plan=plan_for(n, dtype), spec=Spec(), with_rstd=True, interpret=False)

    return aot.compile_for_h200(kernel, *structs(n, dtype, names).values())


def compiled_backward(n: int, dtype: str, names: tuple[str, ...]) -> aot.Report:
    plan = backward_plan_for(n, dtype, residual="ds" in names)

    def kernel(*values: jax.Array) -> dict[str, jax.Array]:
        operands = dict(zip(names, values, strict=True))
        return _backward.backward(operands, plan=plan, spec=Spec(), with_dweight=True, interpret=False)

    return aot.compile_for_h200(kernel, *structs(n, dtype, names).values())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("n", WIDTHS)
def test_no_kernel_spills(n: int, dtype: str) -> None:
    for residual in ((), ("residual",)):
        assert compiled_forward(n, dtype, ("x", "weight", *residual)).spill_bytes == 0
    for ds in ((), ("ds",)):
        assert compiled_backward(n, dtype, ("x", "dy", "weight", "rstd", *ds)).spill_bytes == 0


@pytest.mark.parametrize("n", LONG)
def test_no_backward_kernel_for_long_16_bit_rows_spills(n: int) -> None:
    """The forward kernels of rows beyond 32768 elements spill up to 0.5 KB: a known limit, named in CHANGELOG.md."""
    assert compiled_backward(n, "bfloat16", ("x", "dy", "weight", "rstd")).spill_bytes == 0


def test_the_forward_kernel_of_the_longest_row_in_one_pass_does_not_spill() -> None:
    assert compiled_forward(32768, "bfloat16", ("x", "weight")).spill_bytes == 0
