"""Row counts and strides that a launch decides: numbers in the place of addresses, read from no memory.

Pallas takes both from shapes, which are static.
"""

# pyright: reportAssignmentType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import arith, fragments, ir, llvm, memref, plgpu

# Mosaic compiles a kernel's parameters as addresses of 256-byte multiples. An address that is not one gives wrong bits
# silently, wherever the compiler adds a small offset by setting bits (n = 64 at a base 160 bytes past a multiple).
ALIGNMENT = 256

# What the numbers of a launch are multiplied with, to be passed as addresses. A count is the upper half of one, which
# an instruction compares with as it is.
COUNT, BYTES = 1 << 32, ALIGNMENT


def _address_of(ref: Any) -> Any:
    """(Mosaic GPU code) As an i64."""
    return arith.index_cast(ir.IntegerType.get_signless(64), memref.extract_aligned_pointer_as_index(ref))


def _count_of(ref: Any) -> Any:
    """(Mosaic GPU code) The count that was passed in place of the address of `ref`, as an i32."""
    i64 = ir.IntegerType.get_signless(64)
    upper = arith.shrui(_address_of(ref), arith.constant(i64, 32))
    return arith.trunci(ir.IntegerType.get_signless(32), upper)


def _bytes_of(ref: Any) -> Any:
    """(Mosaic GPU code) The number of bytes that was passed in place of the address of `ref`, as an i64."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.divui(_address_of(ref), arith.constant(i64, BYTES))


def count(ref: Any, *, interpret: bool) -> jax.Array:
    """The int32 that the launch passed as the address of `ref`, times COUNT: no memory is read for it.

    A row count in memory would have to be written there before each launch, and costs a read before anything else.
    An interpreter has no addresses: there it is the element.
    """
    if interpret:
        return ref[0]
    scalar = plgpu.ShapeDtypeStruct((), jnp.int32, layout=plgpu.Layout.WG_SPLAT(()))

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=scalar)
    def inline(_: Any, ref: Any) -> Any:
        return fragments.FragmentedArray.splat(_count_of(ref), (), is_signed=True)

    return inline(ref)


COUNTS = ("blocks", "first_left", "programs")  # the last is the host's: it launches so many
LEVELS = ("offset", "outer", "inner")


@dataclasses.dataclass(frozen=True)
class LaunchArguments:
    """The numbers of a launch, as a kernel's references: how many rows there are, and where they lie.

    strides: of each operand whose rows lie at strides, by name, in the order of LEVELS; there is a `group` then.
    """

    blocks: Any
    first_left: Any
    programs: Any
    group: Any = None
    strides: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict[str, tuple[Any, ...]])

    @staticmethod
    def units(strided: Iterable[str] = ()) -> dict[str, int]:
        """The operands' names, in this order, and what each number is multiplied with to be passed as an address.

        strided: operands whose rows lie at strides.
        """
        counts, in_bytes = dict.fromkeys(COUNTS, COUNT), [f"{name}_{level}" for name in strided for level in LEVELS]
        return {**counts, **({"group": COUNT} if in_bytes else {}), **dict.fromkeys(in_bytes, BYTES)}

    @staticmethod
    def taken_from(refs: Mapping[str, Any]) -> tuple[LaunchArguments | None, dict[str, Any]]:
        """(the numbers of the launch among a kernel's references, or None; the others, rows at strides as such)."""
        names = LaunchArguments.units(refs)
        others = {name: ref for name, ref in refs.items() if name not in names}
        if COUNTS[0] not in refs:
            return None, others
        levels = {name: tuple(refs.get(f"{name}_{level}") for level in LEVELS) for name in others}
        strides = {name: given for name, given in levels.items() if all(level is not None for level in given)}
        numbers = LaunchArguments(**{name: refs[name] for name in COUNTS}, group=refs.get("group"), strides=strides)
        return numbers, {name: numbers.rows(name, ref) for name, ref in others.items()}

    def rows(self, name: str, ref: Any) -> Any:
        """The reference, as one of rows at strides where this operand has them."""
        return StridedRows(ref, self.group, *self.strides[name]) if name in self.strides else ref


@dataclasses.dataclass(frozen=True)
class StridedRows:
    """A (rows, n) reference whose row r begins offset + (r // group) * outer + (r % group) * inner bytes from its
    address.

    Pallas takes strides from the shape, which is static. Numbers passed at the launch (see `count`) serve every one.
    """

    ref: Any
    group: Any
    offset: Any
    outer: Any
    inner: Any

    @property
    def dtype(self) -> Any:
        return self.ref.dtype

    def load(self, row: Any, start: Any, layout: Any, *, shape: tuple[int, ...], one_row: bool) -> jax.Array:
        """`shape` elements from column `start` on: of one row, or of shape[0] rows from `row` on."""
        returned = plgpu.ShapeDtypeStruct(shape, self.dtype, layout=layout)

        @plgpu.inline_mgpu(arg_types=self._types(), return_type=returned)
        def inline(_: Any, *arguments: Any) -> Any:
            fragment, element = layout.to_mgpu(), arguments[0].type.element_type
            vector = fragment.registers_element_type(element)
            registers = np.empty(fragment.registers_shape(shape), dtype=object)
            addresses = _addresses(fragment, shape, *arguments, one_row=one_row)
            for index, address in zip(np.ndindex(*registers.shape), addresses, strict=True):
                registers[index] = llvm.load(vector, address)
            return fragments.FragmentedArray(_registers=registers, _layout=fragment, _is_signed=None)

        return inline(*self._arguments(row, start))

    def store(self, row: Any, start: Any, value: jax.Array, layout: Any, *, one_row: bool) -> None:
        """The inverse of load."""
        shape = value.shape

        @plgpu.inline_mgpu(arg_types=(*self._types(), layout))
        def inline(_: Any, *arguments: Any) -> None:
            *arguments, fragments = arguments
            addresses = _addresses(fragments.layout, shape, *arguments, one_row=one_row)
            for index, address in zip(np.ndindex(*fragments.registers.shape), addresses, strict=True):
                llvm.store(fragments.registers[index], address)

        inline(*self._arguments(row, start), value)

    def _types(self) -> tuple[Any, ...]:
        return (plgpu.RefType(),) * 5 + (plgpu.Layout.WG_SPLAT(()),) * 2

    def _arguments(self, row: Any, start: Any) -> tuple[Any, ...]:
        return self.ref, self.group, self.offset, self.outer, self.inner, jnp.int32(row), jnp.int32(start)


def _addresses(
    layout: Any,
    shape: tuple[int, ...],
    ref: Any,
    group: Any,
    offset: Any,
    outer: Any,
    inner: Any,
    row: Any,
    start: Any,
    *,
    one_row: bool,
) -> Iterator[Any]:
    """(Mosaic GPU code) The address of each register's first element, in the order of the registers."""
    i32, i64 = (ir.IntegerType.get_signless(width) for width in (32, 64))
    element_bytes = arith.constant(i64, ir.MemRefType(ref.type).element_type.width // 8)
    first_row, first_column = (scalar.registers.item() for scalar in (row, start))
    base, outer, inner = arith.addi(_address_of(ref), _bytes_of(offset)), _bytes_of(outer), _bytes_of(inner)
    group = _count_of(group)
    for indices in layout.thread_idxs(shape):
        *leading, column = (arith.index_cast(i32, index) for index in indices)
        row = first_row
        if leading and one_row:
            column = arith.addi(column, arith.muli(leading[0], arith.constant(i32, shape[1])))
        elif leading:
            row = arith.addi(row, leading[0])
        parts = (
            arith.muli(arith.extui(i64, arith.divui(row, group)), outer),
            arith.muli(arith.extui(i64, arith.remui(row, group)), inner),
            arith.muli(arith.extui(i64, arith.addi(first_column, column)), element_bytes),
        )
        yield llvm.inttoptr(llvm.PointerType.get(1), functools.reduce(arith.addi, parts, base))
