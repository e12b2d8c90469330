"""A hundred thousand direct-launch calls after which no memory is taken that was not before.

`python -m tests.gpu_proof.growth --calls 100000`. To be run with nothing else on the GPU: the device's free memory is
everybody's. Prints the samples as JSON and fails if the host's or the device's memory grew.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
from typing import Any

import torch

from pallas_norm_torch import RMSNorm
from tests.gpu_proof.batches import KINDS, Pattern
from tests.gpu_proof.every_launch import DEVICE
from tests.gpu_proof.expected import Case, every_case

GPU = DEVICE == "cuda"
SAMPLES = 10
WARM = 3  # samples until everything that is kept is there
# More than this may not be there after the calls. An object of 64 bytes that each of them left behind would be 6.4 MB.
# torch's pool may be split in another way than before; what was allocated from it, and what is outside of it, not.
MOST = {"host": 4 << 20, "allocated": 0, "outside_torch": 0, "pool": 64 << 20}


def memory() -> dict[str, int]:
    gc.collect()
    with open("/proc/self/statm") as statm:
        found = {"host": int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")}
    if GPU:
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        pool = torch.cuda.memory_reserved()
        found |= {"allocated": torch.cuda.memory_allocated(), "pool": pool, "outside_torch": total - free - pool}
    return found


def train(module: RMSNorm, x: torch.Tensor) -> None:
    """Through autograd, which saves tensors for the backward pass."""
    module(x.detach().requires_grad_()).sum().backward()
    module.weight.grad = None


def calls(patterns: list[Pattern], modules: list[RMSNorm], draw: random.Random, count: int) -> int:
    made, kinds, shares = 0, list(KINDS), [share for _, _, share in KINDS.values()]
    while made < count:
        kind = draw.choices(kinds, shares)[0]
        KINDS[kind][0](draw.choice(patterns))
        made += KINDS[kind][1]
        which = draw.randrange(len(modules))
        train(modules[which], patterns[which].xs[0])
        made += 1
    return made


def grown(samples: list[dict[str, int]]) -> dict[str, int]:
    """Bytes of each kind of memory between the last sample and the largest of those while it was getting warm."""
    warm = samples[: WARM + 1]
    return {kind: samples[-1][kind] - max(sample[kind] for sample in warm) for kind in samples[-1]}


def too_much(growth: dict[str, int]) -> dict[str, int]:
    return {kind: size for kind, size in growth.items() if size > MOST[kind]}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_proof.growth", description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000, help="after the first ones, which are three tenths more")
    parser.add_argument("--rehearsal", action="store_true", help="without a GPU")
    given = parser.parse_args(arguments)
    if not GPU and not given.rehearsal:
        parser.error("there is no GPU; --rehearsal does without, and proves nothing")
    draw, cases = random.Random(0), every_case()
    patterns = [Pattern.of(case, draw, ragged=GPU) for case in cases]
    modules = [module_of(case) for case in cases]
    samples, made = [memory()], 0
    for _ in range(WARM + SAMPLES):
        made += calls(patterns, modules, draw, -(-given.calls // SAMPLES))
        samples.append(memory())
    growth = grown(samples)
    wrong = too_much(growth)
    print(json.dumps({"device": DEVICE, "calls": made, "samples": samples, "grown_bytes": growth}, indent=1))
    print(
        f"{made} calls; bytes more than before: {growth}; {f'too much: {sorted(wrong)}' if wrong else 'nothing kept'}"
    )
    return 1 if wrong else 0


def module_of(case: Case) -> Any:
    module = RMSNorm(case.n, dtype=case.weight.dtype, device=case.weight.device)
    with torch.no_grad():
        module.weight.copy_(case.weight)
    return module


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
