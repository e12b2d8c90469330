"""Quotients rounded to 8 bits, and the largest of a group of neighbours: what Mosaic GPU has no names for."""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import quantized_reference
from .._compat import arith, fragments, ir, llvm, plgpu, vector
from . import layouts

F32 = jnp.float32

# From y ($1), k ($2), 1 / divisor ($3), divisor ($4) to p, the float32 quotient y * k / divisor, correctly rounded: a
# product with the correctly rounded inverse is off by one unit at most, and its remainder, which is exact, corrects it
# (Markstein, 1990). Three instructions; a division takes eleven, two of them at an eighth of the rate. Written so that
# a quotient of -0 stays one.
QUOTIENT = """
    mul.rn.f32 y, {y}, {k};
    mul.rn.f32 p, y, {inverse};
    neg.f32 t, y;
    fma.rn.f32 t, p, {divisor}, t;
    neg.f32 y, {inverse};
    fma.rn.f32 t, t, y, p;
"""
CORRECTED = "mov.f32 p, t;"
# A quotient beyond all 8 bits may be infinite before it is corrected, and its remainder NaN.
CORRECTED_IN_RANGE = "abs.f32 y, p; setp.lt.f32 q, y, 0f49800000; selp.f32 p, t, p, q;"  # below 2^20
ROUND_PAIR = {
    "float8_e4m3fn": "cvt.rn.satfinite.e4m3x2.f32 $0, p1, p0;",
    "int8": "cvt.rni.sat.s8.f32 i0, p0; cvt.rni.sat.s8.f32 i1, p1; prmt.b32 i0, i0, i1, 0x3340; cvt.u16.u32 $0, i0;",
}


class Divisor(NamedTuple):
    """y / scale as (y * k) / divisor: scaled by a power of two where 1 / scale or a remainder would leave float32's
    range. Chunks, or values of rows."""

    k: jax.Array
    inverse: jax.Array  # 1 / divisor
    divisor: jax.Array

    @staticmethod
    def of(scale: jax.Array, layout: Any, *, interpret: bool) -> Divisor:
        size = jnp.abs(scale)
        k = jnp.where(size < 2.0**-60, F32(2.0**100), jnp.where(size > 2.0**60, F32(2.0**-100), F32(1)))
        divisor = scale * k
        # What is divided by infinity is 0, and its remainder must not be 0 * infinity.
        inverse = divided(jnp.full_like(divisor, 1), divisor, layout, interpret=interpret)
        return Divisor(k, inverse, jnp.where(jnp.abs(divisor) == jnp.inf, F32(0), divisor))


def _elements(register: Any) -> list[Any]:
    """(Mosaic GPU code) Of a vector, or a scalar."""
    if not isinstance(register.type, ir.VectorType):
        return [register]
    (size,) = ir.VectorType(register.type).shape
    return [
        vector.extract(register, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i]))
        for i in range(size)
    ]


def divided(a: jax.Array, b: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """a / b, correctly rounded, of float32 arrays in this layout: the compiler's own division is off by a unit or two.

    The elements of a vector are one number: of a row, or of a group.
    """
    if interpret:
        return quantized_reference.quotient(a, b)
    if a.ndim:  # constants have none
        a, b = (layouts.layout_cast(value, layout, interpret=False) for value in (a, b))

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=plgpu.ShapeDtypeStruct(a.shape, F32, layout=layout))
    def inline(_: Any, a: Any, b: Any) -> Any:
        f32, registers = ir.F32Type.get(), np.empty_like(a.registers)
        for index in np.ndindex(*registers.shape):
            pair = [_elements(array.registers[index])[0] for array in (a, b)]
            found, kind = llvm.inline_asm(f32, pair, "div.rn.f32 $0, $1, $2;", "=f,f,f"), a.registers[index].type
            registers[index] = vector.broadcast(kind, found) if isinstance(kind, ir.VectorType) else found
        return fragments.FragmentedArray(_registers=registers, _layout=a.layout, _is_signed=None)

    return inline(a, b)


