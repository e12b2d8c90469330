"""pallas_norm.dlpack of torch tensors, and of a torch weight with the array of another framework."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pallas_norm import dlpack
from pallas_norm_torch import rms_norm
from tests.interop.cases import DEVICES, assert_same, draw, way_of_jax


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torch_gets_torch_on_the_same_device(dtype: torch.dtype, device: str) -> None:
    x, weight = draw(3, 64, dtype=dtype, device=device), draw(64, dtype=dtype, device=device)
    y = dlpack.rms_norm(x, weight, eps=1e-5)
    assert y.device == x.device
    assert_same(y, rms_norm(x, weight, 1e-5))
    assert_same(dlpack.rms_norm(x), rms_norm(x))


def test_a_parameter_is_the_weight_of_a_numpy_array() -> None:
    x, weight = draw(3, 64, dtype=torch.float32), torch.nn.Parameter(draw(64, dtype=torch.float32, seed=1))
    y = dlpack.rms_norm(x.numpy(), weight)
    assert isinstance(y, np.ndarray)
    assert_same(torch.from_numpy(y), rms_norm(x, weight.detach(), **way_of_jax(x)))


def test_a_numpy_array_is_the_weight_of_a_tensor() -> None:
    x, weight = draw(3, 64, dtype=torch.float32), draw(64, dtype=torch.float32, seed=1)
    y = dlpack.rms_norm(x, weight.numpy())
    assert isinstance(y, torch.Tensor)
    assert_same(y, rms_norm(x, weight))


def test_the_dtypes_are_named_for_torch_too() -> None:
    x, weight = draw(3, 64, dtype=torch.bfloat16), draw(64, dtype=torch.float32, seed=1)
    y = dlpack.rms_norm(x, weight, out_dtype="bfloat16", unit_dtype="float16", round_weight=True)
    assert_same(y, rms_norm(x, weight, out_dtype=torch.bfloat16, unit_dtype=torch.float16, round_weight=True))
