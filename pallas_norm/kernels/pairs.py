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


def zeros_positive(a: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """a, with 0 for -0."""
    if a.dtype == F32 or interpret:
        return jnp.where(a == 0, jnp.zeros_like(a), a)
    return _mapped("$0, $1, one, zero", layout, a, zero="0")


def _mapped(operands: str, layout: Any, *arrays: jax.Array, **more: str) -> jax.Array:
    like = arrays[0]
    fma, constants = FMA[like.dtype.name], {"minus_zero": MINUS_ZERO, "one": ONE[like.dtype.name], **more}
    moves = "".join(f".reg .b32 {name}; mov.b32 {name}, {value}; " for name, value in constants.items())
    instructions = f"{{ {moves}{fma} {operands}; }}"
    returned = plgpu.ShapeDtypeStruct(like.shape, like.dtype, layout=layout)
    constraints = ",".join(("=r", *("r" for _ in arrays)))

    @plgpu.inline_mgpu(arg_types=(layout,) * len(arrays), return_type=returned)
    def inline(_: Any, *arrays: Any) -> Any:
        i32, registers = ir.IntegerType.get_signless(32), np.empty_like(arrays[0].registers)
        for index in np.ndindex(*registers.shape):
            all_words = zip(*(words(array.registers[index]) for array in arrays), strict=True)
            found = [llvm.inline_asm(i32, list(given), instructions, constraints) for given in all_words]
            registers[index] = of_words(arrays[0].registers[index].type, found)
        return fragments.FragmentedArray(_registers=registers, _layout=arrays[0].layout, _is_signed=None)

    return inline(*arrays)


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
