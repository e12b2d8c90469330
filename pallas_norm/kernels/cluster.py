"""How the CTAs of a cluster meet: each puts its part of a row into the shared memory of all of them.

A CTA reads nothing of another one, and waits for what it is sent at a barrier of its own, which the arriving bytes
complete. So none waits for the others at the end of the kernel: what a CTA is sent it has waited for before it leaves.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._compat import arith, ir, llvm, memref, plgpu
from . import mosaic

VALUE_BYTES, BARRIER_BYTES = 4, 8

# $0: the barriers, of one arrival each, that of the thread which says how many bytes come. The fence is for the other
# CTAs, whose bytes are to find them.
OPEN = (
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
    " @p mbarrier.init.shared::cta.b64 [$0], 1; @p mbarrier.init.shared::cta.b64 [$0 + 8], 1;"
    " @p fence.mbarrier_init.release.cluster; }"
)
# $0: where the values are received, $1: the barrier, $2: the value. Thread t sends to CTA t.
SEND = (
    "{ .reg .pred p; .reg .b32 t, own, to, there; mov.u32 t, %tid.x; mov.u32 own, %cluster_ctarank;"
    " mad.lo.u32 to, own, {each}, $0; setp.lt.u32 p, t, {ctas};"
    " @p mapa.shared::cluster.u32 to, to, t; @p mapa.shared::cluster.u32 there, $1, t;"
    " @p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], $2, [there];"
    " setp.eq.u32 p, t, 0; @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], {all}; }"
)
# $0: the barrier, $1: the parity of its phase. The fence orders shared memory alone: a wait that acquires from the
# cluster also empties L1, of the weight that is read again, and a release like that of barrier.cluster waits until all
# stores of the row before have reached memory. It is of PTX 8.6, which assemblers know from CUDA 12.8 on; a wait that
# acquires from the CTA alone becomes the same instructions, but promises nothing of what another CTA has written
# (bench/results/cluster_instructions_2026-11-30.log).
WAIT = (
    "{ .reg .pred p; again: mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [$0], $1; @!p bra again;"
    " fence.acquire.sync_restrict::shared::cluster.cluster; }"
)


@dataclasses.dataclass(frozen=True)
class Totals:
    """A value of each CTA, float32 or int32, for all of them, once for each row.

    With two slots, who sends of row r + 2 has received of row r + 1, which each CTA sent when it had read row r.
    """

    values: Any  # SMEM (slots, ctas)
    barriers: Any  # SMEM i32 (slots, 2): an mbarrier of 64 bits each. Mosaic's own have no address that could be sent

    @staticmethod
    def scratch(slots: int, ctas: int, dtype: Any) -> dict[str, Any]:
        assert slots == 2, "OPEN initialises two barriers"
        return {"values": mosaic.smem((slots, ctas), dtype), "barriers": mosaic.smem((slots, 2), jnp.int32)}

    def open(self) -> None:
        """Once, before all threads of the cluster meet, before any of them sends."""

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
        def inline(_: Any, barriers: Any) -> None:
            _asm(OPEN, "r", _address(barriers))

        inline(self.barriers)

    def send(self, slot: Any, value: jax.Array) -> None:
        """The value of this CTA, which all its threads have, to all."""
        ctas = self.values.shape[1]
        numbers = {"{each}": VALUE_BYTES, "{ctas}": ctas, "{all}": ctas * VALUE_BYTES}
        ptx = functools.reduce(lambda text, name: text.replace(name, f"{numbers[name]}"), numbers, SEND)
        kind = "f" if value.dtype == jnp.float32 else "r"
        scalar, ref = plgpu.Layout.WG_SPLAT(()), plgpu.RefType()

        @plgpu.inline_mgpu(arg_types=(ref, ref, scalar, scalar))
        def inline(_: Any, values: Any, barriers: Any, slot: Any, value: Any) -> None:
            slot, value = (number.registers.item() for number in (slot, value))
            to, barrier = _address(values, slot, ctas * VALUE_BYTES), _address(barriers, slot, BARRIER_BYTES)
            _asm(ptx, f"r,r,{kind}", to, barrier, value)

        inline(self.values, self.barriers, jnp.int32(slot), value)

    def received(self, slot: Any, uses: Any) -> list[jax.Array]:
        """Of each CTA, once all have come. uses: how often the slot was used before."""
        scalar, ref = plgpu.Layout.WG_SPLAT(()), plgpu.RefType()

        @plgpu.inline_mgpu(arg_types=(ref, scalar, scalar))
        def inline(_: Any, barriers: Any, slot: Any, parity: Any) -> None:
            slot, parity = (number.registers.item() for number in (slot, parity))
            _asm(WAIT, "r,r", _address(barriers, slot, BARRIER_BYTES), parity)

        inline(self.barriers, jnp.int32(slot), lax.rem(jnp.int32(uses), jnp.int32(2)))
        return [self.values[slot, cta] for cta in range(self.values.shape[1])]


def _address(ref: Any, index: Any = None, size: int = 0) -> Any:
    """(Mosaic GPU code) In shared memory, as an i32, of an element of `size` bytes."""
    i32 = ir.IntegerType.get_signless(32)
    base = arith.index_cast(i32, memref.extract_aligned_pointer_as_index(ref))
    return base if index is None else arith.addi(base, arith.muli(index, arith.constant(i32, size)))


def _asm(ptx: str, constraints: str, *operands: Any) -> None:
    """(Mosaic GPU code)"""
    kind = ir.Type.parse("!llvm.void")
    llvm.inline_asm(kind, list(operands), ptx, f"{constraints},~{{memory}}", has_side_effects=True)
