"""Torch's own statements, for CPU tensors and where no kernel can be launched: Hugging Face's bits forward, the replay
from their own rstd, gradients within bounds derived from float64; and JAX is not in the way."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from bench import torch_order
from pallas_norm._spec import Spec
from pallas_norm_torch import _library, add_rms_norm, explain, rms_norm, statements
from tests import oracle, specified
from tests.interop.cases import DTYPES, assert_same, bits, draw, hugging_face

WIDTHS = (1, 2, 7, 8, 31, 32, 33, 80, 128, 1000, 4096, 4097)
WEIGHTS = (*DTYPES, None)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPTIONS = tuple(
    Spec(eps=eps, cast_before_scale=cast, weight_offset=offset)
    for eps, cast, offset in ((1e-6, True, 0.0), (1e-5, False, 1.0), (0.0, False, 0.0), (1e-6, True, 1.0))
)


def host(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().cpu()
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def gemma(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """GemmaRMSNorm.forward."""
    wide = x.float()
    output = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (output * (1.0 + weight.float())).type_as(x)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_are_hugging_face_s(dtype: torch.dtype, n: int, device: str) -> None:
    x, residual = (draw(37, n, dtype=dtype, device=device, seed=seed) for seed in range(2))
    for weight_dtype in WEIGHTS:
        weight = None if weight_dtype is None else draw(n, dtype=weight_dtype, device=device, seed=2)
        y, s, rstd = statements.forward(x, None, weight, Spec(), with_rstd=True)
        assert (s, rstd is None) == (None, False)
        assert_same(y, hugging_face(x, weight))
        y, s, rstd = statements.forward(x, residual, weight, Spec(), with_rstd=False)
        assert rstd is None
        assert s is not None
        assert_same(s, x + residual)
        assert_same(y, hugging_face(x + residual, weight))
    weight = draw(n, dtype=dtype, device=device, seed=2)
    y, *_ = statements.forward(x, None, weight, Spec(1e-5, False, 1.0), with_rstd=False)  # noqa: FBT003
    assert_same(y, gemma(x, weight, 1e-5))


@pytest.mark.parametrize("spec", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [*itertools.product(DTYPES, WEIGHTS)], ids=str)
def test_the_replay_from_their_own_rstd(dtype: torch.dtype, weight_dtype: torch.dtype | None, spec: Spec) -> None:
    if weight_dtype is None and spec.weight_offset:
        spec = Spec(spec.eps, spec.cast_before_scale)
    n, options = 200, {"cast_before_scale": spec.cast_before_scale, "weight_offset": spec.weight_offset}
    x, weight = draw(31, n, dtype=dtype), None if weight_dtype is None else draw(n, dtype=weight_dtype, seed=1)
    x[3] = 0
    x[4, 5], x[5, 6] = torch.inf, torch.nan
    x[6] *= 2.0**-20
    y, rstd = torch.ops.pallas_norm.rms_norm(x, weight, spec.eps, *options.values())
    oracle.assert_rstd(host(rstd), host(x), spec.eps, additions=n)
    weighted = None if weight is None else host(weight)
    oracle.assert_same(host(y), oracle.replay(host(x), weighted, host(rstd), **options))
    assert_same(rms_norm(x, weight, spec.eps, **options), y)


@pytest.mark.parametrize("spec", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [*itertools.product(DTYPES, WEIGHTS)], ids=str)
def test_gradients_are_within_the_bounds(dtype: torch.dtype, weight_dtype: torch.dtype | None, spec: Spec) -> None:
    if weight_dtype is None and spec.weight_offset:
        spec = Spec(spec.eps, spec.cast_before_scale)
    rows, n = 61, 200
    x = draw(rows, n, dtype=dtype)
    weight = None if weight_dtype is None else draw(n, dtype=weight_dtype, seed=1)
    y, _, rstd = statements.forward(x, None, weight, spec, with_rstd=True)
    assert rstd is not None
    dy = draw(rows, n, dtype=y.dtype, seed=2)
    options = {"cast_before_scale": spec.cast_before_scale, "weight_offset": spec.weight_offset}
    dx, dweight = statements.backward(x, weight, rstd, dy, None, spec, with_dweight=True)
    weighted = None if weight is None else host(weight)
    oracle.assert_within(host(dx), *oracle.input_gradient64(host(x), weighted, host(rstd), host(dy), n, **options))
    if weight is None:
        assert dweight is None
    else:
        assert dweight is not None
        expected = oracle.weight_gradient64(
            host(x), host(rstd), host(dy), host(weight).dtype, cast_before_scale=spec.cast_before_scale
        )
        oracle.assert_within(host(dweight), *expected)
        alone, nothing = statements.backward(x, weight, rstd, dy, None, spec, with_dweight=False)
        assert nothing is None
        assert_same(alone, dx)
    ds = draw(rows, n, dtype=dtype, seed=3)
    both, _ = statements.backward(x, weight, rstd, dy, ds, spec, with_dweight=False)
    assert_same(both, dx + ds)


def test_the_residual_form_has_the_gradients_of_the_two_steps() -> None:
    """In torch's statements nothing is fused, so its bits are those of the two steps."""
    x, residual, dy, ds = (draw(17, 96, dtype=torch.bfloat16, seed=seed) for seed in range(4))
    weight = draw(96, dtype=torch.bfloat16, seed=4)
    fused = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    found = torch.autograd.grad(add_rms_norm(*fused), fused, (dy, ds))
    s, last = (x + residual).requires_grad_(), weight.clone().requires_grad_()
    dx, dweight = torch.autograd.grad(rms_norm(s, last), (s, last), dy)
    for gradient, expected in zip(found, (dx + ds, dx + ds, dweight), strict=True):
        assert_same(gradient, expected)


