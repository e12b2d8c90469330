"""A million direct-launch calls on side streams of several threads, under allocator churn, CUDA graphs in between.

Every result is compared on the device.

`python -m tests.gpu_proof.stress --calls 1000000`. Prints a summary as JSON and fails if an element was wrong, or if a
wrong element that it plants first was not found. Without a GPU: a rehearsal, with no streams and no graphs.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import json
import random
import sys
import threading
import time
import traceback
from typing import Any

import jax
import torch

from pallas_norm_torch import rms_norm
from tests.gpu_proof import batches
from tests.gpu_proof.batches import KINDS, Comparer, Pattern
from tests.gpu_proof.every_launch import DEVICE
from tests.gpu_proof.expected import Case, every_case
from tests.gpu_proof.operands import EPS

GPU = DEVICE == "cuda"
PATTERNS = 3  # of each case and thread
CAPTURED = 12  # calls in a thread's graph
LARGEST_CHURN = 1 << 21  # bytes
RESIDENT_CLUSTERS = 24  # tensors, freed at random


class Graph:
    """Calls on several row counts of an input that changes between the replays."""

    def __init__(self, case: Case, draw: random.Random, stream: Any) -> None:
        self.case, self.x, self.replays = case, torch.empty_like(case.x), 0
        counts = [draw.randint(1, case.rows) for _ in range(CAPTURED)]
        self.inputs = [case.x, case.x.flip(0)]
        self.expected = [torch.cat([y[:count] for count in counts]) for y in (case.y, case.y.flip(0))]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.found = torch.cat([rms_norm(self.x[:count], case.weight, EPS) for count in counts])

    def replay(self, comparer: Comparer) -> None:
        which = self.replays % len(self.inputs)
        self.x.copy_(self.inputs[which])
        self.graph.replay()
        comparer.compare("graph", self.found, self.expected[which])
        self.replays += 1


class Worker:
    """What one thread does, on a stream of its own."""

    def __init__(self, number: int, cases: list[Case], together: threading.Barrier, one_at_a_time: Any) -> None:
        self.draw = random.Random(number)
        self.cases, self.together, self.one_at_a_time = cases, together, one_at_a_time
        self.number, self.comparer = number, Comparer(cases[0].x.device)
        self.stream = torch.cuda.Stream() if GPU else None
        self.calls: collections.Counter[str] = collections.Counter()
        self.graph: Graph | None = None
        self.held: list[torch.Tensor] = []
        self.kept: dict[tuple[str, int], torch.Tensor] = {}

    def work(self, calls: int, deadline: float, *, planted: bool) -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(self.stream) if GPU else contextlib.nullcontext():
                self.prepare()
                self.together.wait(300)  # nobody runs while another captures
                kinds, shares = list(KINDS), [share for _, _, share in KINDS.values()]
                while self.calls.total() < calls and time.monotonic() < deadline:
                    kind = self.draw.choices(kinds, shares)[0]
                    self.batch(kind, planted=planted and not self.calls)
                if self.stream is not None:
                    self.stream.synchronize()
        except BaseException:
            traceback.print_exc()  # here: of several threads the one that waits for the others may be asked first
            self.together.abort()
            raise

    def prepare(self) -> None:
        self.patterns = [Pattern.of(case, self.draw, ragged=GPU) for case in self.cases for _ in range(PATTERNS)]
        if not GPU:
            return
        with self.one_at_a_time:
            case = self.cases[self.number % len(self.cases)]
            rms_norm(case.x, case.weight, EPS)
            self.graph = Graph(case, self.draw, self.stream)
            self.stream.synchronize()

    def batch(self, kind: str, *, planted: bool) -> None:
        pattern = self.draw.choice(self.patterns)
        results = batches.run(kind, pattern, self.kept, self.comparer, planted=planted)
        self.calls[kind] += KINDS[kind][1]
        self.churn(results)
        if self.graph is not None and self.draw.random() < 0.2:
            self.graph.replay(self.comparer)

    def churn(self, results: list[torch.Tensor]) -> None:
        """Some results live on; memory of any size is taken, overwritten, and freed at random, much of it at once."""
        self.held += self.draw.sample(results, min(4, len(results)))
        for _ in range(4):
            size = self.draw.randint(1, LARGEST_CHURN if GPU else 1000)
            self.held.append(torch.empty(size, dtype=torch.uint8, device=DEVICE).fill_(255))  # as floats: NaN
        while len(self.held) > RESIDENT_CLUSTERS:
            self.held.pop(self.draw.randrange(len(self.held)))


def stress(cases: list[Case], calls: int, *, threads: int, seconds: float, planted: bool = False) -> dict[str, Any]:
    started = time.monotonic()
    together, one_at_a_time = threading.Barrier(threads), threading.Lock()
    workers = [Worker(number, cases, together, one_at_a_time) for number in range(threads)]
    if GPU:
        torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(worker.work, -(-calls // threads), started + seconds, planted=planted and worker.number == 0)
            for worker in workers
        ]
        for job in jobs:
            job.result()
    wrong = {kind: sum(int(worker.comparer.wrong[kind]) for worker in workers) for kind in (*KINDS, "graph")}
    elements = {kind: sum(worker.comparer.elements[kind] for worker in workers) for kind in wrong}
    made = sum((worker.calls for worker in workers), collections.Counter())
    replays = sum(worker.graph.replays for worker in workers if worker.graph is not None)
    return {
        "calls": made.total(),
        "calls_by_kind": {kind: made[kind] for kind in KINDS},
        "graph_replays": replays,
        "launches_in_replays": replays * CAPTURED,
        "elements_compared": sum(elements.values()),
        "wrong": sum(wrong.values()),
        "wrong_by_kind": wrong,
        "threads": threads,
        "side_streams": sum(worker.stream is not None for worker in workers),
        "seconds": round(time.monotonic() - started, 1),
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_proof.stress", description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=480, help="after which fewer calls are made, which fails")
    parser.add_argument("--rehearsal", action="store_true", help="without a GPU")
    given = parser.parse_args(arguments)
    if not GPU and not given.rehearsal:
        parser.error("there is no GPU; --rehearsal does without, and proves nothing")
    cases = every_case()
    options: dict[str, Any] = {"threads": given.threads, "seconds": given.seconds}
    planted = stress(cases, max(given.calls // 100, 1), **options, planted=True)
    found = stress(cases, given.calls, **options)
    device = torch.cuda.get_device_name() if GPU else "cpu"
    about = {"device": device, "torch": torch.__version__, "jax": jax.__version__}
    summary = {**about, "planted_wrong_elements": 1, "planted_found": planted["wrong"], **found}
    print(json.dumps(summary, indent=1))
    print(f"{found['calls']} calls, {found['graph_replays']} graph replays, {found['wrong']} elements wrong")
    enough = found["calls"] >= given.calls and all(found["calls_by_kind"].values())
    return 0 if enough and found["wrong"] == 0 and planted["wrong"] == 1 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
