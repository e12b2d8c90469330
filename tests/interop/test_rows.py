"""Where a kernel finds the rows of a tensor: the arithmetic of the strides, against what torch itself reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm_torch import rows

N = 16


def memory(elements: int = 1 << 14) -> torch.Tensor:
    """Elements that are their own index, from an address that is a multiple of 256 bytes."""
    raw = torch.arange(elements + 64, dtype=torch.float32)
    start = -(raw.data_ptr() // 4) % 64
    return raw[start : start + elements]


BASE = memory()
FIRST = int(BASE[0])


def read(tensor: torch.Tensor, group: int, place: rows.Strides) -> np.ndarray:
    """The rows that a kernel would read, by the formula of rows.Strides alone."""
    aligned = tensor.data_ptr() - tensor.data_ptr() % rows.ALIGNMENT - BASE.data_ptr()
    count = tensor.numel() // N
    starts = [aligned + place.offset + (r // group) * place.outer + (r % group) * place.inner for r in range(count)]
    assert all(start % 4 == 0 for start in starts)
    return np.array([[FIRST + start // 4 + column for column in range(N)] for start in starts], dtype=np.float32)


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    strides = [draw(st.sampled_from([0, 4, 16, 20, 32, 64, 128, 160, 256])) for _ in shape]
    return BASE.as_strided((*shape, N), (*strides, 1), draw(st.sampled_from([0, 4, 8, 40, 64])) + BASE.storage_offset())


@given(views())
def test_the_rows_are_those_that_torch_reads(view: torch.Tensor) -> None:
    places = rows.strided({"x": view}, vec=4)
    if places is None:
        axes = [(size, stride) for size, stride in zip(view.shape[:-1], view.stride(), strict=False) if size > 1]
        assert len(axes) > 2  # anything less can be read where it is
        return
    np.testing.assert_array_equal(read(view, places.group, places.of["x"]), view.reshape(-1, N).numpy())


@pytest.mark.parametrize(("stride", "offset"), [(18, 0), (20, 2)])
def test_rows_between_vectors_are_copied(stride: int, offset: int) -> None:
    view = BASE.as_strided((8, N), (stride, 1), BASE.storage_offset() + offset)
    assert rows.strided({"x": view}, vec=4) is None
    assert rows.strided({"x": view}, vec=2) is not None
    copy = rows.ready(view[:, :8])
    assert copy.is_contiguous()
    assert rows.aligned(copy) or copy.data_ptr() % 64 == 0  # torch's CPU memory is aligned to 64 bytes


def test_columns_that_are_not_neighbours_are_copied() -> None:
    assert rows.strided({"x": BASE[: 8 * N * 2].view(8, 2 * N)[:, ::2]}, vec=1) is None


def test_tensors_of_one_call_share_their_axes() -> None:
    x = BASE[: 6 * 5 * 2 * N].view(6, 5, 2 * N)[:, 1:4, :N]
    y = torch.empty(6, 3, N)
    places = rows.strided({"x": x, "y": y}, vec=4)
    assert places is not None
    assert places.group == 3
    assert places.of["x"][1:] == (5 * 2 * N * 4, 2 * N * 4)
    assert places.of["y"][1:] == rows.fresh(N * 4, 3)[1:] == (3 * N * 4, N * 4)
    flat = rows.strided({"x": BASE[: 8 * N].view(8, N)}, vec=4)
    assert flat is not None
    assert (flat.group, flat.of["x"].outer) == (1, N * 4)
    assert rows.fresh(N * 4, 1) == (0, N * 4, 0)
