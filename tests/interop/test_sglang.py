"""SGLang's fused addition and its layer, replaced: the bits of its own code, but for a sum that it rounds late."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pallas_norm_torch import add_rms_norm, rms_norm, rmsnorm_hf
from pallas_norm_torch.sglang import forward_cuda, fused_add_rmsnorm
from tests.interop.cases import DEVICES, assert_same, draw
from tests.interop.fake_kernels import FakeKernel, made  # noqa: F401  a fixture

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N = 96


def forward_native(self: Any, x: torch.Tensor, residual: Any = None, more: Any = None) -> Any:
    """sglang 0.5.23, srt/layers/layernorm.py: RMSNorm.forward_native, without its partial variance."""
    orig_dtype = self.override_orig_dtype or x.dtype
    x = x.to(torch.float32)
    if residual is not None:
        x = x + residual.to(torch.float32)
        if more is not None:
            x = x + more.to(torch.float32)
        residual = x.clone() if self.fp32_residual else x.to(orig_dtype)
    variance = x.pow(2).mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    x = self.weight * x.to(orig_dtype) if self.cast_x_before_out_mul else (x * self.weight).to(orig_dtype)
    return x if residual is None else (x, residual)


def layer(weight_dtype: torch.dtype, **flags: Any) -> Any:
    """What forward_cuda looks at of a layer."""
    defaults = {"cast_x_before_out_mul": False, "fp32_residual": False, "override_orig_dtype": None}
    sizes = {"hidden_size": N, "variance_size_override": None, "variance_epsilon": 1e-5}
    return SimpleNamespace(weight=draw(N, dtype=weight_dtype, seed=5), **sizes, **defaults | flags)


@pytest.mark.parametrize("x_dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("weight_dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("override", [None, BF16, F32], ids=str)
def test_the_layer_has_the_bits_of_its_own_torch_code(
    x_dtype: torch.dtype, weight_dtype: torch.dtype, override: torch.dtype | None
) -> None:
    x = draw(3, 5, N, dtype=x_dtype)
    for cast, residual_dtype in itertools.product((False, True), (None, x_dtype, F32)):
        norm = layer(weight_dtype, cast_x_before_out_mul=cast, fp32_residual=True, override_orig_dtype=override)
        residual = None if residual_dtype is None else draw(3, 5, N, dtype=residual_dtype, seed=1)
        found, right = forward_cuda(norm, x, residual), forward_native(norm, x, residual)
        for one, other in zip(*(value if residual is not None else (value,) for value in (found, right)), strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("cast", [False, True])
def test_a_rounded_sum_is_rounded_before_it_is_normalised(cast: bool) -> None:  # noqa: FBT001
    norm, x, residual = layer(BF16, cast_x_before_out_mul=cast), *(draw(64, N, dtype=BF16, seed=i) for i in range(2))
    y, s = forward_cuda(norm, x, residual)
    assert_same(s, x + residual)
    assert_same(y, forward_native(norm, x + residual))
    own, stored = forward_native(norm, x, residual)
    assert_same(stored, s)
    assert not torch.equal(own, y)  # of the unrounded sum
    more = draw(64, N, dtype=BF16, seed=2)
    assert_same(forward_cuda(norm, x, residual, more)[1], x + (residual + more))


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(("rows", "n"), [(64, 128), (65, 128), (7, 4096)])
def test_the_fused_addition_writes_to_its_operands(
    rows: int,
    n: int,
    cast: bool,  # noqa: FBT001
    made: dict[Any, FakeKernel],  # noqa: F811
) -> None:
    for residual_dtype in (BF16, F32):
        x, residual = draw(rows, n, dtype=BF16), draw(rows, n, dtype=residual_dtype, seed=1)
        weight = torch.nn.Parameter(draw(n, dtype=BF16, seed=2))
        options = {"unit_dtype": BF16 if cast else F32, "out_dtype": BF16}
        y, s = add_rms_norm(x, residual, weight.detach(), 1e-5, **options)
        assert fused_add_rmsnorm(x, residual, weight, 1e-5, cast_x_before_out_mul=cast) is None
        assert_same(x, y)
        assert_same(residual, s)
    assert len(made) >= 2


def test_what_the_layer_refuses_or_computes_itself() -> None:
    norm, x = layer(BF16), draw(4, N, dtype=BF16)
    with pytest.raises(ValueError, match=r"^Expected hidden_size to be 96, but found: 64$"):
        forward_cuda(norm, x[:, :64])
    assert forward_cuda(norm, x[:0]).shape == (0, N)
    assert [value.shape for value in forward_cuda(norm, x[:0], x[:0])] == [(0, N)] * 2
    norm.variance_size_override, norm.forward_native = 64, lambda *given: ("native", *given)
    assert forward_cuda(norm, x, x)[0] == "native"
    norm.variance_size_override = None
    assert_same(forward_cuda(norm, x), rms_norm(x, norm.weight, 1e-5, cast_before_scale=False))


@pytest.mark.parametrize("device", DEVICES)
def test_sglang_s_function(device: str) -> None:
    x, weight = draw(5, 96, dtype=torch.bfloat16, device=device), draw(96, dtype=torch.bfloat16, device=device)
    expected = rms_norm(x, weight, 1e-5)
    assert_same(rmsnorm_hf(x, weight, 1e-5), expected)
    out = torch.empty_like(x)
    assert rmsnorm_hf(x, weight, 1e-5, out) is out
    assert_same(out, expected)
    assert rmsnorm_hf(x[:0], weight).shape == (0, 96)
    assert rmsnorm_hf(x, torch.nn.Parameter(weight)).requires_grad is False
