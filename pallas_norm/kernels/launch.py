"""From a kernel body and a Plan to a launched kernel: references by name, scratch, clusters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .. import _compat
from ..plans.hardware import WARPS
from ..plans.plan import Plan, Source, from_memory, staged_view
from . import mosaic
from .cta import Exchange
from .grid import SLOTS

AnyPlan = TypeVar("AnyPlan", bound=Plan)


def launch(
    body: Callable[..., None],
    plan: Plan,
    grid: int,
    inputs: Mapping[str, jax.Array],
    outputs: Mapping[str, jax.ShapeDtypeStruct],
    *,
    scratch: Mapping[str, Any] | None = None,
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs `body(exchange, x_ref=..., y_ref=..., ...)` in `grid` programs; returns the outputs by name.

    An operand that is absent from `inputs` or `outputs` is absent from the call: the body's default for it is None.
    """
    meeting = _exchange(plan)
    scratch = scratch or {}

    def kernel(*refs: Any) -> None:
        named = dict(zip([*inputs, *outputs, *meeting, *scratch], refs, strict=True))
        exchange = Exchange(**{name: named.pop(name) for name in meeting}) if meeting else None
        own = {name: named.pop(name) for name in scratch}
        body(exchange, **{f"{name}_ref": ref for name, ref in named.items()}, **own)
        if plan.cluster > 1:  # no CTA may leave while another still reads its total
            mosaic.cluster_arrive()
            mosaic.cluster_wait()

    options: dict[str, Any] = {}
    if plan.warpgroups > 1:
        options |= {"num_threads": plan.warpgroups, "thread_name": "warpgroup"}
    if plan.cluster > 1:
        options |= {"cluster": (plan.cluster,), "cluster_names": ("cluster",)}
    results = mosaic.kernel(
        kernel,
        interpret=interpret,
        out_type=tuple(outputs.values()),
        grid=(grid,),
        grid_names=("program",),
        scratch_types=(*meeting.values(), *scratch.values()),
        **options,
    )(*inputs.values())
    like = next(iter(inputs.values()))
    return {name: _compat.vary_like(value, like) for name, value in zip(outputs, results, strict=True)}


def _exchange(plan: Plan) -> dict[str, Any]:
    if plan.workers == 1:
        return {}
    return {
        "partials": mosaic.smem((SLOTS, plan.warpgroups, WARPS), jnp.float32),
        "barrier": mosaic.barrier(plan.warpgroups),
        "total": mosaic.smem((SLOTS,), jnp.float32),
    }


def interpretable(plan: AnyPlan, itemsize: int) -> AnyPlan:
    """The plan for the interpreter, which knows no clusters: one CTA with up to 4 warpgroups stands in.

    A warpgroup that waits at a barrier holds a thread of XLA's CPU pool, which has one for each core or CPU device:
    more warpgroups than that may hang. jax_num_cpu_devices = 8 gives the tests theirs.
    """
    plan = dataclasses.replace(plan, warpgroups=min(plan.workers, 4), cluster=1)
    lost = plan.source is Source.PIPELINE and staged_view(plan, itemsize) is None
    return from_memory(plan) if lost else plan
