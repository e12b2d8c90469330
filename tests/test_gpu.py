"""The kernels on a GPU: every width and dtype of the suite against the host replay, Hugging Face eager and float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from bench.accuracy import DTYPES, EPS, hf_steps, ordered
from bench.suite import ACCURACY_ELEMENTS, WIDTHS
from pallas_norm.regimes import backward_plan_for, plan_for

pytestmark = pytest.mark.gpu

norm = functools.partial(pallas_norm.rms_norm, eps=EPS, implementation="mosaic_gpu")


def draw(n: int, rows: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(n)
    x = (3 * rng.standard_normal((rows, n), dtype=np.float32)).astype(dtype)
    return x, (1 + 0.3 * rng.standard_normal(n)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
def test_outputs_equal_the_replay_and_rstd_is_within_its_bound(n: int, dtype: str) -> None:
    plan = plan_for(n, dtype)
    x, weight = draw(n, 3 * plan.block + 5, DTYPES[dtype])
    y, rstd = (np.asarray(value) for value in norm(x, weight, return_rstd=True))
    assert np.array_equal(ordered(y), ordered(hf_steps(x, weight, rstd)))
    rstd64 = 1 / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1) + np.float64(np.float32(EPS)))
    ulp = np.abs(rstd.astype(np.float64) - rstd64) / np.spacing(rstd64.astype(np.float32))
    assert ulp.max() <= 2 + plan.depth / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("n", WIDTHS)
def test_outputs_differ_from_hugging_face_eager_by_the_statistics_alone(n: int, dtype: str) -> None:
    """Both are the same roundings bit for bit, each of its own rstd: ours has the specification's sum and three
    roundings, that of HF eager torch's sum and its rsqrt. A share of differing outputs follows from how far apart
    those are; a bound of it, from random numbers, was exceeded by chance."""
    torch = pytest.importorskip("torch", reason="needs torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs transformers")
    x, weight = draw(n, -(-ACCURACY_ELEMENTS // n), DTYPES[dtype])
    y, rstd = (np.asarray(value) for value in norm(x, weight, return_rstd=True))
    module = llama.LlamaRMSNorm(n, eps=EPS)
    module.weight.data = torch.from_dlpack(jnp.asarray(weight))
    with torch.no_grad():
        wide = torch.from_dlpack(jnp.asarray(x)).to(torch.float32)
        eager = np.asarray(jnp.from_dlpack(module(torch.from_dlpack(jnp.asarray(x)))))
        eager_rstd = torch.rsqrt(wide.pow(2).mean(-1) + EPS).cpu().numpy()
    assert np.array_equal(ordered(y), ordered(hf_steps(x, weight, rstd)))
    assert np.array_equal(ordered(eager), ordered(hf_steps(x, weight, eager_rstd)))
    ulp = np.abs(rstd.astype(np.float64) - eager_rstd) / np.spacing(eager_rstd)
    assert ulp.max() <= 4 + plan_for(n, dtype).depth  # each within half of that of the exact one


@pytest.mark.parametrize("n", [128, 4096])
def test_rows_beyond_two_to_the_31_elements_are_right(n: int) -> None:
    rows = 2**31 // n + 5
    tail = 3 * plan_for(n, "bfloat16").block + 5
    x = jax.random.normal(jax.random.key(0), (rows, n), jnp.bfloat16)
    weight = jax.random.normal(jax.random.key(1), (n,), jnp.bfloat16)
    y, dx = norm(x, weight), jax.vjp(norm, x, weight)[1](x)[0]
    assert jnp.array_equal(y[-tail:], norm(x[-tail:], weight))
    assert jnp.array_equal(dx[-tail:], jax.vjp(norm, x[-tail:], weight)[1](x[-tail:])[0])


@pytest.mark.parametrize("n", [80, 128, 896, 1000, 4096, 4097, 16384, 65536, 131072])
def test_a_thousand_runs_of_forward_and_backward_give_the_same_bits(n: int) -> None:
    """A race shows as a moving bit: clusters of 2 and more at n = 131072, warpgroups that share a row from 16384."""
    rows = 2 * backward_plan_for(n, "bfloat16").programs + 7 if n <= 4096 else 300
    keys = jax.random.split(jax.random.key(n), 3)
    x, dy = (jax.random.normal(key, (rows, n), jnp.bfloat16) for key in keys[:2])
    weight = jax.random.normal(keys[2], (n,), jnp.bfloat16)

    @jax.jit
    def step(x: jax.Array, weight: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        y, pullback = jax.vjp(norm, x, weight)
        return (y, *pullback(dy))

    first = step(x, weight, dy)
    differing = jnp.int32(0)
    for _ in range(1000):
        again = step(x, weight, dy)
        differing += sum(jnp.sum(a.view(jnp.uint16) != b.view(jnp.uint16)) for a, b in zip(first, again, strict=True))
    assert int(differing) == 0


@pytest.mark.parametrize("n", [128, 896, 2048, 4096, 8192, 16384])
def test_gradients_are_no_further_from_float64_than_those_of_hugging_face_eager(n: int) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama", reason="needs transformers")
    rows = 2048
    x, weight = draw(n, rows, DTYPES["bfloat16"])
    dy = draw(n + 1, rows * (n + 1) // n, DTYPES["bfloat16"])[0].reshape(-1)[: rows * n].reshape(rows, n)
    ours = jax.vjp(norm, jnp.asarray(x), jnp.asarray(weight))[1](jnp.asarray(dy))
    module = llama.LlamaRMSNorm(n, eps=EPS)
    module.weight.data = torch.from_dlpack(jnp.asarray(weight))
    tensor = torch.from_dlpack(jnp.asarray(x)).requires_grad_()
    module(tensor).backward(torch.from_dlpack(jnp.asarray(dy)))
    eager = (tensor.grad, module.weight.grad)

    x64, w64, dy64 = (value.astype(np.float64) for value in (x, weight, dy))
    rstd = 1 / np.sqrt(np.mean(x64**2, axis=1, keepdims=True) + EPS)
    unit, g = x64 * rstd, dy64 * w64
    exact = rstd * (g - unit * np.mean(g * unit, axis=1, keepdims=True)), np.sum(dy64 * unit, axis=0)

    def error(value: np.ndarray, truth: np.ndarray) -> float:
        return float(np.linalg.norm(value.astype(np.float64) - truth) / np.linalg.norm(truth))

    for own, other, truth in zip(ours, eager, exact, strict=True):
        # Both round alike; the sums differ, so the errors agree to a small part of themselves and neither is
        # systematically larger.
        assert error(np.asarray(own), truth) <= 1.001 * error(other.float().cpu().numpy(), truth)
