"""Rows that are the heads of tokens, of two tensors at once: q's, then k's.

Row r of a tensor is head r % heads of token r // heads, and lies where its strides say: inside the row of a fused
projection, say. What belongs to the token, a row of cos or sin, is found the same way. Each lane computes its address.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from .._compat import arith, fragments, ir, llvm, memref, plgpu
from . import layouts, pairs
from .warp import WarpRows

WARP = 32
SIGNS = {16: -0x7FFF8000, 32: -(1 << 31)}  # the sign bits of a word, by the bits of an element


@dataclasses.dataclass(frozen=True)
class Lying:
    """A tensor of q's rows and one of k's, or one tensor for both: head h of token t begins at element offset +
    (t % tokens) * outer + h * inner. Numbers are int32 scalars, of the block's tensor."""

    refs: Sequence[Any]
    outer: Any
    inner: Any
    offset: Any = 0
    tokens: Any = None  # None: as many as there are

    @property
    def dtype(self) -> Any:
        return self.refs[0].dtype


@dataclasses.dataclass(frozen=True)
class HeadRows(WarpRows):
    """plan.block rows from `row` on, of q or of k. Past the last row it is taken again: no load or store needs a mask,
    and what is written twice is the same."""

    last: Any
    heads: Any
    is_k: Any  # int32, 0 or 1

    def load(self, ref: Lying) -> list[jax.Array]:
        return [self._load_at(ref, start) for start in self._starts()]

    def columns(self, ref: Lying) -> list[jax.Array]:
        return self.load(ref)

    def store(self, ref: Lying, chunks: Sequence[jax.Array]) -> None:
        for start, chunk in zip(self._starts(), chunks, strict=True):
            self._store_at(ref, start, chunk)

    def partners(self, chunks: Sequence[jax.Array]) -> list[jax.Array]:
        """Of each element the one n / 2 columns away."""
        plan = self.plan
        if self.interpret:
            whole = jnp.concatenate(chunks, axis=1)
            return jnp.split(jnp.roll(whole, plan.n // 2, axis=1), plan.chunks, axis=1)
        chunks_away, lanes_away = divmod(plan.n // 2 // plan.vec, plan.lanes)
        turned = [chunks[(i + chunks_away) % plan.chunks] for i in range(plan.chunks)]
        if not lanes_away:
            return turned
        turned = [self._lanes_swapped(chunk) for chunk in turned]
        if plan.chunks == 1:
            return turned
        crosses = self._position() >= plan.span // 2
        return [jnp.where(crosses, turned[(i + 1) % plan.chunks], chunk) for i, chunk in enumerate(turned)]

    def half_negated(self, chunk: jax.Array, index: int, *, second: bool = False) -> jax.Array:
        """-value in the first half of the row, or in the second, of the chunk of that index."""
        plan, layout = self.plan, self.layout
        columns = plan.n // 2 - index * plan.span  # of the chunk, in the first half
        if self.interpret:
            halves = (chunk, -chunk) if second else (-chunk, chunk)
            return jnp.where(self._position() < columns, *halves)

        @plgpu.inline_mgpu(
            arg_types=(layout,), return_type=plgpu.ShapeDtypeStruct(chunk.shape, chunk.dtype, layout=layout)
        )
        def inline(_: Any, array: Any) -> Any:
            registers, indices = np.empty_like(array.registers), array.layout.thread_idxs(chunk.shape)
            for at, (_, column) in zip(np.ndindex(*registers.shape), indices, strict=True):
                registers[at] = _negated(array.registers[at], column, columns, second=second)
            return fragments.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

        return inline(chunk)

    def times(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a * b of one dtype, rounded to it."""
        return pairs.product(a, b, self.layout, interpret=self.interpret)

    def plus(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a + b of one dtype, rounded to it."""
        return pairs.total(a, b, self.layout, interpret=self.interpret)

    def zeros_positive(self, chunk: jax.Array) -> jax.Array:
        """The chunk, with 0 for -0."""
        return pairs.zeros_positive(chunk, self.layout, interpret=self.interpret)

    def of_new_rows(self, chunk: jax.Array, otherwise: jax.Array) -> jax.Array:
        """The chunk, but in rows past the last one, which is taken again, `otherwise`."""
        row = self.row + self._cast(lax.broadcasted_iota(jnp.int32, self.shape, 0))
        return jnp.where(row <= self.last, chunk, otherwise)

    # --- where it lies ------------------------------------------------------------------------------------------------

    def _numbers(self, ref: Lying, start: Any) -> list[jax.Array]:
        repeated = () if ref.tokens is None else (ref.tokens,)
        numbers = (self.is_k, self.row, self.last, self.heads, ref.offset, ref.outer, ref.inner, start, *repeated)
        return [jnp.int32(number) for number in numbers]

    def _load_at(self, ref: Lying, start: Any) -> jax.Array:
        shape, layout = self.shape, self.layout
        if self.interpret:
            elements = self._elements(ref, start)
            found = [jnp.take(one[...].reshape(-1), elements, mode="clip") for one in ref.refs]
            return found[0] if len(found) == 1 else jnp.where(self.is_k == 1, found[1], found[0])
        numbers = self._numbers(ref, start)
        types = (plgpu.RefType(),) * len(ref.refs) + (layouts.scalar(),) * len(numbers)
        returned = plgpu.ShapeDtypeStruct(shape, ref.dtype, layout=layout)

        @plgpu.inline_mgpu(arg_types=types, return_type=returned)
        def inline(_: Any, *arguments: Any) -> Any:
            refs, numbers = arguments[: len(ref.refs)], arguments[len(ref.refs) :]
            fragment = layout.to_mgpu()
            kind = fragment.registers_element_type(refs[0].type.element_type)
            registers = np.empty(fragment.registers_shape(shape), dtype=object)
            for index, address in zip(
                np.ndindex(*registers.shape), _addresses(fragment, shape, refs, numbers), strict=True
            ):
                registers[index] = llvm.load(kind, address)
            return fragments.FragmentedArray(_registers=registers, _layout=fragment, _is_signed=None)

        return inline(*ref.refs, *numbers)

    def _store_at(self, ref: Lying, start: Any, chunk: jax.Array) -> None:
        shape = self.shape
        if self.interpret:
            for i, one in enumerate(ref.refs):
                pl.when(self.is_k == i)(functools.partial(self._store_rows, one, start, chunk))
            return
        numbers = self._numbers(ref, start)
        types = (plgpu.RefType(),) * len(ref.refs) + (layouts.scalar(),) * len(numbers)

        @plgpu.inline_mgpu(arg_types=(*types, self.layout))
        def inline(_: Any, *arguments: Any) -> None:
            refs, numbers, value = arguments[: len(ref.refs)], arguments[len(ref.refs) : -1], arguments[-1]
            addresses = _addresses(value.layout, shape, refs, numbers)
            for index, address in zip(np.ndindex(*value.registers.shape), addresses, strict=True):
                llvm.store(value.registers[index], address)

        inline(*ref.refs, *numbers, chunk)

    def _rows(self) -> list[Any]:
        """(interpreter) The rows of the block."""
        return [jnp.minimum(self.row + i, self.last) for i in range(self.plan.block)]

    def _elements(self, ref: Lying, start: Any) -> jax.Array:
        """(interpreter) Where in the tensor each element of a chunk is."""
        rows = jnp.stack(self._rows())[:, None]
        token = rows // self.heads if ref.tokens is None else rows // self.heads % ref.tokens
        columns = jnp.arange(self.plan.span, dtype=jnp.int32)[None]
        return ref.offset + token * ref.outer + rows % self.heads * ref.inner + start + columns

    def _store_rows(self, ref: Any, start: Any, chunk: jax.Array) -> None:
        for row, values in zip(self._rows(), chunk, strict=True):
            ref[row, pl.ds(start, self.plan.span)] = values

    def _lanes_swapped(self, chunk: jax.Array) -> jax.Array:
        """What the lane half a row's lanes away holds."""
        layout, lanes = self.layout, self.plan.lanes // 2
        returned = plgpu.ShapeDtypeStruct(chunk.shape, chunk.dtype, layout=layout)

        @plgpu.inline_mgpu(arg_types=(layout,), return_type=returned)
        def inline(_: Any, array: Any) -> Any:
            registers = np.empty_like(array.registers)
            for index, register in np.ndenumerate(array.registers):
                registers[index] = _shuffled(register, lanes)
            return fragments.FragmentedArray(_registers=registers, _layout=array.layout, _is_signed=None)

        return inline(chunk)


def _shuffled(register: Any, lanes: int) -> Any:
    """(Mosaic GPU code) A vector of whole words, from the lane whose number differs in that bit."""
    i32, shuffle = ir.IntegerType.get_signless(32), f"shfl.sync.bfly.b32 $0, $1, {lanes}, {WARP - 1}, -1;"
    found = [llvm.inline_asm(i32, [word], shuffle, "=r,r", has_side_effects=True) for word in pairs.words(register)]
    return pairs.of_words(register.type, found)


def _negated(register: Any, column: Any, columns: int, *, second: bool) -> Any:
    """(Mosaic GPU code) With the other sign where `column`, that of the first element, is one of the first columns, or
    of those behind them."""
    i32, kind = ir.IntegerType.get_signless(32), arith.CmpIPredicate.sge if second else arith.CmpIPredicate.slt
    signs = SIGNS[ir.VectorType(register.type).element_type.width]
    is_there = arith.cmpi(kind, arith.index_cast(i32, column), arith.constant(i32, columns))
    mask = arith.select(is_there, arith.constant(i32, signs), arith.constant(i32, 0))
    return pairs.of_words(register.type, [arith.xori(word, mask) for word in pairs.words(register)])


def _addresses(layout: Any, shape: tuple[int, ...], refs: Sequence[Any], numbers: Sequence[Any]) -> Iterator[Any]:
    """(Mosaic GPU code) The address of each register's first element, in the order of the registers."""
    i32, i64 = (ir.IntegerType.get_signless(width) for width in (32, 64))
    is_k, first, last, heads, offset, outer, inner, start, *repeated = (one.registers.item() for one in numbers)
    bases = [arith.index_cast(i64, memref.extract_aligned_pointer_as_index(ref)) for ref in refs]
    second = arith.cmpi(arith.CmpIPredicate.ne, is_k, arith.constant(i32, 0))
    base = arith.select(second, bases[-1], bases[0])
    element_bytes = arith.constant(i64, ir.MemRefType(refs[0].type).element_type.width // 8)

    def product(a: Any, b: Any) -> Any:
        return arith.muli(arith.extui(i64, a), arith.extui(i64, b))

    for row, column in layout.thread_idxs(shape):
        row = arith.minui(arith.addi(first, arith.index_cast(i32, row)), last)
        token = functools.reduce(arith.remui, repeated, arith.divui(row, heads))
        column = arith.addi(start, arith.index_cast(i32, column))
        parts = (
            product(token, outer),
            product(arith.remui(row, heads), inner),
            arith.addi(arith.extui(i64, offset), arith.extui(i64, column)),
        )
        element = functools.reduce(arith.addi, parts)
        yield llvm.inttoptr(llvm.PointerType.get(1), arith.addi(base, arith.muli(element, element_bytes)))
