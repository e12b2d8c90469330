"""What a kernel asks of Mosaic GPU beside loads and stores: its launch, shared memory, barriers, clusters."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import _compat
from .._compat import barrier as barrier
from .._compat import ir, llvm, plgpu


def kernel(body: Callable[..., None], *, interpret: bool, **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel` with Lane semantics: the default differs between versions; cluster kernels compile in Lane only.

    Without automatic barriers: Pallas would put two around each store, for regions that a thread both reads and writes.
    Ours are the shared memory of Exchange and ColumnReduction, between whose reads and writes the kernels have barriers
    of their own.
    """
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True)
    if interpret:
        options["interpret"] = _compat.interpret_params()
    return plgpu.kernel(body, compiler_params=params, **options)


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype)


def wait(barrier: Any) -> None:
    plgpu.barrier_wait(barrier)


def copy_to_smem(source: Any, destination: Any, barrier: Any) -> None:
    plgpu.copy_gmem_to_smem(source, destination, barrier)


def arrive_and_wait(barrier: Any) -> None:
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def _inline_ptx(ptx: str) -> None:
    @plgpu.inline_mgpu()
    def inline(_: Any) -> None:
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], ptx, "~{memory}", has_side_effects=True)

    inline()


def cluster_arrive() -> None:
    """First half of a barrier of all warps of a cluster. It orders no memory: fences do, of what has to be seen."""
    _inline_ptx("barrier.cluster.arrive.relaxed.aligned;")


def cluster_wait() -> None:
    """Second half: returns when every warp of the cluster has arrived, and sees what fences released before."""
    _inline_ptx("barrier.cluster.wait.acquire.aligned;")
