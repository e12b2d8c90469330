"""to_jax, to_torch and call_jax on tensors of any kind, and on what is no tensor: the same elements, or a documented
error."""

from __future__ import annotations

import re
from typing import Any

import jax
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm_torch import call_jax, to_jax, to_torch
from tests.anything import ANYTHING
from tests.interop.tensors import ODD, OF_ANY_DTYPE, WARNINGS, N, attempt, memory, plain, views
from tests.strategies import examples

Tensor = torch.Tensor
pytestmark = pytest.mark.filterwarnings(*WARNINGS)


@examples(2.0)
@given(OF_ANY_DTYPE | ODD | ANYTHING | views((3, N), torch.float32), st.booleans())
def test_to_jax_and_back(value: Any, copy: bool) -> None:  # noqa: FBT001
    before = memory(value)
    array, error = attempt(to_jax, value, copy=copy)
    if error is not None:
        assert re.match(r"tensor (is|has)\b", str(error)), error
        return
    assert isinstance(value, Tensor)
    assert (array.shape, str(array.dtype)) == (value.shape, str(value.dtype).removeprefix("torch."))
    assert (array.size == 0 or array.unsafe_buffer_pointer() == value.data_ptr()) != (copy and array.size > 0)
    back = to_torch(array)
    assert back.dtype == value.dtype
    assert torch.equal(plain(back).reshape(-1).view(torch.uint8), plain(value).reshape(-1).view(torch.uint8))
    assert memory(value) == before


JAX_DTYPES = st.sampled_from(("int4", "uint2", "int1", "float4_e2m1fn", "float8_e4m3", "float8_e5m2", "bool", "int32"))


@given(JAX_DTYPES.map(lambda dtype: jax.numpy.ones((2, 3), dtype)) | ANYTHING)
def test_to_torch(value: Any) -> None:
    tensor, error = attempt(to_torch, value)
    if error is not None:
        assert str(error).startswith("array is "), error
    else:
        assert (str(tensor.dtype), tensor.shape) == (f"torch.{value.dtype}", value.shape)


@given(st.recursive(OF_ANY_DTYPE | ODD | ANYTHING, lambda trees: st.lists(trees, max_size=3) | st.tuples(trees, trees)))
def test_call_jax(tree: Any) -> None:
    """Trees of anything come back as they were, tensors as tensors of the same dtype and shape."""
    result, error = attempt(call_jax, lambda operands: operands, tree)
    if error is not None:
        assert re.search("tensor|operands|array|parameter", str(error)), error
        return
    leaves, found = jax.tree.leaves(tree), jax.tree.leaves(result)
    assert len(leaves) == len(found)
    for leaf, other in zip(leaves, found, strict=True):
        if isinstance(leaf, Tensor):
            assert (other.shape, other.dtype) == (leaf.shape, leaf.dtype)
        else:
            assert other is leaf or isinstance(other, Tensor)
