"""From what a kernel does with a block, and a Plan, to a launched kernel: references by name, scratch, clusters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .. import _compat
from ..plans.plan import Plan, Source, from_memory, staged_view
from . import grid, mosaic
from .block import Block
from .cta import Exchange
from .launch_arguments import LaunchArguments

AnyPlan = TypeVar("AnyPlan", bound=Plan)


Full = Callable[[grid.CtaBlocks], None]
LeftOver = Callable[[Block, Any], None]
Work = Callable[[dict[str, Any]], tuple[Full, LeftOver]]


def launch(
    work: Work,
    plan: Plan,
    rows: int,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    scratch: Mapping[str, Any],
    interpret: bool,
    places: Mapping[str, str] | None = None,
) -> dict[str, jax.Array]:
    """Runs a kernel on `rows` rows, or where `inputs` has LaunchArguments on those of the launch; the outputs by name.

    work: given the references of inputs, outputs and scratch by name, what a CTA does with its full blocks, and with a
    row that is left over. An operand that is absent from `inputs` or `outputs` has no reference.
    places: for an output, the input whose memory receives it; XLA copies one first that is read later.
    """
    exchange, places = Exchange.scratch(plan, jnp.float32, plan.parts), places or {}
    fresh = {name: out for name, out in outputs.items() if name not in places}
    held: dict[str, Any] = {name: jax.new_ref(inputs[name]) for name in places.values()}

    def kernel(*refs: Any) -> None:
        named = dict(zip([*inputs, *fresh, *exchange, *scratch], refs, strict=True))
        named |= {name: named[of].reshape(outputs[name].shape) for name, of in places.items()}
        shared = Exchange.opened(named)
        given, operands = LaunchArguments.taken_from(named)
        extent = grid.extent(plan, rows, given, interpret=interpret)
        full, left_over = work(operands)
        if plan.cluster > 1:  # all exchanges are open, those that `work` took too
            mosaic.cluster_arrive()
        grid.run(plan, extent, shared, full, left_over, interpret=interpret)

    options: dict[str, Any] = {}
    if plan.warpgroups > 1:
        options |= {"num_threads": plan.warpgroups, "thread_name": "warpgroup"}
    if plan.cluster > 1:
        options |= {"cluster": (plan.cluster,), "cluster_names": ("cluster",)}
    _, _, programs = grid.counts_of(plan, rows)
    results = mosaic.kernel(
        kernel,
        interpret=interpret,
        out_type=tuple(fresh.values()),
        grid=(programs,),
        grid_names=("program",),
        scratch_types=(*exchange.values(), *scratch.values()),
        **options,
    )(*{**inputs, **held}.values())
    found = dict(zip(fresh, results, strict=True))
    found |= {name: jax.freeze(held[of]).reshape(outputs[name].shape) for name, of in places.items()}
    like = next(iter(inputs.values()))
    return {name: _compat.vary_like(found[name], like) for name in outputs}


def interpretable(plan: AnyPlan, itemsize: int) -> AnyPlan:
    """The plan for the interpreter, which knows no clusters: one CTA with up to 4 warpgroups stands in. Each has the
    columns of several, so the order of additions is the same.

    A warpgroup that waits at a barrier holds a thread of XLA's CPU pool, which has one for each core or CPU device:
    more warpgroups than that may hang. jax_num_cpu_devices = 8 gives the tests theirs.
    """
    warpgroups = min(plan.workers, 4)
    plan = dataclasses.replace(plan, warpgroups=warpgroups, cluster=1, parts=plan.workers // warpgroups)
    lost = plan.source is Source.PIPELINE and staged_view(plan, itemsize) is None
    return from_memory(plan) if lost else plan
