"""Whether an output lies in the memory of an operand: against the sets of addresses, with one storage and with two."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm_torch._out import takes_y
from pallas_norm_torch._overlap import may_overlap, overlaps_itself

MEMORY = np.zeros(4096, dtype=np.float32)


def addresses(tensor: torch.Tensor) -> list[int]:
    index = np.indices(tensor.shape).reshape(tensor.ndim, -1)
    return (tensor.data_ptr() + 4 * np.array(tensor.stride()) @ index).tolist()


@st.composite
def views(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    strides = [draw(st.sampled_from([0, 1, 2, 8, 12, 16, 24, 32, 64, 224])) for _ in shape[1:]] + [1]
    start = draw(st.integers(0, 200))
    storage = torch.from_numpy(MEMORY[start:])  # each a storage of its own, of the same memory
    return storage.as_strided(shape, strides)


@given(views(), views())
def test_what_is_said_to_be_apart_is_apart(left: torch.Tensor, right: torch.Tensor) -> None:
    if not may_overlap(left, right):
        assert not set(addresses(left)) & set(addresses(right))


@given(views())
def test_what_is_said_not_to_overlap_itself_does_not(view: torch.Tensor) -> None:
    if not overlaps_itself(view):
        assert len(set(addresses(view))) == view.numel()


def test_slices_of_a_fused_projection_are_apart_and_others_are_not() -> None:
    fused = torch.from_numpy(MEMORY[: 6 * 5 * 32]).view(6, 5, 32)
    query, key, value = fused[:, :3], fused[:, 3:4], fused[:, 4:]
    assert not may_overlap(query[:, :1], key)
    assert not may_overlap(key, value)
    assert may_overlap(query, fused[:, 2:5])
    assert not may_overlap(fused[0], fused[1])
    assert not overlaps_itself(query)
    # Rows of 32 at strides of 224 and 64: 160 behind is 32 before a row of the next group.
    base = torch.from_numpy(MEMORY)
    left, right = base.as_strided((3, 2, 32), (224, 64, 1)), base[160:].as_strided((3, 2, 32), (224, 64, 1))
    assert set(addresses(left)) & set(addresses(right))
    assert may_overlap(left, right)


def test_windows_over_one_another_overlap_themselves() -> None:
    assert overlaps_itself(torch.zeros(128).unfold(0, 64, 1))
    assert overlaps_itself(torch.zeros(64).expand(3, 64))
    assert not overlaps_itself(torch.zeros(4, 64).T)


def test_the_short_way_writes_to_aligned_memory_apart_from_the_operands_and_no_other() -> None:
    # takes_y named a constant that its file had not imported: on a GPU, out= raised NameError.
    memory = torch.zeros(1024)
    start = -memory.data_ptr() % 256 // 4
    x, weight, out, odd = (memory[start + at : start + at + 64] for at in (0, 64, 128, 208))
    assert takes_y(out, x, weight, torch.float32)
    assert takes_y(out, x, None, torch.float32)
    assert not takes_y(odd, x, weight, torch.float32)
    assert not takes_y(x, x, weight, torch.float32)
    assert not takes_y(weight, x, weight, torch.float32)
    assert not takes_y(out, x, weight, torch.bfloat16)
    wide = memory[start : start + 512].view(4, 128)  # rows at strides reach over more bytes than they have
    assert not takes_y(memory[start + 256 : start + 512].view(4, 64), wide[:, :64], None, torch.float32)
    assert takes_y(memory[start + 512 : start + 768].view(4, 64), wide[:, :64], None, torch.float32)
    assert not takes_y(out, x, memory[start : start + 256].view(64, 4)[:, 0], torch.float32)
    with torch.inference_mode():
        frozen = torch.zeros(1024)
    assert not takes_y(frozen[-frozen.data_ptr() % 256 // 4 :][:64], x, weight, torch.float32)