def test_an_offset_of_zero_keeps_the_sign_of_zero() -> None:
    x, weight = torch.ones(2, 8), torch.full((8,), -0.0)
    for cast in (True, False):
        assert bool((bits(rms_norm(x, weight, cast_before_scale=cast)) == bits(torch.tensor(-0.0))).all())


def test_the_gradients_are_those_that_hugging_face_s_autograd_gives_where_sums_are_exact() -> None:
    """x = +-1 has rstd 1, and small integers add without rounding."""
    x = (torch.randint(0, 2, (16, 64)) * 2 - 1).to(torch.bfloat16)
    weight, dy = (torch.randint(-2, 3, shape).to(torch.bfloat16) for shape in ((64,), (16, 64)))

    def gradients(norm: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        return torch.autograd.grad(norm(*leaves, 0.0), leaves, dy)

    for found, expected in zip(gradients(rms_norm), gradients(lambda *o: hugging_face(*o[:2], eps=o[2])), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("view", ["transposed", "columns", "flipped", "expanded"])
def test_rows_at_strides_have_the_bits_of_contiguous_ones(view: str) -> None:
    """torch adds a row in another order where the last axis is not contiguous."""
    base = draw(512, 300, dtype=torch.float32)
    x = {"transposed": base.T, "columns": base[:, 7:], "flipped": base.flip(1), "expanded": base[:1].expand(512, 300)}
    x = x[view]
    weight = draw(x.shape[-1], dtype=torch.float32, seed=1)
    leaves = [(tensor.detach().requires_grad_(), weight.clone().requires_grad_()) for tensor in (x, x.contiguous())]
    (y, expected) = (rms_norm(*pair) for pair in leaves)
    assert y.is_contiguous()
    assert_same(y.detach(), expected.detach())
    dy = draw(x.shape[-1], len(x), dtype=torch.float32, seed=2).T
    found, wanted = (
        torch.autograd.grad(z, pair, d) for z, pair, d in ((y, leaves[0], dy), (expected, leaves[1], dy.contiguous()))
    )
    for gradient, right in zip(found, wanted, strict=True):
        assert_same(gradient, right)


@pytest.mark.parametrize("name", ["strided", "unbound", "transposed"])
def test_what_was_measured_in_the_specified_order_has_its_bits(name: str) -> None:
    for rows, n in ((1, 4096), (5, 80), (3, 1000)):
        x, weight = draw(rows, n, dtype=torch.bfloat16), draw(n, dtype=torch.bfloat16, seed=1)
        y, _ = specified.forward(host(x), host(weight), torch_order.EPS)
        oracle.assert_same(host(torch_order.ways()[name](x, weight)), y)


def test_where_no_kernel_can_be_launched_torch_s_statements_are_taken_and_told() -> None:
    assert _library.path(torch.zeros(2, 64)) is statements
    said = explain(64, torch.bfloat16, "cpu")
    assert said == "torch's own statements on cpu, with Hugging Face's rounding: the kernels need a CUDA device"
    assert explain(64, torch.bfloat16, "meta") == "nothing is computed on meta: the result has a shape and a dtype"
    assert explain(64, torch.bfloat16, "mps") == (
        "nothing: rms_norm takes tensors on a CPU or a CUDA device, and raises for mps"
    )


def test_a_device_that_is_not_there_is_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain(64, torch.bfloat16, "cuda") == "nothing: torch sees no CUDA device in this process"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert explain(64, torch.bfloat16, "cuda:7") == "nothing: torch sees 1 CUDA device in this process, and no cuda:7"


@pytest.mark.gpu
@pytest.mark.parametrize("n", [16, 131073])
def test_lengths_without_a_kernel_are_captured_into_a_graph(n: int) -> None:
    x, weight = draw(5, n, dtype=torch.bfloat16, device="cuda"), draw(n, dtype=torch.bfloat16, device="cuda")
    rms_norm(x, weight)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
        y = rms_norm(x, weight)
    x.copy_(draw(5, n, dtype=torch.bfloat16, device="cuda", seed=9))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(y, hugging_face(x, weight))


WITHOUT_JAX = """
import gc, os, resource, sys, torch
import pallas_norm_torch
from pallas_norm_torch import RMSNorm, add_rms_norm, rms_norm

def step(length):
    x, norm = torch.randn(2, length, 64, requires_grad=True), RMSNorm(64)
    y, s = add_rms_norm(norm(x), x, norm.weight)
    torch.autograd.grad((y * s).sum(), (x, norm.weight))
    rms_norm(x.detach(), out=x.detach().clone())
    rms_norm(x.detach()[..., :20])

step(1)
from jax._src import compiler, xla_bridge
assert not xla_bridge.backends_are_initialized(), "a call started JAX's backends"
compiler.compile_or_get_cached = None  # whoever compiles with XLA fails
for length in range(2, 50):
    step(length)
gc.collect()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for length in range(50, 250):
    step(length)
gc.collect()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 8_000, f"200 new lengths took {grown} KB"
assert not xla_bridge.backends_are_initialized()
print("before", flush=True)
if (child := os.fork()) == 0:
    torch.set_num_threads(1)  # as a worker of torch's DataLoader does
    step(7)
    sys.stdout.write("child ")
    sys.stdout.flush()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent")
"""


@pytest.mark.slow
def test_no_call_starts_jax_keeps_memory_or_hinders_a_fork() -> None:
    """XLA kept 3 to 5 MB for each row count, and a fork afterwards hung for ever."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX], env=environment, capture_output=True, text=True, timeout=300
    )
    assert (script.returncode, script.stderr) == (0, "")
    assert script.stdout == "before\nchild parent\n"


@pytest.mark.parametrize("with_residual", [False, True])
def test_the_way_of_jax_is_taken_only_when_asked_for(*, with_residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from pallas_norm_torch import through_jax

    called = []
    right = through_jax.forward
    monkeypatch.setattr(through_jax, "forward", lambda *a, **o: called.append(a) or right(*a, **o))
    x, weight = draw(3, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16)
    operands = (x, x, weight) if with_residual else (x, weight)
    norm: Any = add_rms_norm if with_residual else rms_norm
    norm(*operands)
    assert not called
    norm(*operands, implementation="jax")
    assert len(called) == 1
    leaves = [tensor.clone().requires_grad_() for tensor in operands]
    results = norm(*leaves, implementation="jax")
    assert len(called) == 2
    total = (
        sum(result.float().square().sum() for result in results) if with_residual else results.float().square().sum()
    )
    with pytest.raises(
        NotImplementedError, match=r"^create_graph=True for a norm with implementation='jax', which has"
    ):
        torch.autograd.grad(total, leaves, create_graph=True)


def test_out_by_the_way_of_jax() -> None:
    x, out = draw(3, 64, dtype=torch.bfloat16), torch.full((3, 64), torch.nan, dtype=torch.bfloat16)
    assert rms_norm(x, implementation="jax", out=out) is out
    assert_same(out, rms_norm(x, implementation="jax"))
    flat = torch.zeros(5 * 64)
    with pytest.raises(ValueError, match=r"^out overlaps x without being x"):
        rms_norm(flat[64:].view(4, 64), implementation="jax", out=flat[:256].view(4, 64))
    assert np.isfinite(host(out).astype(np.float32)).all()
