"""Plans worth measuring for a row length: the parameters of Plan and BackwardPlan, less what cannot run or cannot win.

All add up a row in the order of the plan in use, which is part of the specification (docs/order.md): how many lanes,
warps and CTAs share a row changes no bit, the columns that are added up side by side do.

Names are those of bench/results/tuning_*.json: regime:v<vec>l<lanes>b<rows of a block>g<warpgroups>c<CTAs of the
cluster>, s<parts> where a worker has several parts of a block, r where a row is read twice, p<stages> of a pipeline, k
where it keeps rows, x<programs>; of a backward plan also the source, w where the weight is kept, x<programs on an SM>.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import jax.numpy as jnp

from pallas_norm.plans.hardware import RESIDENT_CLUSTERS, SMS, WARPS
from pallas_norm.plans.plan import FEWEST_STAGES, BackwardPlan, Plan, Regime, Source, staged_view, stages_of
from pallas_norm.regimes import backward_plan_for, plan_for

LEAST = 16  # elements of a long row in a lane: fewer share it among so many warps that they mostly wait
KEPT, REREAD = 64, 128  # elements of a row in a lane: more spill, or are more code than a cache holds
LARGEST_WARP_N = 2048
SMALLEST_CLUSTER_N = 8192  # of a cluster, and of a forward row that bulk copies bring
PARTS = (2, 4)  # of a block, that a worker has where several share a row
THREADS = (256, 1024)  # of an SM in a persistent grid, at least and at most: fewer hide no latency, more spill


def label(plan: Plan) -> str:
    name = f"{plan.regime.value}:v{plan.vec}l{plan.lanes}b{plan.block}g{plan.warpgroups}c{plan.cluster}"
    name += f"s{plan.parts}" if plan.parts > 1 else ""
    if not isinstance(plan, BackwardPlan):
        if plan.source is Source.PIPELINE:
            return f"{name}p{plan.stages}{'k' if plan.rows_in_registers else ''}x{plan.programs}"
        return name + ("r" if plan.source is Source.MEMORY else "")
    source = {Source.PIPELINE: f"p{plan.stages}", Source.MEMORY: "m", Source.REGISTERS: "r"}[plan.source]
    options = f"{'k' if plan.rows_in_registers else ''}{'w' if plan.keeps_weight else ''}"
    return f"{name}:{source}{options}x{-(-plan.programs * plan.cluster // SMS)}"


def _vectors(n: int, itemsize: int) -> list[int]:
    """The two widest that divide n, so that every row is aligned."""
    return [vec for vec in (8, 4, 2, 1) if vec * itemsize <= 16 and n % vec == 0][:2]


def _fits(plan: Plan, most: int) -> bool:
    """Covers a row without reading more than a quarter of it twice, in at most `most` elements a lane."""
    rows_a_lane = plan.block * plan.lanes // (WARPS * 32) if plan.regime is Regime.WARP else 1
    return plan.span <= plan.n and 4 * plan.overlap <= plan.n and plan.chunks * plan.vec * rows_a_lane <= most


def _shapes(n: int, itemsize: int, width: int) -> Iterator[Plan]:
    """By how the row is shared out."""
    for vec in _vectors(n, itemsize)[: 1 if n >= SMALLEST_CLUSTER_N else 2]:
        for lanes in (4, 8, 16, 32):
            if n <= LARGEST_WARP_N and lanes * vec == width:
                for several in (1, 2, 4):
                    yield Plan(n, Regime.WARP, vec, lanes, WARPS * (32 // lanes) * several)
        clusters = (1, 2, 4, 8) if n >= SMALLEST_CLUSTER_N else (1,)
        for warpgroups, cluster in itertools.product((1, 2, 4, 8), clusters):
            plan = Plan(n, Regime.CTA, vec, warpgroups=warpgroups, cluster=cluster)
            parts = width // plan.width
            if parts == 1 or (parts in PARTS and plan.workers > 1):
                yield dataclasses.replace(plan, parts=parts)


def forward(n: int, dtype: str) -> dict[str, Plan]:
    """The plan in use first."""
    itemsize = jnp.dtype(dtype).itemsize
    plans = [plan_for(n, dtype)]
    for plan in _shapes(n, itemsize, plans[0].width):
        if _fits(plan, KEPT):
            plans.append(plan)
        if plan.regime is Regime.CTA and n >= SMALLEST_CLUSTER_N and _fits(plan, REREAD):
            plans.append(dataclasses.replace(plan, source=Source.MEMORY))
        plans += _forward_pipelines(plan, itemsize)
    return {label(plan): plan for plan in plans}


def _may_be_piped(plan: Plan, itemsize: int) -> bool:
    """A CTA of a cluster finds its columns in one place of each block: there a worker has one part."""
    return staged_view(plan, itemsize) is not None and _fits(plan, KEPT) and (plan.parts == 1 or plan.cluster == 1)


def _forward_pipelines(plan: Plan, itemsize: int) -> Iterator[Plan]:
    """With one to four CTAs on an SM: with two stages, three, and the most that fit; one CTA also reads twice."""
    if plan.n < SMALLEST_CLUSTER_N or plan.chunks * plan.vec < LEAST or not _may_be_piped(plan, itemsize):
        return
    for per_sm in (per_sm for per_sm in range(1, 5) if per_sm * plan.warpgroups * WARPS * 32 <= THREADS[1]):
        room = stages_of(plan, itemsize, per_sm=per_sm)
        programs = per_sm * RESIDENT_CLUSTERS[plan.cluster]
        for stages in sorted({min(room, most) for most in (FEWEST_STAGES, 3, 6)}) if room >= FEWEST_STAGES else ():
            shape = {"source": Source.PIPELINE, "stages": stages, "programs": programs, "rows_in_registers": True}
            yield dataclasses.replace(plan, **shape)
            if per_sm == 1:
                yield dataclasses.replace(plan, **shape | {"rows_in_registers": False})


def _backward(plan: Plan, source: Source, *, stages: int, per_sm: int, keeps_weight: bool) -> BackwardPlan:
    names = ("n", "regime", "vec", "lanes", "block", "warpgroups", "cluster", "parts")
    shape = {name: getattr(plan, name) for name in names}
    programs = per_sm * RESIDENT_CLUSTERS[plan.cluster]
    return BackwardPlan(**shape, source=source, stages=stages, keeps_weight=keeps_weight, programs=programs)


def _pipelines(plan: Plan, itemsize: int, per_sm: int) -> Iterator[BackwardPlan]:
    """With 3, 4 and 6 stages, in a cluster the most: 16384 x 4096 took 105 us with 3 and 109 with 2 (tuning_2)."""
    if not _may_be_piped(plan, itemsize):
        return
    room = stages_of(plan, 2 * itemsize, per_sm=per_sm)
    for stages in sorted({min(room, most) for most in ((3, 4, 6) if plan.cluster == 1 else (6,))}):
        if stages >= FEWEST_STAGES:
            found = _backward(plan, Source.PIPELINE, stages=stages, per_sm=per_sm, keeps_weight=True)
            yield found
            if stages == min(room, 3) and plan.chunks * plan.vec <= KEPT // 2:  # a stage is free sooner: few do
                yield dataclasses.replace(found, rows_in_registers=True)
            if plan.chunks * plan.vec > KEPT // 2:
                yield _backward(plan, Source.PIPELINE, stages=stages, per_sm=per_sm, keeps_weight=False)


def backward(n: int, dtype: str) -> dict[str, BackwardPlan]:
    """The plan in use first."""
    itemsize = jnp.dtype(dtype).itemsize
    plans = [backward_plan_for(n, dtype)]
    for plan in _shapes(n, itemsize, plans[0].width):
        threads = WARPS * 32 * plan.warpgroups
        for per_sm in (per_sm for per_sm in range(1, 9) if THREADS[0] <= per_sm * threads <= THREADS[1]):
            piped = list(_pipelines(plan, itemsize, per_sm)) if n >= 256 else []
            plans += piped
            if piped or per_sm % 2:
                continue
            if _fits(plan, KEPT // 2):
                plans.append(_backward(plan, Source.REGISTERS, stages=0, per_sm=per_sm, keeps_weight=True))
            if n > 256 and _fits(plan, KEPT):
                plans.append(_backward(plan, Source.MEMORY, stages=0, per_sm=per_sm, keeps_weight=False))
    return {label(plan): plan for plan in plans}


CANDIDATES = {"forward": forward, "backward": backward}
