"""What orders a kernel's accesses to shared memory, read off the kernel as it is lowered for CUDA. Needs no GPU.

The interpreter knows neither the warps of one warpgroup nor the CTAs of a cluster, and on a GPU a missing barrier may
do no harm for years. Here each has to be in its place between the write and the read that it orders.

Property 22.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax._src.interpreters import mlir
from jaxlib.mlir import ir

from pallas_norm._spec import Spec
from pallas_norm.plans.plan import BackwardPlan, Plan, Regime, Source
from pallas_norm.regimes import backward_plan_for
from tests import rewrites
from tests.rewrites import Rewrite

ROWS = 300

EVENTS = {
    "arrive": r"mbarrier\.arrive\.release",
    "wait": r"mbarrier\.try_wait(?!\.parity\.relaxed)",
    # An exchange of a cluster: what one CTA has initialised the others may find, once all have arrived.
    "open": r"mbarrier\.init\.shared::cta.*fence\.mbarrier_init\.release\.cluster",
    "cluster_arrive": r"barrier\.cluster\.arrive\.relaxed\.aligned",
    "cluster_wait": r"barrier\.cluster\.wait\.acquire\.aligned",
    "send": r"st\.async\.weak\.shared::cluster\.mbarrier::complete_tx.*mbarrier\.arrive\.expect_tx",
    "receive": r"try_wait\.parity\.relaxed\.cluster.*fence\.acquire\.sync_restrict::shared::cluster\.cluster",
    "copy": r"cp\.async\.bulk",
    "write": r'llvm\.store"\(%\S+, %\S+\).*!llvm\.ptr<3>\)|memref\.store.*address_space<workgroup>',
    "read": r'llvm\.load"\(%\S+\).*\(!llvm\.ptr<3>\)|memref\.load.*address_space<workgroup>',
}


def kernels(function: Callable[..., Any], *operands: Any) -> list[str]:
    """The Mosaic GPU kernels of a program lowered for CUDA, as text."""
    program = jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))
    found: list[bytes] = []

    def visit(operation: Any) -> Any:
        if operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(operation.attributes["call_target_name"]):
            config = ir.DictAttr(operation.attributes["mhlo.backend_config"])
            found.append(ir.StringAttr(config["module"]).value_bytes)
        return ir.WalkResult.ADVANCE

    program.compiler_ir().operation.walk(visit)

    def text(module: bytes) -> str:
        with mlir.make_ir_context() as context:
            context.allow_unregistered_dialects = True
            return str(ir.Module.parse(module))

    return [text(module) for module in found]


def events(kernel: str) -> str:
    """In the order of the text, repetitions once. A read before a write is left out: up to JAX 0.11 a store is a swap,
    which reads what it replaces."""
    found = [name for line in kernel.splitlines() for name, pattern in EVENTS.items() if re.search(pattern, line)]
    once = [name for name, _ in itertools.groupby(found)]
    kept = [name for name, following in itertools.pairwise([*once, ""]) if (name, following) != ("read", "write")]
    if kept[:2] == ["cluster_arrive", "open"]:  # Mosaic's own, as 0.12 writes it
        kept = kept[1:]
    return " ".join(name for name, _ in itertools.groupby(kept))


def forward(plan: Plan) -> str:
    kernel = sys.modules["pallas_norm.kernels.forward"].forward  # of a mutant

    def run(x: jax.Array, weight: jax.Array) -> Any:
        return kernel({"x": x, "weight": weight}, plan=plan, spec=Spec(), with_rstd=True, interpret=False)

    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((ROWS, plan.n), (plan.n,)))
    (text,) = kernels(run, x, weight)
    return events(text)


def backward(plan: BackwardPlan) -> str:
    kernel = sys.modules["pallas_norm.kernels.backward"].partial_dweights

    def run(x: jax.Array, weight: jax.Array, rstd: jax.Array) -> Any:
        operands = {"x": x, "dy": x, "weight": weight, "rstd": rstd}
        return kernel(operands, plan=plan, spec=Spec(), with_dweight=True, interpret=False)

    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((ROWS, plan.n), (plan.n,)))
    (text,) = kernels(run, x, weight, jax.ShapeDtypeStruct((ROWS,), jnp.float32))
    return events(text)


# Few elements, so that the kernels are short; the same statements as in long rows.
SHARED = {"regime": Regime.CTA, "vec": 8, "warpgroups": 2}
PIPED = {"source": Source.PIPELINE, "stages": 3, "programs": 4}
FORWARD = {
    "shared": Plan(4096, **SHARED),
    "cluster": Plan(4096, **SHARED, cluster=2),
    "in warps": Plan(128, Regime.WARP, 8, 16, 8),
    "pipeline, cluster": Plan(4096, **SHARED, cluster=2, **PIPED, rows_in_registers=True),
}
PIPELINE = BackwardPlan(4096, Regime.CTA, 8, source=Source.PIPELINE, stages=3, rows_in_registers=True, programs=264)
BACKWARD = {
    "rows in warps": backward_plan_for(128, "bfloat16"),
    "rows in warps, two chunks": BackwardPlan(512, Regime.WARP, 8, 32, 4, source=Source.MEMORY),
    "pipeline in warps": backward_plan_for(512, "bfloat16"),
    "pipeline, rows kept": PIPELINE,
    "pipeline": dataclasses.replace(PIPELINE, rows_in_registers=False),
    "pipeline, shared": dataclasses.replace(PIPELINE, **SHARED, rows_in_registers=False),
    "shared": BackwardPlan(4096, **SHARED, source=Source.MEMORY),
    "cluster": BackwardPlan(4096, **SHARED, cluster=2, source=Source.MEMORY),
    "pipeline, cluster": BackwardPlan(4096, **SHARED, cluster=2, **PIPED),
}

# A row's sum: each warp's part is written, the warpgroups meet, all parts are read.
SUM = "write arrive wait read"
# A cluster's CTAs arrive when their exchanges are open, and before the first total is sent all have; a total is read
# when all have come, which nobody can be late for: the kernel ends with what was received.
OPEN = "open cluster_arrive"
CLUSTER = f"{OPEN} {SUM} cluster_wait send receive read"
# In a pipeline the total is sent when a row has been read, and the stage is filled again before those of the others
# are waited for.
BEGIN = f"{OPEN} copy wait {SUM} cluster_wait send"
END = "receive read"
# A chunk of dweight: all have read the chunk before, the rows are written, all have written, they are read.
COLUMNS = "arrive wait write arrive wait read"
EXPECTED = {
    **{("forward", name): value for name, value in {"shared": SUM, "cluster": CLUSTER, "in warps": ""}.items()},
    ("forward", "pipeline, cluster"): f"{BEGIN} copy {END}",
    ("backward", "rows in warps"): COLUMNS,
    ("backward", "rows in warps, two chunks"): f"{COLUMNS} {COLUMNS}",
    # A stage is read after its copy has arrived, and filled again between the two readings of the next row; or where
    # rows are kept, when the only reading is over.
    ("backward", "pipeline"): "copy wait read copy read",
    ("backward", "pipeline, rows kept"): "copy wait read copy",
    ("backward", "pipeline, shared"): f"copy wait {SUM} copy read",
    ("backward", "shared"): SUM,
    ("backward", "cluster"): CLUSTER,
    # The warps meet, so that all have read the stage that is filled again.
    ("backward", "pipeline in warps"): f"copy wait arrive wait copy read {COLUMNS} {COLUMNS}",
    ("backward", "pipeline, cluster"): f"{BEGIN} copy {END}",
}


def found(of: str, name: str) -> str:
    return forward(FORWARD[name]) if of == "forward" else backward(BACKWARD[name])


@pytest.mark.sampled(7)
@pytest.mark.parametrize(("of", "name"), EXPECTED)
def test_every_barrier_is_between_the_accesses_that_it_orders(of: str, name: str) -> None:
    assert found(of, name) == EXPECTED[of, name]


MEET = "mosaic.arrive_and_wait(self.exchange.barrier)"
BEFORE_A_CHUNK = "mosaic.arrive_and_wait(reduction.barrier)  # all have read the chunk before"
AFTER_A_CHUNK = "mosaic.arrive_and_wait(reduction.barrier)\n            rows"
ARRIVE, WAIT = "    plgpu.barrier_arrive(barrier)\n", "(barrier)\n    plgpu.barrier_wait(barrier)\n"
CLUSTER_ARRIVE, CLUSTER_WAIT = "            mosaic.cluster_arrive()\n", "            self._meet_first()\n"
SEND, RECEIVE = "            self.exchange.totals.send(slot, total)\n", "inline(self.barriers, jnp.int32(slot), lax"
NOTHING = "(lambda *_: None)(self.barriers, jnp.int32(slot), lax"
READ_BY_ALL = "mosaic.arrive_and_wait(self.pipeline.read)"
ARRIVED = "mosaic.wait(self.arrived.at[lax.rem(step, jnp.int32(self.plan.stages))])"
FILLED_EARLY = Rewrite(
    "rows",
    "stage = self.pipeline.wait(step)\n",
    "stage = self.pipeline.wait(step)\n            self.pipeline.refill(step)\n",
    also=("self.pipeline.refill(self.step)", "pass"),
)
WITHOUT: dict[str, tuple[Rewrite, str, str]] = {
    "forward sum": (Rewrite("cta", MEET, "pass"), "forward", "shared"),
    "backward sum": (Rewrite("cta", MEET, "pass"), "backward", "pipeline, shared"),
    "arrival": (Rewrite("mosaic", ARRIVE, ""), "backward", "shared"),
    "wait": (Rewrite("mosaic", WAIT, "(barrier)\n"), "backward", "shared"),
    "before a chunk": (Rewrite("warp", BEFORE_A_CHUNK, "pass"), "backward", "rows in warps, two chunks"),
    "after a chunk": (Rewrite("warp", AFTER_A_CHUNK, "rows"), "backward", "rows in warps"),
    "cluster, arrival": (Rewrite("launch", CLUSTER_ARRIVE, "            pass\n"), "forward", "cluster"),
    "cluster, wait": (Rewrite("cta", CLUSTER_WAIT, ""), "backward", "cluster"),
    "cluster, opened": (Rewrite("cta", "        totals.open()\n", ""), "forward", "cluster"),
    "cluster, sent": (Rewrite("cta", SEND, ""), "forward", "pipeline, cluster"),
    "cluster, received": (Rewrite("cluster", RECEIVE, NOTHING), "backward", "cluster"),
    "warps that share no sum": (Rewrite("rows", READ_BY_ALL, "pass"), "backward", "pipeline in warps"),
    "cluster, release": (Rewrite("cluster", " @p fence.mbarrier_init.release.cluster;", ""), "forward", "cluster"),
    "cluster, acquire": (Rewrite("mosaic", "wait.acquire.aligned", "wait.aligned"), "forward", "cluster"),
    "cluster, bytes": (Rewrite("cluster", "mbarrier.arrive.expect_tx", "mbarrier.arrive"), "forward", "cluster"),
    "cluster, totals": (
        Rewrite("cluster", "fence.acquire.sync_restrict::shared::cluster.cluster;", ""),
        "forward",
        "cluster",
    ),
    "a stage's arrival": (Rewrite("pipeline", ARRIVED, "pass"), "backward", "pipeline"),
    "before a stage is filled again": (FILLED_EARLY, "backward", "pipeline, shared"),
    "before the stage of rows that are kept is": (FILLED_EARLY, "backward", "pipeline, rows kept"),
    "before a stage is filled again, in a cluster": (FILLED_EARLY, "forward", "pipeline, cluster"),
}


@pytest.mark.sampled(17)
@pytest.mark.parametrize("name", WITHOUT)
def test_a_missing_barrier_is_missed(name: str) -> None:
    rewrite, of, kernel = WITHOUT[name]
    with rewrites.rewritten(rewrite):
        assert found(of, kernel) != EXPECTED[of, kernel]
