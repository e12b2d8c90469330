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
# Of p0 to p3 to 32 bits, of p0 and p1 to 16.
ROUND = {
    ("float8_e4m3fn", 4): "cvt.rn.satfinite.e4m3x2.f32 l, p1, p0; cvt.rn.satfinite.e4m3x2.f32 h, p3, p2; "
    "mov.b32 $0, {l, h};",
    ("float8_e4m3fn", 2): "cvt.rn.satfinite.e4m3x2.f32 $0, p1, p0;",
    ("int8", 4): "cvt.rni.sat.s8.f32 i, p0; cvt.rni.sat.s8.f32 j, p1; prmt.b32 i, i, j, 0x3340; "
    "cvt.rni.sat.s8.f32 j, p2; cvt.rni.sat.s8.f32 k, p3; prmt.b32 j, j, k, 0x3340; prmt.b32 $0, i, j, 0x5410;",
    ("int8", 2): "cvt.rni.sat.s8.f32 i, p0; cvt.rni.sat.s8.f32 j, p1; prmt.b32 i, i, j, 0x3340; cvt.u16.u32 $0, i;",
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


def _instructions(dtype: str, count: int, *, in_range: bool) -> str:
    corrected = CORRECTED if in_range else CORRECTED_IN_RANGE
    quotients = ""
    for i in range(count):
        names = {name: f"${1 + 4 * i + at}" for at, name in enumerate(("y", "k", "inverse", "divisor"))}
        quotients += QUOTIENT.format(**names) + corrected + f"mov.f32 p{i}, p;\n"
    registers = ".reg .f32 y, p, t, p0, p1, p2, p3; .reg .pred q; .reg .b32 i, j, k; .reg .b16 l, h;"
    return f"{{ {registers}\n{quotients}{ROUND[dtype, count]} }}"


def _packed(values: list[tuple[Any, ...]], dtype: str, *, in_range: bool) -> Any:
    """(Mosaic GPU code) The results of a vector, as a vector of i8; `values` has y, k, inverse and divisor of each
    element."""
    i8, count = ir.IntegerType.get_signless(8), 4 if len(values) % 4 == 0 else 2
    instructions, form = _instructions(dtype, count, in_range=in_range), "=r" if count == 4 else "=h"
    word = ir.IntegerType.get_signless(8 * count)
    padded = [*values, values[-1]] if len(values) == 1 else values
    words: list[Any] = []
    for start in range(0, len(padded), count):
        operands = [value for element in padded[start : start + count] for value in element]
        words.append(llvm.inline_asm(word, operands, instructions, form + ",f" * len(operands)))
    if len(values) == 1:
        return vector.from_elements(ir.VectorType.get((1,), i8), [arith.trunci(i8, words[0])])
    packed = vector.from_elements(ir.VectorType.get((len(words),), word), words)
    return vector.bitcast(ir.VectorType.get((len(values),), i8), packed)


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
    result = plgpu.ShapeDtypeStruct(value.shape, jnp.int8, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout,) * 4, return_type=result)
    def inline(_: Any, *arrays: Any) -> Any:
        registers = np.empty_like(arrays[0].registers)
        for index in np.ndindex(*registers.shape):
            elements = zip(*(_elements(array.registers[index]) for array in arrays), strict=True)
            registers[index] = _packed(list(elements), dtype, in_range=in_range)
        return fragments.FragmentedArray(_registers=registers, _layout=arrays[0].layout, _is_signed=True)

    return inline(value, *divisor)


# $0 = the larger of $1 and the magnitudes of $2, of either half, NaN where one is; then the larger half, as float32.
LARGER_PAIR = "{{ .reg .b32 t; abs.{0} t, $2; max.NaN.{0} $0, $1, t; }}"
LARGER_HALF = {
    "bfloat16": "{ .reg .b32 l, h; shl.b32 l, $1, 16; and.b32 h, $1, 0xffff0000; max.NaN.f32 $0, l, h; }",
    "float16": "{ .reg .f32 f, g; .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 f, l; cvt.f32.f16 g, h; "
    "max.NaN.f32 $0, f, g; }",
}
PAIRS = {"bfloat16": "bf16x2", "float16": "f16x2"}
LARGER = "{ .reg .f32 t; abs.f32 t, $2; max.NaN.f32 $0, $1, t; }"


