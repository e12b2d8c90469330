"""The plans of the tables, made for Hopper, as another GPU can run them.

Never with another width of a block of columns: it gives the order of a row's additions, so y, rstd and dx have the same
bits on every GPU. The programs of a grid give the order in which dweight is added up, so they stay those of the table
where there is a dweight; other persistent grids are as large as the GPU.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar

import jax.numpy as jnp

from .. import _validate
from .backward import backward_plan_for
from .forward import plan_for
from .hardware import RESIDENT_CLUSTERS, SMS, Gpu, named
from .plan import FEWEST_STAGES, BackwardPlan, Plan, Source, from_memory, per_sm, pipelined, stages_of

if TYPE_CHECKING:
    from jax.typing import DTypeLike

AnyPlan = TypeVar("AnyPlan", bound=Plan)

MOST_TOGETHER = 4  # warpgroups of a cluster that one CTA takes: with more, a lane has no registers for its columns


class Misfit(NotImplementedError):
    """Why a GPU has no kernel for a row length that others have one for."""


def _unstaged(plan: AnyPlan) -> AnyPlan:
    """Without bulk copies. What a forward plan keeps in registers stays there; a backward plan has no registers for a
    second row, nor for the weight beside what it reads again."""
    if isinstance(plan, BackwardPlan):
        return dataclasses.replace(from_memory(plan), keeps_weight=False)
    return dataclasses.replace(plan, source=Source.REGISTERS, stages=0, rows_in_registers=False, programs=None)


def _staged(plan: AnyPlan, column_bytes: int, shared_bytes: int) -> AnyPlan | None:
    """With as many stages, and of a forward plan as many programs, as the GPU has room for, or None."""
    if not isinstance(plan, BackwardPlan):
        return pipelined(plan, plan.stages, column_bytes, shared_bytes=shared_bytes)
    room = stages_of(plan, column_bytes, per_sm=per_sm(plan), shared_bytes=shared_bytes)
    return dataclasses.replace(plan, stages=min(plan.stages, room)) if room >= FEWEST_STAGES else None


def fitted(plan: AnyPlan, gpu: Gpu, column_bytes: int, *, with_dweight: bool) -> AnyPlan:
    """column_bytes: of what is read of a column. Raises Misfit where rows need clusters and the GPU has none."""
    if plan.cluster > 1 and not gpu.clusters:
        if plan.workers <= MOST_TOGETHER:
            together = dataclasses.replace(plan, warpgroups=plan.workers, cluster=1)
            return fitted(together, gpu, column_bytes, with_dweight=with_dweight)
        raise Misfit(
            f"rows of {plan.n} elements are shared by a cluster of {plan.cluster} CTAs, and a GPU of compute "
            f"capability {named(gpu.capability)} has no clusters, which came with 9.0 (Hopper)"
        )
    if plan.source is Source.PIPELINE:
        staged = _staged(plan, column_bytes, gpu.shared_bytes) if gpu.clusters else None
        plan = _unstaged(plan) if staged is None else staged
    if plan.programs is not None and not with_dweight:
        each = plan.programs // RESIDENT_CLUSTERS[plan.cluster]
        programs = (
            each * gpu.resident_clusters(plan.cluster)
            if plan.cluster > 1
            else plan.programs * gpu.multiprocessors // SMS
        )
        plan = dataclasses.replace(plan, programs=programs)
    return plan


def _bytes(name: str, dtype: DTypeLike) -> int:
    return jnp.dtype(_validate.dtype_name(name, dtype)).itemsize


def forward_plan_on(
    gpu: Gpu, n: int, dtype: DTypeLike, *, residual: bool = False, read: tuple[DTypeLike, ...] | None = None
) -> Plan:
    """plan_for, as that GPU runs it. Raises Misfit, and as plan_for."""
    sizes = [_bytes("dtype", one) for one in read or [dtype] * (2 if residual else 1)]
    return fitted(plan_for(n, dtype, residual=residual, read=read), gpu, sum(sizes), with_dweight=False)


def backward_plan_on(
    gpu: Gpu,
    n: int,
    dtype: DTypeLike,
    *,
    dy_dtype: DTypeLike | None = None,
    residual: bool = False,
    with_dweight: bool = True,
) -> BackwardPlan:
    """backward_plan_for, as that GPU runs it. Raises Misfit, and as backward_plan_for."""
    plan = backward_plan_for(n, dtype, dy_dtype=dy_dtype, residual=residual)
    own, dy = _bytes("dtype", dtype), _bytes("dy_dtype", dtype if dy_dtype is None else dy_dtype)
    return fitted(plan, gpu, dy + own * (2 if residual else 1), with_dweight=with_dweight)
