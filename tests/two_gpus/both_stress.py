"""Calls of every kind on both GPUs at once, from threads with streams of their own: tests/gpu_proof/stress.py, twice.

Ends after `--seconds`, however many calls that were; every result is compared on its device. Fails if an element was
wrong, or if a wrong one that it plants first was not found.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import sys
import threading
import time
from typing import Any

import torch

from tests.gpu_proof import stress
from tests.gpu_proof.batches import KINDS
from tests.gpu_proof.expected import SHAPES, SMALL, Case
from tests.two_gpus import checks

GPU = torch.cuda.device_count() >= 2
DEVICES = (0, 1)
THREADS = 3  # of each GPU
LEAST = 50_000  # calls on each GPU; a rehearsal has none


def current(device: int) -> Any:
    return torch.cuda.device(device) if GPU else contextlib.nullcontext()


def cases_of(device: int) -> list[Case]:
    with current(device):
        found = [Case.of(*shape) for shape in (SHAPES if GPU else SMALL)]
        assert not GPU or all(case.x.get_device() == device for case in found)
        return found


def run(cases: list[list[Case]], seconds: float, *, calls: int, planted: bool = False) -> tuple[list[int], int, int]:
    """(calls on each GPU, graph replays, wrong elements)."""
    together, one_at_a_time = threading.Barrier(THREADS * len(DEVICES)), threading.Lock()
    workers: list[list[stress.Worker]] = []
    for device in DEVICES:
        with current(device):
            numbers = range(THREADS * device, THREADS * (device + 1))
            workers.append([stress.Worker(number, cases[device], together, one_at_a_time) for number in numbers])
            if GPU:
                torch.cuda.synchronize()
    everyone = [worker for of_device in workers for worker in of_device]
    deadline = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(len(everyone)) as pool:
        # worker.work enters its stream, which makes the stream's device the thread's current one.
        jobs = [
            pool.submit(worker.work, calls, deadline, planted=planted and worker is everyone[-1]) for worker in everyone
        ]
        for job in jobs:
            job.result()
    made = [sum(worker.calls.total() for worker in of_device) for of_device in workers]
    wrong = sum(int(worker.comparer.wrong[kind]) for worker in everyone for kind in (*KINDS, "graph"))
    return made, sum(worker.graph.replays for worker in everyone if worker.graph is not None), wrong


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rehearsal", action="store_true")
    given = parser.parse_args(arguments)
    checks.require_two_gpus()
    cases = [cases_of(device) for device in DEVICES]

    def planted() -> str:
        _, _, wrong = run(cases, 60, calls=500 if GPU else 20, planted=True)
        assert wrong == 1, f"of one wrong element that was planted {wrong} were found"
        return "found"

    def calls() -> str:
        made, replays, wrong = run(cases, given.seconds, calls=10**9)
        assert wrong == 0, f"{wrong} wrong elements in {made} calls"
        assert not GPU or min(made) >= LEAST, f"{made} calls in {given.seconds} s; at least {LEAST} on each were wanted"
        return f"{made[0]:,} and {made[1]:,} calls on the two, {replays:,} graph replays, 0 wrong"

    return checks.main([("one wrong element, planted", planted), ("calls on both at once", calls)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
