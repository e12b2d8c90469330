"""The gradients of rms_norm_rope are those of autograd through transformers' steps, and what has none says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pallas_norm_torch import rms_norm, rms_norm_rope, rope_statements
from pallas_norm_torch.programs import Program
from tests.interop.cases import DTYPES, OPTIONS, bits, draw
from tests.interop.fake_kernels import FakeKernel
from tests.interop.fake_kernels import made as made
from tests.interop.rope_cases import check, operands, rotated

Tensor = torch.Tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_of_the_rotation_is_that_of_autograd(dtype: torch.dtype) -> None:
    """Bit for bit, signs of zeros too."""
    y, _, cos, sin, *_ = operands(64, dtype)
    y = y.clone().requires_grad_()
    dr = draw(*y.shape, dtype=dtype, seed=5)
    dr[0, 0], dr[0, 1], cos[2], sin[3] = 0, -0.0, 0, 0
    (expected,) = torch.autograd.grad(rotated(y, cos, sin), y, dr)
    assert torch.equal(bits(rope_statements.rotated_back(dr, cos, sin)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_weights", [True, False], ids=["weights", "bare"])
def test_gradients_are_those_of_the_steps(dtype: torch.dtype, with_weights: bool) -> None:  # noqa: FBT001
    q, k, cos, sin, *weights = operands(64, dtype)
    leaves = [one.clone().requires_grad_() for one in (q, k, *(weights if with_weights else ()))]
    dq, dk = draw(*q.shape, dtype=dtype, seed=5), draw(*k.shape, dtype=dtype, seed=6)

    def steps(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        of_q, of_k = weights or (None, None)
        return rotated(rms_norm(q, of_q), cos, sin), rotated(rms_norm(k, of_k), cos, sin)

    def fused(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm_rope(q, k, cos, sin, *weights)

    expected = torch.autograd.grad(steps(*leaves), leaves, (dq, dk))
    for found in (
        torch.autograd.grad(fused(*leaves), leaves, (dq, dk)),
        torch.func.vjp(fused, *(one.detach() for one in leaves))[1]((dq, dk)),
    ):
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(bits(one), bits(other))
    half = torch.autograd.grad(fused(*leaves)[1], leaves[1], dk)[0]  # q's result is not used
    assert torch.equal(bits(half), bits(expected[1]))


def test_it_can_be_differentiated_twice() -> None:
    q, k, cos, sin, *weights = operands(8, torch.float32, tokens=(3,))
    leaves = [one.clone().requires_grad_() for one in (q, k, *weights)]

    def penalty(function: Any) -> tuple[Tensor, ...]:
        of_q, of_k = function(*leaves)
        gradients = torch.autograd.grad(of_q.pow(3).sum() + of_k.pow(2).sum() * 3, leaves, create_graph=True)
        return torch.autograd.grad(sum(one.pow(2).sum() for one in gradients), leaves)  # pyright: ignore

    def steps(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
        return rotated(rms_norm(q, q_weight), cos, sin), rotated(rms_norm(k, k_weight), cos, sin)

    for one, other in zip(
        penalty(lambda q, k, *weights: rms_norm_rope(q, k, cos, sin, *weights)), penalty(steps), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_angles_that_require_grad_are_constants_without_gradients() -> None:
    """An autograd.Function is told that they do under no_grad, too; a plain call asked nobody."""
    q, k, cos, sin, *weights = operands(64, torch.float32, tokens=(3, 4))
    expected = rms_norm_rope(q, k, cos, sin, *weights)
    angles = cos.clone().requires_grad_(), sin.clone().requires_grad_()
    calls: list[Any] = [
        rms_norm_rope,
        torch.compile(rms_norm_rope, backend="aot_eager", fullgraph=True),
        lambda *given: torch.ops.pallas_norm.rms_norm_rope(*given, *OPTIONS),
        torch.func.vmap(rms_norm_rope, in_dims=(0, 0, None, None, None, None)),
        torch.func.functionalize(rms_norm_rope),
    ]
    for call in calls:
        with torch.no_grad():
            found = call(q, k, *angles, *weights)
        assert all(torch.equal(bits(one), bits(other)) for one, other in zip(found, expected, strict=True))
        assert not any(one.requires_grad for one in found)
    with pytest.raises(NotImplementedError, match="cos or sin requires grad"):
        calls[3](q, k, *angles, *weights)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_what_has_no_derivative_says_so(made: dict[Program, FakeKernel]) -> None:
    q, k, cos, sin, *_ = operands(64, torch.float32)
    message = (
        "cos or sin requires grad; needed angles that are constants: detach both, or rotate what rms_norm returns in "
        "steps of your own"
    )
    for angles in ((cos.clone().requires_grad_(), sin), (cos, sin.clone().requires_grad_())):
        with pytest.raises(NotImplementedError) as raised:
            rms_norm_rope(q, k, *angles)
        assert str(raised.value) == message
        assert not made  # no kernel ran before
        with pytest.raises(NotImplementedError) as raised:
            torch.ops.pallas_norm.rms_norm_rope(q, k, *angles, None, None, *OPTIONS)
        assert str(raised.value) == message
        with torch.no_grad():
            check(q, k, *angles)
        made.clear()
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.func.jvp(lambda q: rms_norm_rope(q, k, cos, sin)[0], (q,), (q,))


@pytest.mark.parametrize("used", [0, 1])
def test_what_was_not_used_has_no_gradient(used: int) -> None:
    """Zeros times an infinity in the rows are NaN, and a gradient of zeros lets an optimiser's decay move a weight."""
    q, k, cos, sin, *weights = operands(64, torch.float32)
    (q, k)[1 - used][0, 0, 0, 3] = torch.inf
    given = [one.clone().requires_grad_() for one in (q, k, *weights)]
    results = rms_norm_rope(*given[:2], cos, sin, *given[2:])
    for create_graph in (False, True):
        loss = results[used].sum()
        found = torch.autograd.grad(loss, given, allow_unused=True, create_graph=create_graph, retain_graph=True)
        assert [one is not None for one in found] == [used == 0, used == 1] * 2
        assert all(one.isfinite().all() for one in found if one is not None)


def test_heads_require_grad_where_they_or_their_weight_do() -> None:
    q, k, cos, sin, *weights = operands(64, torch.float32)
    for at in range(4):
        given = [one.detach().clone() for one in (q, k, *weights)]
        given[at].requires_grad_()
        results = rms_norm_rope(*given[:2], cos, sin, *given[2:])
        assert [one.requires_grad for one in results] == [at in (0, 2), at in (1, 3)]