def _instructions(dtype: str, *, in_range: bool) -> str:
    corrected = CORRECTED if in_range else CORRECTED_IN_RANGE
    quotients = ""
    for i in range(2):
        names = {name: f"${1 + i + 2 * at}" for at, name in enumerate(("y", "k", "inverse", "divisor"))}
        quotients += QUOTIENT.format(**names) + corrected + f"mov.f32 p{i}, p;\n"
    return f"{{ .reg .f32 y, p, t, p0, p1; .reg .pred q; .reg .b32 i0, i1;\n{quotients}{ROUND_PAIR[dtype]} }}"


def _rounded(values: Sequence[Sequence[Any]], instructions: str) -> list[Any]:
    """(Mosaic GPU code) Pairs of 8-bit results, as i16; `values` has y, k, inverse and divisor of each element."""
    i16 = ir.IntegerType.get_signless(16)
    padded = [*values, values[-1]] if len(values) % 2 else list(values)
    found = []
    for low, high in zip(padded[::2], padded[1::2], strict=True):
        operands = [value for both in zip(low, high, strict=True) for value in both]
        found.append(llvm.inline_asm(i16, operands, instructions, "=h,f,f,f,f,f,f,f,f"))
    return found


def rounded(
    value: jax.Array, divisor: Divisor, scale: jax.Array, dtype: str, layout: Any, *, in_range: bool, interpret: bool
) -> jax.Array:
    """The bits of cast(value / scale) as int8. `divisor` is that of `scale`, all are float32 chunks in this layout.

    in_range: no quotient is far beyond the largest number of `dtype`.
    """
    if interpret:
        return jax.lax.bitcast_convert_type(
            quantized_reference.cast(quantized_reference.quotient(value, scale), dtype), jnp.int8
        )
    shape, instructions = value.shape, _instructions(dtype, in_range=in_range)

    @plgpu.inline_mgpu(arg_types=(layout,) * 4, return_type=plgpu.ShapeDtypeStruct(shape, jnp.int8, layout=layout))
    def inline(_: Any, *arrays: Any) -> Any:
        i8, i16 = (ir.IntegerType.get_signless(width) for width in (8, 16))
        registers = np.empty_like(arrays[0].registers)
        for index in np.ndindex(*registers.shape):
            elements = [_elements(array.registers[index]) for array in arrays]
            pairs = _rounded(list(zip(*elements, strict=True)), instructions)
            if len(elements[0]) == 1:
                registers[index] = vector.from_elements(ir.VectorType.get((1,), i8), [arith.trunci(i8, pairs[0])])
                continue
            packed = vector.from_elements(ir.VectorType.get((len(pairs),), i16), pairs)
            registers[index] = vector.bitcast(ir.VectorType.get((2 * len(pairs),), i8), packed)
        return fragments.FragmentedArray(_registers=registers, _layout=arrays[0].layout, _is_signed=True)

    return inline(value, *divisor)


def group_max(value: jax.Array, group: int, layout: Any, *, one_row: bool, interpret: bool) -> jax.Array:
    """A float32 chunk in which every element is the largest of its group, NaN where one is. A group lies in
    neighbouring lanes of a warp."""
    shape = value.shape
    if interpret:
        parts = value.reshape(-1, group) if one_row else value.reshape(shape[0], -1, group)
        return jnp.broadcast_to(quantized_reference.largest(parts)[..., None], parts.shape).reshape(shape)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, F32, layout=layout))
    def inline(_: Any, array: Any) -> Any:
        f32 = ir.F32Type.get()

        def larger(a: Any, b: Any) -> Any:
            return llvm.inline_asm(f32, [a, b], "max.NaN.f32 $0, $1, $2;", "=f,f,f")

        registers = np.empty_like(array.registers)
        for index, register in np.ndenumerate(array.registers):
            first, *rest = elements = _elements(register)
            largest = first
            for element in rest:
                largest = larger(largest, element)
            for distance in (1 << step for step in range((group // len(elements)).bit_length() - 1)):
                instruction = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
                other = llvm.inline_asm(f32, [largest], instruction, "=f,f", has_side_effects=True)
                largest = larger(largest, other)
            registers[index] = vector.broadcast(register.type, largest)
        return fragments.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return inline(value)
