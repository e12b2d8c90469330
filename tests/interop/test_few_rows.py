"""Prepared calls of few rows launch the schedule for few, with fake kernels that count what they are launched with."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pallas_norm_torch import add_rms_norm, direct, explain, launch, rms_norm
from pallas_norm_torch.programs import Program
from tests.interop.cases import assert_same, draw
from tests.interop.fake_kernels import FakeKernel, expected, made  # noqa: F401 (made is a fixture)

pytestmark = pytest.mark.usefixtures("made")
BF16 = torch.bfloat16
WAYS = ("plain", "added", "trained", "without a weight", "out=")


def launched(made: dict[Program, FakeKernel]) -> list[tuple[bool, int]]:  # noqa: F811
    """(whether that is the schedule for few, CTAs) of each launch of a forward kernel."""
    forward = [kernel for program, kernel in made.items() if program.kind == "forward"]
    return [(kernel.program.few, grid) for kernel in forward for _, grid, _ in kernel.launches]


def call(way: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if way == "added":
        for found, right in zip(add_rms_norm(x, x, weight), expected(x, weight, x), strict=True):
            assert_same(found, right)
        return
    options: dict[str, Any] = {"out": torch.empty_like(x)} if way == "out=" else {}
    given = None if way == "without a weight" else weight
    leaf = x.clone().requires_grad_(way == "trained")
    assert_same(rms_norm(leaf, given, **options).detach(), expected(x, given)[0])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("rows", "n", "few", "ctas"),
    # One CTA a row or a cluster a row; of a persistent grid no more than there are rows, or than it holds.
    [
        *((4, 4096, True, 4), (5, 4096, False, 5), (3, 32768, True, 24)),
        *((16, 131072, True, 128), (17, 131072, False, 120)),
        # Many of these are four in the warps of a CTA, or one in each where they fill none.
        *((8, 896, True, 8), (7, 896, True, 7), (1, 1000, True, 1), (9, 896, False, 3)),
    ],
)
def test_few_rows_take_their_own_kernel_each_way_in(
    rows: int,
    n: int,
    few: bool,  # noqa: FBT001
    ctas: int,
    way: str,
    made: dict[Program, FakeKernel],  # noqa: F811
) -> None:
    x, weight = draw(rows, n, dtype=BF16), draw(n, dtype=BF16, seed=1)
    for _ in range(2):  # prepared, and then found
        call(way, x, weight)
    assert launched(made) == [(few, ctas)] * 2


def test_the_kernel_for_few_is_compiled_at_the_first_of_them(made: dict[Program, FakeKernel]) -> None:  # noqa: F811
    weight = draw(4096, dtype=BF16)
    rms_norm(draw(64, 4096, dtype=BF16), weight)
    assert [program.few for program in made] == [False]
    rms_norm(draw(1, 4096, dtype=BF16), weight)
    assert [program.few for program in made] == [False, True]


def test_a_capture_before_the_first_of_few_rows_takes_the_kernel_that_there_is(
    made: dict[Program, FakeKernel],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing can be compiled while a CUDA graph is captured: prompts warmed up, and the decoding step captured."""
    x, weight = draw(64, 131072, dtype=BF16), draw(131072, dtype=BF16, seed=1)
    rms_norm(x, weight)
    monkeypatch.setattr(launch, "captures", lambda device: True)
    assert_same(rms_norm(x[:16], weight), expected(x[:16], weight)[0])
    monkeypatch.setattr(launch, "captures", lambda device: False)
    assert_same(rms_norm(x[:16], weight), expected(x[:16], weight)[0])
    assert launched(made) == [(False, 120), (False, 120), (True, 128)]


def test_a_kernel_for_few_that_is_refused_ends_all_of_that_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """As any of its forms, and `explain` says so."""
    right = launch.kernel

    def refusing(program: Program, device: int) -> Any:
        if program.few:
            raise launch.Unavailable("it is Sunday")
        return right(program, device)

    monkeypatch.setattr(launch, "kernel", refusing)
    weight = draw(4096, dtype=BF16)
    many, one = draw(64, 4096, dtype=BF16), draw(1, 4096, dtype=BF16)
    for x in (many, one, one):
        assert_same(rms_norm(x, weight), expected(x, weight)[0])
    assert direct._refused[4096, -1, BF16] == "it is Sunday"


def test_explain_tells_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "unavailable", lambda device: None)
    both = "compiled once for every row count, and for up to {} rows once more, shared by more warps with the same bits"
    assert explain(4096, BF16, "cuda:0").endswith(both.format(4))
    assert explain(32768, BF16, "cuda:0").endswith(both.format(64))
    assert explain(128, BF16, "cuda:0").endswith("compiled once for every row count")
