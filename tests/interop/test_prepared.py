"""Prepared calls, with fake kernels that compute from the memory whose addresses they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pallas_norm._spec import Spec
from pallas_norm_torch import add_rms_norm, prepared, rms_norm, statements
from pallas_norm_torch.programs import Program
from tests.interop.cases import DTYPES, assert_same, draw
from tests.interop.fake_kernels import FakeKernel, expected, made  # noqa: F401 (made is a fixture)

pytestmark = pytest.mark.usefixtures("made")
# A warp's rows with some left over, one warpgroup's, a pipeline's, a cluster's.
SHAPES = [(1, 33), (37, 128), (64, 96), (5, 1000), (3, 4096), (2, 32768), (3, 131072)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), SHAPES)
def test_every_way_in_gives_the_kernel_the_right_memory(rows: int, n: int, dtype: torch.dtype) -> None:
    x, residual, weight = draw(rows, n, dtype=dtype), draw(rows, n, dtype=dtype, seed=1), draw(n, dtype=dtype, seed=2)
    y, _ = expected(x, weight)
    for _ in range(2):  # prepared, and then found
        assert_same(rms_norm(x, weight), y)
        assert_same(rms_norm(x), expected(x, None)[0])
        out = torch.full_like(y, torch.nan)
        assert rms_norm(x, weight, out=out) is out
        assert_same(out, y)
        in_place = x.clone()
        assert rms_norm(in_place, weight, out=in_place) is in_place
        assert_same(in_place, y)
        for found, right in zip(add_rms_norm(x, residual, weight), expected(x, weight, residual), strict=True):
            assert_same(found, right)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n"), [(37, 128), (300, 1000), (5, 4096), (3, 32768)])
def test_gradients_come_from_two_launches(
    rows: int,
    n: int,
    dtype: torch.dtype,
    made: dict[Program, FakeKernel],  # noqa: F811
) -> None:
    x, weight, dy = draw(rows, n, dtype=dtype), draw(n, dtype=dtype, seed=1), draw(rows, n, dtype=dtype, seed=2)
    y, _, rstd = statements.forward(x, None, weight, Spec(), with_rstd=True)
    assert rstd is not None
    dx, dweight = statements.backward(x, weight, rstd, dy, None, Spec(), with_dweight=True)
    for _ in range(2):
        x_leaf, weight_leaf = x.clone().requires_grad_(), weight.clone().requires_grad_()
        found = rms_norm(x_leaf, weight_leaf)
        assert_same(found.detach(), y)
        before = sum(len(kernel.launches) for kernel in made.values())
        gradients = torch.autograd.grad(found, (x_leaf, weight_leaf), dy)
        assert_same(gradients[0], dx)
        assert dweight is not None
        scale = dweight.float().abs().max()
        assert (gradients[1].float() - dweight.float()).abs().max() <= 2.0**-7 * scale  # added in another order
        after = sum(len(kernel.launches) for kernel in made.values())
        assert after - before == 2


def test_a_gradient_of_what_is_not_trained_takes_no_sum(made: dict[Program, FakeKernel]) -> None:  # noqa: F811
    x, weight = draw(4, 128, dtype=torch.float32).requires_grad_(), draw(128, dtype=torch.float32)
    rms_norm(x, weight).sum().backward()
    assert {program.kind for program in made} == {"forward", "backward"}
    assert not any("dweight" in program.outputs for program in made)


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
def test_the_residual_form_trains_whichever_result_is_used(used: tuple[int, ...]) -> None:
    x, residual, weight = (
        draw(*shape, dtype=torch.float32, seed=i) for i, shape in enumerate([(6, 128)] * 2 + [(128,)])
    )
    leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    results = add_rms_norm(*leaves)
    found = torch.autograd.grad(sum(results[i].square().sum() for i in used), leaves, allow_unused=True)
    others = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
    s = others[0] + others[1]
    y = others[2] * (s * torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + 1e-6))
    right = torch.autograd.grad(sum((y, s)[i].square().sum() for i in used), others, allow_unused=True)
    for mine, theirs in zip(found, right, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_numbers_equal_to_those_that_were_checked_are_checked_too() -> None:
    x, weight = draw(4, 128, dtype=torch.float32), draw(128, dtype=torch.float32)
    rms_norm(x, weight, 1.0)
    with pytest.raises(TypeError, match="eps"):
        rms_norm(x, weight, True)  # noqa: FBT003


def test_no_rows_are_no_launch(made: dict[Program, FakeKernel]) -> None:  # noqa: F811
    x, weight = torch.empty(0, 128, requires_grad=True), torch.ones(128, requires_grad=True)
    y = rms_norm(x, weight)
    assert y.shape == (0, 128)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
    assert not any(kernel.launches for kernel in made.values())


def test_one_call_for_each_kernel_and_device() -> None:
    x, weight = draw(4, 128, dtype=torch.float32), draw(128, dtype=torch.float32)
    rms_norm(x, weight)
    rms_norm(x[:2], weight)
    assert len(prepared._forward) == 1


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_persistent_grid_has_no_more_ctas_than_its_plan(
    made: dict[Program, FakeKernel],  # noqa: F811
    *,
    with_residual: bool,
) -> None:
    """Each takes several rows then; FakeKernel compares the counts with the plan's."""
    rows, n = 140, 32768
    x, weight = draw(rows, n, dtype=torch.bfloat16), draw(n, dtype=torch.bfloat16, seed=1)
    residual = x if with_residual else None
    for training in (False, True):
        leaf = x.clone().requires_grad_(training)
        found = rms_norm(leaf, weight) if residual is None else add_rms_norm(leaf, residual, weight)[0]
        assert_same(found.detach(), expected(x, weight, residual)[0])
    persistent = [program for program in made if program.plan is not None and program.plan.programs]
    assert persistent or with_residual
    for program in persistent:
        assert all(grid <= program.plan.programs * program.plan.cluster for _, grid, _ in made[program].launches)


