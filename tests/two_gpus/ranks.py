"""Two processes, a GPU each (or a CPU each, by gloo): every check runs on both, and both have to pass it."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib
import multiprocessing
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.two_gpus import checks, ports

WORLD = 2
TIMEOUT = datetime.timedelta(seconds=120)


@dataclasses.dataclass(frozen=True)
class Rank:
    number: int
    device: torch.device
    mesh: Any

    def gathered(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What every rank has."""
        found = [torch.empty_like(tensor) for _ in range(WORLD)]
        dist.all_gather(found, tensor.contiguous())
        return found


def work(number: int, port: int, module: str, outcomes: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {name: str(number) for name in ("RANK", "LOCAL_RANK")} | {"WORLD_SIZE": str(WORLD)}
    gpus = torch.cuda.device_count() >= WORLD
    device = torch.device("cuda", number) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", rank=number, world_size=WORLD, timeout=TIMEOUT, device_id=device)
    else:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", rank=number, world_size=WORLD, timeout=TIMEOUT)
    from torch.distributed.device_mesh import init_device_mesh

    rank = Rank(number, device, init_device_mesh(device.type, (WORLD,)))
    found = importlib.import_module(module).CHECKS
    of_rank = [(name, functools.partial(check, rank)) for name, check in found]
    outcomes.put((len(of_rank), *checks.run(of_rank, label=f"rank {number}: ")))
    dist.barrier()
    dist.destroy_process_group()


def main(module: str) -> int:
    """Of a module with CHECKS, functions of a Rank. A rank that dies takes the other one with it, and raises."""
    checks.require_two_gpus()
    outcomes = multiprocessing.get_context("spawn").SimpleQueue()
    spawn(work, (ports.free(), module, outcomes), nprocs=WORLD)
    wanted, passed, failed = (sum(counts) for counts in zip(*(outcomes.get() for _ in range(WORLD)), strict=True))
    return checks.finish(passed, failed, wanted=wanted)


if __name__ == "__main__":
    sys.exit(main(f"tests.two_gpus.{sys.argv[1]}"))
