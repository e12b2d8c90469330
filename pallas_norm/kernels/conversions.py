"""Conversions of 16-bit values two at a time, with fewer and faster instructions than the compiler's own.

The backward pass of many row lengths is bound by the instructions that it issues, and many of them convert.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import reference
from .._compat import arith, fragments, ir, llvm, plgpu, vector
from .ieee import elements

F32 = jnp.float32

PAIR = {  # $0, $1 = $2, $3, rounded
    "bfloat16": "{ .reg .b32 p; cvt.rn.bf16x2.f32 p, $3, $2; shl.b32 $0, p, 16; and.b32 $1, p, 0xffff0000; }",
    "float16": "{ .reg .b32 p; .reg .b16 l, h; cvt.rn.f16x2.f32 p, $3, $2; mov.b32 {l, h}, p; "
    "cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
}


def _pairs(values: list[Any], instructions: str) -> Iterator[Any]:
    """(Mosaic GPU code) `values`, each rounded; an odd one out takes itself along."""
    f32 = ir.F32Type.get()
    both = llvm.StructType.get_literal([f32, f32])
    for low, high in itertools.zip_longest(values[::2], values[1::2], fillvalue=values[-1]):
        result = llvm.inline_asm(both, [low, high], instructions, "=f,=f,f,f")
        for i in range(2):
            yield llvm.extractvalue(f32, result, [i])


def rounded(value: jax.Array, dtype: Any, layout: Any, *, interpret: bool) -> jax.Array:
    """`value`, float32 in this layout, rounded to `dtype`; as float32.

    A value that is widened at once the compiler rounds alone, with an instruction of the unit for special functions
    (F2F), not with the one that rounds two and packs them (F2FP).
    """
    instructions = PAIR.get(jnp.dtype(dtype).name)
    if interpret or instructions is None:
        return narrowed(value, dtype, interpret=interpret).astype(F32)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(value.shape, F32, layout=layout))
    def inline(_: Any, array: Any) -> Any:
        registers = np.empty_like(array.registers)
        values = _pairs([element for register in array.registers.flat for element in elements(register)], instructions)
        for index, register in np.ndenumerate(array.registers):
            (size,) = ir.VectorType(register.type).shape
            registers[index] = vector.from_elements(register.type, list(itertools.islice(values, size)))
        return fragments.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return inline(value)


def narrowed(value: jax.Array, dtype: Any, *, interpret: bool) -> jax.Array:
    """`value` rounded to `dtype`. The interpreter's program is XLA's, which dropped a plain cast that is
    widened again: in rotated heads of 128 float16 elements a product was not rounded, and 27 % of them were wrong."""
    return reference.round_to(value.astype(F32), dtype) if interpret else value.astype(dtype)


def widened(value: jax.Array, layout: Any, *, vec: int, interpret: bool) -> jax.Array:
    """`value`, in this layout, as float32.

    Of two bfloat16 in a register the upper one is a float32 but for the lower bits, which one instruction clears; the
    compiler moves it down first, and up again.
    """
    if interpret or value.dtype != jnp.bfloat16 or vec % 2:
        return value.astype(F32)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(value.shape, F32, layout=layout))
    def inline(_: Any, array: Any) -> Any:
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        registers = np.empty_like(array.registers)
        for index, register in np.ndenumerate(array.registers):
            (size,) = ir.VectorType(register.type).shape
            values = []
            for pair in elements(vector.bitcast(ir.VectorType.get((size // 2,), i32), register)):
                low = arith.shli(pair, arith.constant(i32, 16))
                high = arith.andi(pair, arith.constant(i32, -(1 << 16)))
                values += [arith.bitcast(f32, low), arith.bitcast(f32, high)]
            registers[index] = vector.from_elements(ir.VectorType.get((size,), f32), values)
        return fragments.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

    return inline(value)
