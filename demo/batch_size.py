"""The plain formula under jax.jit rounds differently at different batch sizes; rms_norm does not."""

from __future__ import annotations

import torch

from demo import norms
from demo.activations import Case, activations
from demo.compare import device, share, ulps

SHAPES = ((512, 1024), (4096, 1024))


@torch.no_grad()
def rounding_by_batch_size() -> list[tuple[str, float, float]]:
    """(rows x n, share of the plain formula's outputs off, share of ours off), against the host's replay."""
    found = []
    for rows, n in SHAPES:
        case = Case("plain formula", "", rows, n, torch.bfloat16, 1e-6)
        x, weight = (tensor.to(device()) for tensor in activations(case))
        ours, rstd = norms.from_jax(case, x, weight)
        expected = norms.replay(case, x, rstd, weight)
        plain = norms.plain_jax(case, x, weight)
        found.append((f"{rows} x {n}", share(ulps(plain, expected)), share(ulps(ours, expected))))
    return found
