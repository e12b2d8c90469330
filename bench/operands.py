"""The arrays of a case: one copy, which JAX and torch share."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .suite import KV_SHARE, Case

EPS = 1e-6
NAMES = {"forward": ("x",), "add": ("x", "residual"), "backward": ("x", "dy")}


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


class Operands:
    """x (rows, n), weight (n,), and what the operation has beside them; drawn once, deterministically."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.replays: Any = None  # of rounding.judge

    @property
    def tokens(self) -> int:
        return self.case.rows // self.case.heads

    @functools.cached_property
    def projection(self) -> jax.Array:
        """Of a case with heads: q, k and v of each token side by side, (tokens, (heads + 2 * key heads) * n)."""
        case = self.case
        columns = (case.heads + 2 * max(1, case.heads // KV_SHARE)) * case.n
        return _draw(case.n, (self.tokens, columns), case.dtype)

    @functools.cached_property
    def arrays(self) -> dict[str, jax.Array]:
        """Every operand as a contiguous array."""
        case = self.case
        shape = (case.rows, case.n)
        found = {}
        for seed, name in enumerate(NAMES[case.operation]):
            if case.heads and name == "x":
                found[name] = self.projection[:, : case.heads * case.n].reshape(shape)
            else:
                found[name] = _draw(case.n + seed, shape, case.dtype)
        noise = _draw(case.n + 7, (case.n,), "float32")
        return found | {"weight": (1 + 0.3 * noise).astype(case.dtype)}  # no weight of ones: it would hide a rounding

    @functools.cached_property
    def tensors(self) -> dict[str, Any]:
        """The same memory as torch tensors; with heads, x is (tokens, heads, n) inside the projection."""
        import torch

        case = self.case
        found = {
            name: torch.from_dlpack(value) for name, value in self.arrays.items() if not (case.heads and name == "x")
        }
        if case.heads:
            queries = torch.from_dlpack(self.projection)[:, : case.heads * case.n]
            found["x"] = queries.unflatten(1, (case.heads, case.n))
        return found


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)
