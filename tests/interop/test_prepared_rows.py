"""Where prepared calls read and write rows: at strides, at offsets, in place, or in a copy of their own."""

from __future__ import annotations

import pytest
import torch

from pallas_norm_torch import prepared, rms_norm
from pallas_norm_torch.programs import Program
from tests.interop.cases import DTYPES, assert_same, draw
from tests.interop.fake_kernels import FakeKernel, expected, made  # noqa: F401 (made is a fixture)

pytestmark = pytest.mark.usefixtures("made")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_strides_are_read_and_written_where_they_lie(
    dtype: torch.dtype,
    made: dict[Program, FakeKernel],  # noqa: F811
) -> None:
    tokens, heads, n = 5, 3, 128
    qkv = draw(tokens, heads + 2, n, dtype=dtype)
    weight, before = draw(n, dtype=dtype, seed=1), qkv.clone()
    for _ in range(2):
        assert_same(rms_norm(qkv[:, 1 : 1 + heads], weight), expected(before[:, 1 : 1 + heads], weight)[0])
    assert any(program.strided for program in made)
    rms_norm(qkv[:, 1 : 1 + heads], weight, out=qkv[:, 1 : 1 + heads])
    assert_same(qkv[:, 1 : 1 + heads], expected(before[:, 1 : 1 + heads], weight)[0])
    assert_same(qkv[:, :1], before[:, :1])
    assert_same(qkv[:, 1 + heads :], before[:, 1 + heads :])


def test_rows_that_no_kernel_can_read_are_copied(made: dict[Program, FakeKernel]) -> None:  # noqa: F811
    x, weight = draw(128, 6, dtype=torch.float32).t(), draw(128, dtype=torch.float32)
    assert not x.is_contiguous()
    assert_same(rms_norm(x, weight), expected(x, weight)[0])
    assert not any(program.strided for program in made)
    shifted = draw(128 * 6 + 1, dtype=torch.bfloat16)[1:].view(6, 128)
    assert_same(rms_norm(shifted), expected(shifted, None)[0])


@pytest.mark.parametrize("n", [40000, 65536, 131072])
def test_a_row_that_is_read_twice_is_not_written_where_out_lies(n: int, made: dict[Program, FakeKernel]) -> None:  # noqa: F811
    """In place at strides, y is a tensor of its own, without gaps: with the strides of `out` a launch wrote past its
    end, which memcheck found."""
    heads = draw(4, 5, n, dtype=torch.float32)[:, 1:4]
    right = expected(heads.clone(), None)[0]
    rms_norm(heads, out=heads)
    assert_same(heads, right)
    ((_, _, named),) = [found for program, kernel in made.items() if program.strided for found in kernel.launches]
    assert named["y"] != named["x"]


@pytest.mark.parametrize(
    ("n", "count", "in_place"), [(128, 64, True), (128, 65, False), (4096, 65, True), (32, 12, False)]
)
def test_rows_that_every_warp_holds_are_not_written_in_place(
    n: int,
    count: int,
    *,
    in_place: bool,
    made: dict[Program, FakeKernel],  # noqa: F811
) -> None:
    """Those that fill no block: the four warps do not wait for each other, and one that came late read what another had
    written. racecheck, which slows them down, showed the norm of a norm."""
    x = draw(count, n, dtype=torch.float32)
    rms_norm(x, out=x)
    (kernel,) = made.values()
    ((_, _, named),) = kernel.launches
    assert (named["y"] == named["x"]) == in_place


def test_rows_at_other_offsets_are_other_layouts() -> None:
    """Of the same shape and strides: only the address of the first row differs."""
    wide, weight = draw(6, 1024, dtype=torch.bfloat16), draw(128, dtype=torch.bfloat16, seed=1)
    for start in (0, 4, 8, 16, 72, 76):
        x = wide[:, start : start + 128]
        assert_same(rms_norm(x), expected(x, None)[0])
        for _ in range(2):
            assert_same(rms_norm(x, weight), expected(x, weight)[0])


def test_rows_at_strides_that_were_seen_are_launched_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer way, with all that it looks at, would take its time at every call."""
    wide, weight = draw(6, 1024, dtype=torch.bfloat16), draw(128, dtype=torch.bfloat16, seed=1)
    x = wide[:, 8:136]
    rms_norm(x, weight)
    monkeypatch.setattr(prepared.ForwardCall, "_unusual", lambda *_: pytest.fail("the longer way"))
    y = rms_norm(x, weight)
    assert y.is_contiguous()
    assert_same(y, expected(x, weight)[0])


def _aligned(elements: int) -> torch.Tensor:
    memory = torch.zeros(elements + 256, dtype=torch.bfloat16)
    return memory[-memory.data_ptr() % 256 // 2 :][:elements].copy_(draw(elements, dtype=torch.bfloat16))


WRITTEN_TWICE = {
    "out over later rows of x": "out overlaps x without being x",
    "one row for all": "out is .*, so several of its elements are one",
    "the weight is a row": "out overlaps weight, which every row reads",
    "a weight at strides inside": "out overlaps weight, which every row reads",
}


@pytest.mark.parametrize("prepared_before", [False, True])
@pytest.mark.parametrize("case", WRITTEN_TWICE)
def test_a_call_that_was_prepared_before_refuses_what_the_first_one_does(case: str, *, prepared_before: bool) -> None:
    """It looked at the first and the last byte of tensors with gaps, and in place at nothing: a kernel would have read
    rows, or the weight, that it had written."""
    n, memory, weight = 128, _aligned(2 * 64 * 128), draw(128, dtype=torch.bfloat16, seed=1)
    x = memory.view(64, 2 * n)[:, :n]
    out = memory[64 * n :].view(64, n)
    if case == "one row for all":
        x = out = memory[:n].expand(16, n)
    elif case == "the weight is a row":
        x = out = memory.view(128, n)
        weight = x[3]
    elif case == "a weight at strides inside":
        x, out, weight = draw(2, n, dtype=torch.bfloat16), memory[: 2 * n].view(2, n), memory[: 4 * n : 4]
    if prepared_before:
        rms_norm(x.clone(), weight.clone())
        rms_norm(x.clone(), weight.clone(), out=torch.empty_like(x.contiguous()))
    before = memory.clone()
    with pytest.raises(ValueError, match=WRITTEN_TWICE[case]):
        rms_norm(x, weight, out=out)
    assert torch.equal(memory, before)
