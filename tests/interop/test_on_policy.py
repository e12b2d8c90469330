"""On-policy training (docs/on-policy.md) on a GPU: a trainer in JAX and a rollout in torch, eager and in CUDA graphs,
with the bits that XLA gives on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch

from pallas_norm_torch import add_rms_norm, explain, rms_norm
from tests import computed, oracle
from tests.interop.cases import assert_same

pytestmark = pytest.mark.gpu

EPS = 1e-6
ROWS = (1, 2, 3, 8, 17, 64, 256, 1000, 4096)
SHAPES = [
    *((n, 4096, dtype) for n in (80, 128, 4096) for dtype in ("bf16", "f16", "f32")),
    (5120, 1000, "bf16"),
    (16384, 256, "bf16"),
    (131072, 17, "bf16"),
]
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def drawn(n: int, count: int, dtype: str) -> dict[str, Any]:
    rng = np.random.default_rng((n, count))
    sizes = np.ldexp(np.float32(1), rng.integers(-4, 5, (count, 1)))
    names = ("x", "residual", "dy", "ds")
    given = {name: sizes * rng.standard_normal((count, n), dtype=np.float32) for name in names}
    given["weight"] = 1 + np.float32(0.3) * rng.standard_normal(n, dtype=np.float32)
    return {name: value.astype(oracle.DTYPES[dtype]) for name, value in given.items()}


def to_torch(value: Any) -> torch.Tensor:
    """On the GPU. torch knows no bfloat16 of NumPy's."""
    if value.dtype == oracle.BF16:
        return torch.from_numpy(value.view(np.int16).copy()).view(torch.bfloat16).cuda()
    return torch.from_numpy(np.array(value)).cuda()


@pytest.mark.parametrize(("n", "count", "dtype"), SHAPES)
def test_the_trainer_and_the_rollout_have_the_same_bits(n: int, count: int, dtype: str) -> None:
    given = drawn(n, count, dtype)
    specified = computed.results(given, EPS, residual=True, implementation="xla", device=jax.devices("cpu")[0])
    paths = ["mosaic_gpu", *(["xla"] if n <= 4096 else [])]  # of long rows XLA compiles for minutes
    for path in paths:
        trained = computed.results(given, EPS, residual=True, implementation=path)
        for name, value in specified.items():
            oracle.assert_same(trained[name], value)

    assert explain(n, TORCH[dtype], "cuda").startswith("direct launch")
    wanted = {name: to_torch(value) for name, value in specified.items()}
    x, residual, weight, dy, ds = (to_torch(given[name]) for name in ("x", "residual", "weight", "dy", "ds"))
    for rows in (rows for rows in (*ROWS, count) if rows <= count):
        last = slice(count - rows, None)
        y, s = add_rms_norm(x[last], residual[last], weight, EPS)
        assert_same(s, wanted["s"][last])
        assert_same(y, wanted["y"][last])
        assert_same(rms_norm(s, weight, EPS), y)
        leaf = x[last].clone().requires_grad_()
        (dx,) = torch.autograd.grad(add_rms_norm(leaf, residual[last], weight, EPS), leaf, (dy[last], ds[last]))
        assert_same(dx, wanted["dx"][last])
    assert_graphs(x, residual, weight, wanted)
    assert_padded(x, residual, weight, wanted)


def assert_graphs(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, wanted: dict[str, Any]) -> None:
    """Captured once for each batch size, as serving engines do, and replayed with other tokens."""
    for rows in (rows for rows in (1, 8, 64, 256) if rows <= len(x)):
        tokens, sums = x[:rows].clone(), residual[:rows].clone()
        add_rms_norm(tokens, sums, weight, EPS)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y, s = add_rms_norm(tokens, sums, weight, EPS)
        for first in (0, len(x) - rows):
            at = slice(first, first + rows)
            tokens.copy_(x[at])
            sums.copy_(residual[at])
            graph.replay()
            assert_same(s, wanted["s"][at])
            assert_same(y, wanted["y"][at])


def assert_padded(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, wanted: dict[str, Any]) -> None:
    """Sequences of which one ends early, and all tokens packed in one, in another order."""
    half = len(x) // 2
    padded = [torch.full((2, len(x) - half, x.shape[-1]), torch.nan, dtype=x.dtype, device="cuda") for _ in range(2)]
    for batch, values in zip(padded, (x, residual), strict=True):
        batch[0, :half], batch[1] = values[:half], values[half:]
    y, s = add_rms_norm(*padded, weight, EPS)
    for found, name in ((y, "y"), (s, "s")):
        assert_same(torch.cat([found[0, :half], found[1]]), wanted[name])
    order = torch.randperm(len(x), device="cuda")
    y, s = add_rms_norm(x[order][None], residual[order][None], weight, EPS)
    assert_same(y[0], wanted["y"][order])
    assert_same(s[0], wanted["s"][order])


@pytest.mark.parametrize("rows", [1, 100, 3000])
def test_dweight_is_that_of_jax_for_as_many_rows(rows: int) -> None:
    """Its order of additions is a function of rows, n and dtypes, so both kernels have it; other row counts have other
    bits."""
    given = drawn(4096, rows, "bf16")
    leaf = to_torch(given["weight"]).requires_grad_()
    (found,) = torch.autograd.grad(rms_norm(to_torch(given["x"]), leaf, EPS), leaf, to_torch(given["dy"]))

    @jax.jit
    def trained(x: Any, weight: Any, dy: Any) -> Any:
        from pallas_norm import rms_norm as norm

        return jax.vjp(lambda weight: norm(x, weight, eps=EPS, implementation="mosaic_gpu"), weight)[1](dy)[0]

    assert_same(found, to_torch(np.asarray(trained(given["x"], given["weight"], given["dy"]))))
