"""Derivatives as torch takes them: first, second, of each sample, of a batch, checkpointed; forward mode is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.autograd import forward_ad

from pallas_norm_torch import add_rms_norm, rms_norm
from tests.interop.cases import DEVICES, OPTIONS, assert_same, draw, hugging_face, leaf

# Whatever of torch is imported first, by forward mode, may still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


def test_per_sample_gradients() -> None:
    x, weight = draw(5, 3, 64, dtype=torch.float32), draw(64, dtype=torch.float32)

    def loss(norm: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda weight, x: norm(x, weight).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss(rms_norm), argnums=(0, 1)), in_dims=(None, 0))(weight, x)
    expected = torch.func.vmap(torch.func.grad(loss(hugging_face), argnums=(0, 1)), in_dims=(None, 0))(weight, x)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_gradcheck_in_float32(device: str) -> None:
    """First and second order against differences; float32 bounds the step from below, and so the agreement."""
    x, weight = leaf(3, 40, dtype=torch.float32, device=device), leaf(40, dtype=torch.float32, device=device)
    steps = {"eps": 2**-7, "atol": 2e-2, "rtol": 1e-2, "nondet_tol": 0.0}
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradcheck(rms_norm, (x, weight), **steps)
    with pytest.warns(UserWarning, match="double precision"):
        assert torch.autograd.gradgradcheck(rms_norm, (x, weight), **(steps | {"atol": 5e-2, "rtol": 2e-2}))


def unrounded(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Hugging Face's formula in the dtype of x, without eps."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


@pytest.mark.parametrize("device", DEVICES)
def test_the_second_derivative_is_that_of_the_formula(device: str) -> None:
    x, weight = leaf(3, 64, dtype=torch.float32, device=device), leaf(64, dtype=torch.float32, device=device)

    def second(norm: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(norm(x, weight).sin().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum((gradient * gradient).sum() for gradient in first), (x, weight))

    for found, expected in zip(second(rms_norm), second(hugging_face), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_second_derivative_of_exact_operands_is_exact(device: str) -> None:
    """x = +-1 has rstd = 1, and 64 divides without rounding: with small integers every step is exact in float32."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 2, (3, 64), generator=generator) * 2.0 - 1
    weight, factor = (torch.randint(-3, 4, (64,), generator=generator).float() for _ in range(2))

    def second(norm: Callable[..., torch.Tensor], *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, weight, factor = (operand.clone() for operand in operands)
        leaves = x.requires_grad_(), weight.requires_grad_()
        first = torch.autograd.grad((factor * norm(*leaves) ** 2).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((gradient * gradient).sum() for gradient in first), leaves)

    def hessian(norm: Callable[..., torch.Tensor], x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        weight, factor = others
        return torch.func.jacrev(torch.func.jacrev(lambda x: (factor * norm(x, weight) ** 2).sum()))(x[0])

    def ours(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, 0.0)

    single = [operand.to(device) for operand in (x, weight, factor)]
    double = [operand.double() for operand in (x, weight, factor)]
    for found, expected in zip(second(ours, *single), second(unrounded, *double), strict=True):
        assert torch.equal(found.cpu().double(), expected)
        assert found.abs().max() > 1000
    found = hessian(ours, *single)
    assert found.shape == (64, 64)
    assert torch.equal(found.cpu().double(), hessian(unrounded, *double))
    assert torch.equal(found, found.T)
    assert found.abs().max() > 10


def test_forward_mode_is_refused_and_never_zero() -> None:
    x = draw(3, 64, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"forward-mode differentiation \(torch.func.jvp\) of rms_norm"):
        torch.func.jvp(rms_norm, (x,), (x,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match=r"\(torch.autograd.forward_ad\) of rms_norm is not implemented"):
            rms_norm(dual)
        with pytest.raises(NotImplementedError, match=r"forward_ad"):
            add_rms_norm(x, dual)
        with pytest.raises(NotImplementedError, match=r"jvp"):
            torch.ops.pallas_norm.rms_norm(dual, None, *OPTIONS)
        assert rms_norm(x).shape == x.shape  # no tangent, no refusal


def test_a_tangent_of_the_gradient_is_refused_too() -> None:
    x, weight = leaf(3, 64, dtype=torch.float32), leaf(64, dtype=torch.float32)
    y, dy = rms_norm(x, weight), draw(3, 64, dtype=torch.float32)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        torch.autograd.grad(y, x, forward_ad.make_dual(dy, dy))


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_gradients_is_a_loop(device: str) -> None:
    x, weight = leaf(3, 64, dtype=torch.float32, device=device), leaf(64, dtype=torch.float32, device=device)
    batch = draw(5, 3, 64, dtype=torch.float32, device=device)
    y = rms_norm(x, weight)
    found = torch.autograd.grad(y, (x, weight), batch, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(batch):
        for gradient, expected in zip(found, torch.autograd.grad(y, (x, weight), dy, retain_graph=True), strict=True):
            torch.testing.assert_close(gradient[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_where_y_is_unused_the_sum_s_gradient_passes_whatever_is_in_the_rows(device: str) -> None:
    x = torch.zeros(2, 64, device=device)
    x[0, 3] = torch.inf
    x.requires_grad_()
    residual, weight = leaf(2, 64, dtype=torch.float32, device=device), leaf(64, dtype=torch.float32, device=device)
    for norm in (add_rms_norm, lambda *operands: torch.ops.pallas_norm.add_rms_norm(*operands, 0.0, True, 0.0)[:2]):  # noqa: FBT003
        _, s = norm(x, residual, weight)
        dx, dresidual, dweight = torch.autograd.grad(s.sum(), (x, residual, weight), allow_unused=True)
        assert_same(dx, torch.ones_like(x))
        assert_same(dresidual, torch.ones_like(x))
        assert dweight is None


@pytest.mark.parametrize("device", DEVICES)
def test_the_sum_requires_grad_where_its_operands_do(device: str) -> None:
    """Not because the weight does: a residual stream would be kept, and gone through backward, for nothing."""
    x, weight = draw(2, 64, dtype=torch.float32, device=device), leaf(64, dtype=torch.float32, device=device)
    for norm in (add_rms_norm, lambda *operands: torch.ops.pallas_norm.add_rms_norm(*operands, 0.0, True, 0.0)[:2]):  # noqa: FBT003
        y, s = norm(x, x, weight)
        assert y.requires_grad
        assert not s.requires_grad
        (y * s).sum().backward()
        for operands in ((x, x.clone().requires_grad_()), (x.clone().requires_grad_(), x)):
            assert norm(*operands, weight)[1].requires_grad


def test_the_second_derivative_with_a_residual() -> None:
    x, residual = (leaf(3, 64, dtype=torch.float32, seed=seed) for seed in range(2))
    weight = leaf(64, dtype=torch.float32)

    def second(norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        y, s = norm(x, residual, weight)
        first = torch.autograd.grad(y.sin().sum() + s.cos().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum((gradient * gradient).sum() for gradient in first), (x, residual, weight))

    plain = second(lambda x, residual, weight: (hugging_face(x + residual, weight), x + residual))
    for found, expected in zip(second(add_rms_norm), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    x, weight = leaf(6, 64), leaf(64)
    dy = draw(6, 64, dtype=torch.bfloat16, seed=2)
    plain = torch.autograd.grad(rms_norm(x, weight), (x, weight), dy)
    again = torch.autograd.grad(checkpoint(rms_norm, x, weight, use_reentrant=False), (x, weight), dy)
    for found, expected in zip(again, plain, strict=True):
        assert_same(found, expected)
