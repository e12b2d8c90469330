"""Products and sums of 16-bit values, two in an instruction, each rounded once.

The bits are those of float32 and a rounding to 16 bits: of two such values float32 holds the product (bfloat16's in all
that does not round to 0 either way), and a sum that is rounded to 24 bits first is rounded to 11 or fewer as if it had
not been (Figueroa, 1995: 2 * 11 + 2 are enough). Without them the kernel of rotated heads issued twice as many
instructions, and was bound by them.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import fragments, ir, llvm, plgpu, vector
from . import conversions, ieee

F32 = jnp.float32
# $0 = $1 * $2 + $3, of what every GPU with bfloat16 has; the constants are -0.0 and 1.0, twice.
FMA = {"bfloat16": "fma.rn.bf16x2", "float16": "fma.rn.f16x2"}
MINUS_ZERO = "0x80008000"
ONE = {"bfloat16": "0x3F803F80", "float16": "0x3C003C00"}


def product(a: jax.Array, b: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """a * b of one dtype, in this layout, rounded to it."""
    if a.dtype == F32:
        return ieee.product(a, b, layout, interpret=interpret)
    if interpret:
        return conversions.narrowed(a.astype(F32) * b.astype(F32), a.dtype, interpret=True)
    return _mapped("$0, $1, $2, minus_zero", layout, a, b)


def total(a: jax.Array, b: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """a + b of one dtype, in this layout, rounded to it."""
    if a.dtype == F32 or interpret:
        return conversions.narrowed(a.astype(F32) + b.astype(F32), a.dtype, interpret=interpret)
    return _mapped("$0, $1, one, $2", layout, a, b)


def _mapped(operands: str, layout: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    fma, constants = FMA[a.dtype.name], {"minus_zero": MINUS_ZERO, "one": ONE[a.dtype.name]}
    moves = "".join(f".reg .b32 {name}; mov.b32 {name}, {value}; " for name, value in constants.items())
    instructions = f"{{ {moves}{fma} {operands}; }}"
    returned = plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout), return_type=returned)
    def inline(_: Any, a: Any, b: Any) -> Any:
        i32, registers = ir.IntegerType.get_signless(32), np.empty_like(a.registers)
        for index in np.ndindex(*registers.shape):
            pair = [words(array.registers[index]) for array in (a, b)]
            found = [llvm.inline_asm(i32, list(both), instructions, "=r,r,r") for both in zip(*pair, strict=True)]
            registers[index] = of_words(a.registers[index].type, found)
        return fragments.FragmentedArray(_registers=registers, _layout=a.layout, _is_signed=None)

    return inline(a, b)


def words(register: Any) -> list[Any]:
    """(Mosaic GPU code) The 32-bit words of a vector of whole ones."""
    kind = ir.VectorType(register.type)
    count = kind.shape[0] * kind.element_type.width // 32
    whole = vector.bitcast(ir.VectorType.get((count,), ir.IntegerType.get_signless(32)), register)
    return ieee.elements(whole)


def of_words(kind: Any, found: list[Any]) -> Any:
    """(Mosaic GPU code) The inverse of words."""
    whole = ir.VectorType.get((len(found),), ir.IntegerType.get_signless(32))
    return vector.bitcast(kind, vector.from_elements(whole, found))