def _largest(registers: Sequence[Any], dtype: Any, vec: int) -> Any:
    """(Mosaic GPU code) The largest magnitude in these registers of a lane, as a float32."""
    i32, f32, name = ir.IntegerType.get_signless(32), ir.F32Type.get(), jnp.dtype(dtype).name
    if name in PAIRS and vec % 2 == 0:  # two at a time, and they need not be widened yet
        words = [
            word for one in registers for word in _elements(vector.bitcast(ir.VectorType.get((vec // 2,), i32), one))
        ]
        largest, instructions = arith.constant(i32, 0), LARGER_PAIR.format(PAIRS[name])
        for word in words:
            largest = llvm.inline_asm(i32, [largest, word], instructions, "=r,r,r")
        return llvm.inline_asm(f32, [largest], LARGER_HALF[name], "=f,r")
    largest = arith.constant(f32, 0.0)
    for element in [element for register in registers for element in _elements(register)]:
        wide = element if name == "float32" else arith.extf(f32, element)
        largest = llvm.inline_asm(f32, [largest, wide], LARGER, "=f,f,f")
    return largest


def lane_max(chunks: Sequence[jax.Array], layout: Any, *, vec: int, interpret: bool) -> jax.Array:
    """A float32 chunk with the largest magnitude that a lane has of these chunks, in each of its elements; NaN where
    one is. An interpreter has no lanes: there each element is the largest of its place."""
    shape, dtype = chunks[0].shape, chunks[0].dtype
    if interpret:
        return quantized_reference.largest(jnp.stack([jnp.abs(chunk.astype(F32)) for chunk in chunks], axis=-1))

    @plgpu.inline_mgpu(arg_types=(layout,) * len(chunks), return_type=plgpu.ShapeDtypeStruct(shape, F32, layout=layout))
    def inline(_: Any, *arrays: Any) -> Any:
        registers = np.empty_like(arrays[0].registers)
        kind = ir.VectorType.get((vec,), ir.F32Type.get())
        for index in np.ndindex(*registers.shape):
            found = _largest([array.registers[index] for array in arrays], dtype, vec)
            registers[index] = vector.broadcast(kind, found)
        return fragments.FragmentedArray(_registers=registers, _layout=arrays[0].layout, _is_signed=None)

    return inline(*chunks)


def group_max(value: jax.Array, group: int, layout: Any, *, vec: int, one_row: bool, interpret: bool) -> jax.Array:
    """A float32 chunk in which every element is the largest magnitude of its group, NaN where one is. A group lies in
    neighbouring lanes of a warp. `value` is what `lane_max` gives."""
    shape = value.shape
    if interpret:
        parts = value.reshape(-1, group) if one_row else value.reshape(shape[0], -1, group)
        return jnp.broadcast_to(quantized_reference.largest(parts)[..., None], parts.shape).reshape(shape)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(shape, F32, layout=layout))
    def inline(_: Any, array: Any) -> Any:
        f32, registers = ir.F32Type.get(), np.empty_like(array.registers)
        for index, register in np.ndenumerate(array.registers):
            largest = _elements(register)[0]
            for distance in (1 << step for step in range((group // vec).bit_length() - 1)):
                instruction = f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"
                other = llvm.inline_asm(f32, [largest], instruction, "=f,f", has_side_effects=True)
                largest = llvm.inline_asm(f32, [largest, other], "max.NaN.f32 $0, $1, $2;", "=f,f,f")
            registers[index] = vector.broadcast(register.type, largest)
        return fragments.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return inline(value)
