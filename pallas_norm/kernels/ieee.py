"""Arithmetic with the rounding that IEEE prescribes, one after each operation, by instructions that nothing replaces.

LLVM and the assembler turn a product and an addition into one instruction that rounds once, and 1 / sqrt into an
approximation, whose last bit was another one in 36 % of the rows of an H200.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import arith, fragments, ir, llvm, plgpu, vector
from .._inverse_root import as_compiled
from .._row_sum import inverse
from .._row_sum import product as product_by_xla

F32 = jnp.float32

PRODUCT = "mul.rn.f32 $0, $1, $2;"
SQUARE_MEAN = "mul.rn.f32 v, $1, {factor}; add.rn.f32 v, v, {eps};"  # of the total, with 1 / n and eps
INVERSE_ROOT = "{ .reg .f32 v; " + SQUARE_MEAN + " sqrt.rn.f32 v, v; rcp.rn.f32 $0, v; }"
# The same bits from one approximation, which serves the root and the quotient: each is put right by what remains of it,
# exactly, in an fma. The two instructions above approximate twice, and branch for numbers that need a scale: a forward
# pass over 4096 x 128 took 2.11 us with them, 2.05 with the approximation alone. Right for every mantissa
# (tests/gpu_proof/roots.py); of values from SMALLEST on, below which a remainder may be subnormal.
SMALLEST = 2.0**-96
INVERSE_ROOT_FROM_ONE = (
    "{ .reg .f32 v, y, s, t, h, e; .reg .pred p; "
    + SQUARE_MEAN
    + " rsqrt.approx.ftz.f32 y, v; mul.rn.f32 s, v, y; mul.rn.f32 h, y, 0f3F000000;"
    " neg.f32 t, s; fma.rn.f32 e, t, s, v; fma.rn.f32 s, e, h, s;"
    " neg.f32 t, s; fma.rn.f32 e, t, y, 0f3F800000; fma.rp.f32 y, y, e, y;"
    " fma.rn.f32 e, t, y, 0f3F800000; fma.rn.f32 y, y, e, y;"
    " setp.eq.f32 p, v, 0f7F800000; selp.f32 $0, 0f00000000, y, p; }"
)


def elements(register: Any) -> list[Any]:
    """(Mosaic GPU code) Of a vector, or of what is in all lanes alike."""
    if not isinstance(register.type, ir.VectorType):
        return [register]
    (size,) = ir.VectorType(register.type).shape
    return [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(size)
    ]


def _like(register: Any, values: list[Any]) -> Any:
    """(Mosaic GPU code)"""
    return vector.from_elements(register.type, values) if isinstance(register.type, ir.VectorType) else values[0]


def literal(value: Any) -> str:
    """A float32 in PTX."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return f"0f{bits:08X}"


def _of(layout: Any, shape: tuple[int, ...]) -> Any:
    return layout if shape else plgpu.Layout.WG_SPLAT(())


def mapped(instructions: str, layout: Any, *operands: jax.Array) -> jax.Array:
    """The instructions' result $0 for each element of the operands $1 ...; those without a shape are the same for all.

    Of float32 in this layout; all of one element where none has a shape.
    """
    shape = operands[0].shape
    constraints = ",".join(["=f", *["f"] * len(operands)])

    @plgpu.inline_mgpu(
        arg_types=tuple(_of(layout, operand.shape) for operand in operands),
        return_type=plgpu.ShapeDtypeStruct(shape, F32, layout=_of(layout, shape)),
    )
    def inline(_: Any, first: Any, *others: Any) -> Any:
        f32 = ir.F32Type.get()
        registers = np.empty_like(first.registers)
        for index, register in np.ndenumerate(first.registers):
            own = elements(register)
            rest = [
                elements(other.registers[index]) if other.shape else elements(other.registers.item()) * len(own)
                for other in others
            ]
            values = [
                llvm.inline_asm(f32, list(given), instructions, constraints) for given in zip(own, *rest, strict=True)
            ]
            registers[index] = _like(register, values)
        return fragments.FragmentedArray(_registers=registers, _layout=first.layout, _is_signed=None)

    return inline(*operands)


def product(a: jax.Array, b: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """a * b, rounded before anything is added; of float32 in this layout, b of one element or of as many as a."""
    return product_by_xla(a, b) if interpret else mapped(PRODUCT, layout, a, b)


def inverse_root(total: jax.Array, n: int, eps: float, layout: Any, *, interpret: bool) -> jax.Array:
    """rstd: 1 / sqrt(total / n + eps), of float32 in this layout."""
    if interpret:
        return as_compiled(product_by_xla(total, inverse(n)) + np.float32(eps))
    instructions = INVERSE_ROOT_FROM_ONE if eps >= SMALLEST else INVERSE_ROOT
    for name, value in (("{factor}", inverse(n)), ("{eps}", eps)):
        instructions = instructions.replace(name, literal(value))
    return mapped(instructions, layout, total)


def lanes_added(value: jax.Array, layout: Any, of_lanes: Any, *, lanes: tuple[int, ...]) -> jax.Array:
    """The neighbours of each vector added: float32 in this layout, with `lanes` in place of its shape in `of_lanes`."""

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(lanes, F32, layout=of_lanes))
    def inline(_: Any, array: Any) -> Any:
        result = of_lanes.to_mgpu()
        one = ir.VectorType.get((1,), ir.F32Type.get())
        registers = np.empty(result.registers_shape(lanes), dtype=object)
        for at, register in enumerate(array.registers.flat):
            values = elements(register)
            while len(values) > 1:
                values = [arith.addf(a, b) for a, b in zip(values[::2], values[1::2], strict=True)]
            registers.flat[at] = vector.from_elements(one, values)
        return fragments.FragmentedArray(_registers=registers, _layout=result, _is_signed=None)

    return inline(value)