def test_threads_with_other_row_counts_share_no_rstd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two looks at the tensor that rstd is made like, another thread may have put another one there."""
    weight = draw(128, dtype=torch.float32).requires_grad_()
    right = prepared._empty_like

    def interrupted(like: torch.Tensor, **options: Any) -> torch.Tensor:
        call = next(call for call in prepared._forward.values() if call.kernel.with_rstd)
        call._rstd = torch.empty(4096)
        return right(like, **options)

    rms_norm(draw(64, 128, dtype=torch.float32), weight)
    monkeypatch.setattr(prepared, "_empty_like", interrupted)
    x = draw(64, 128, dtype=torch.float32, seed=3)
    y = rms_norm(x, weight)
    (saved,) = [tensor for tensor in y.grad_fn.saved_tensors if tensor.dim() == 1 and tensor.shape != weight.shape]
    assert saved.shape == (64,)


@pytest.mark.parametrize("shape", [(128,), (2, 4, 128), (3, 37, 128)])
def test_autograd_saves_the_same_of_every_way(shape: tuple[int, ...]) -> None:
    """Checkpointing compares what a forward pass and its rerun save: a mode around the first one took another way."""
    x, weight = draw(*shape, dtype=torch.float32).requires_grad_(), draw(128, dtype=torch.float32, seed=1)
    wide = torch.zeros(*shape[:-1], 256)[..., :128].requires_grad_()  # whose rows lie at strides

    def saved(function: Any, *operands: Any) -> list[tuple[Any, ...]]:
        found: list[tuple[Any, ...]] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            found.append((tensor.shape, tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(*operands)
        return found

    operator = torch.ops.pallas_norm
    by_operator = saved(lambda: operator.rms_norm(x, weight, 1e-6, True, 0.0))  # noqa: FBT003
    added = saved(lambda: operator.add_rms_norm(x, x, weight, 1e-6, True, 0.0))  # noqa: FBT003
    for _ in range(2):
        assert saved(rms_norm, x, weight) == saved(rms_norm, wide, weight) == by_operator
        assert saved(add_rms_norm, x, x, weight) == saved(add_rms_norm, wide, wide, weight) == added
    assert {shape for shape, _ in by_operator} == {x.shape, weight.shape, x.shape[:-1]}
