"""What torch's own machinery sees: operators that pass opcheck, compile, export, batch and differentiate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from pallas_norm_torch import add_rms_norm, rms_norm
from tests.interop.cases import DEVICES, assert_same, draw, hugging_face

# Whatever of torch is imported first, by inductor or by forward mode, may still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

OPTIONS = (1e-6, True, 0.0)


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", seed: int = 0) -> torch.Tensor:
    return draw(*shape, dtype=dtype, device=device, seed=seed).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("weighted", [True, False])
def test_opcheck(weighted: bool, device: str) -> None:  # noqa: FBT001
    ops = torch.ops.pallas_norm
    x, residual = leaf(3, 5, 64, device=device), leaf(3, 5, 64, device=device, seed=1)
    weight = leaf(64, dtype=torch.float32, device=device) if weighted else None
    y, rstd = ops.rms_norm(x, weight, *OPTIONS)
    backward = [tensor if tensor is None else tensor.detach() for tensor in (x, weight, rstd, y, residual)]
    for operator, operands in (
        (ops.rms_norm, (x, weight, *OPTIONS)),
        (ops.add_rms_norm, (x, residual, weight, *OPTIONS)),
        (ops.rms_norm_backward, (*backward, *OPTIONS, weighted)),
    ):
        results = torch.library.opcheck(operator.default, operands)
        assert len(results) == 4
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_frame_for_every_batch_size(backend: str, device: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend(backend)

    def model(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, s = add_rms_norm(rms_norm(x * 2, weight), residual, weight)
        return y + s

    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=True)
    weight = leaf(64, device=device)
    frames = set()
    for rows in (2, 3, 5, 9):
        x, residual = leaf(rows, 7, 64, device=device), leaf(rows, 7, 64, device=device, seed=1)
        found, expected = compiled(x, residual, weight), model(x, residual, weight)
        assert_same(found, expected)
        dy = draw(rows, 7, 64, dtype=torch.bfloat16, device=device, seed=2)
        operands = (x, residual, weight)
        for gradient, wanted in zip(
            torch.autograd.grad(found, operands, dy), torch.autograd.grad(expected, operands, dy), strict=True
        ):
            torch.testing.assert_close(gradient, wanted, rtol=2**-6, atol=2**-6)  # the multiplication may be fused
        frames.add(counter.frame_count)
    # torch looks at a frame twice where a float, such as eps, comes in as an argument. No batch size makes it a third.
    assert frames == {counter.frame_count}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_out_and_refusals_under_compile() -> None:
    torch._dynamo.reset()
    x, weight = draw(4, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def into(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, out=out)

    out = torch.empty_like(x)
    assert_same(into(x, out), rms_norm(x, weight))
    assert_same(out, rms_norm(x, weight))
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for message, call in {
        r"weight has shape \(32,\) but the last axis of x has length 64": lambda: compiled(x, weight[:32]),
        r"out is bfloat16\[3,4,64\] .*; needed the shape of x": lambda: into(x, torch.empty(3, 4, 64, dtype=x.dtype)),
        r"out is float32\[4,64\] .*; needed bfloat16": lambda: into(x, torch.empty(4, 64)),
        r"out= was given while an operand requires grad": lambda: into(leaf(4, 64), torch.empty_like(x)),
        r"cast_before_scale is int; needed True or False": lambda: compiled(x, weight, cast_before_scale=1),
        r"weight_offset is 1.0 but weight is None": lambda: compiled(x, weight_offset=1.0),
    }.items():
        torch._dynamo.reset()
        with pytest.raises(Exception, match=message):
            call()


def test_export() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return rms_norm(x, weight)

    x, weight = draw(4, 64, dtype=torch.bfloat16), draw(64, dtype=torch.bfloat16)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(Model(), (x, weight), dynamic_shapes={"x": {0: rows}, "weight": {}})
    assert any("pallas_norm.rms_norm" in str(node.target) for node in program.graph.nodes)
    longer = draw(9, 64, dtype=torch.bfloat16)
    assert_same(program.module()(longer, weight), rms_norm(longer, weight))


@pytest.mark.parametrize("shape", [(64,), (3, 64), (0, 64), (2, 3, 96)])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32, None])
def test_fake_results_are_like_the_real_ones(weight_dtype: torch.dtype | None, shape: tuple[int, ...]) -> None:
    x = draw(*shape, dtype=torch.bfloat16)
    weight = None if weight_dtype is None else draw(shape[-1], dtype=weight_dtype)
    real = (rms_norm(x, weight), *add_rms_norm(x, x, weight))
    with FakeTensorMode() as mode:
        x_fake, weight_fake = (None if value is None else mode.from_tensor(value) for value in (x, weight))
        fake = (rms_norm(x_fake, weight_fake), *add_rms_norm(x_fake, x_fake, weight_fake))
    meta = rms_norm(x.to("meta"), None if weight is None else weight.to("meta"))
    for found, expected in zip((*fake, meta), (*real, real[0]), strict=True):
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dims", [(0, None), (1, None), (0, 0), (None, 0), (1, 1)])
def test_vmap_is_a_loop(dims: tuple[int | None, ...], device: str) -> None:
    x = draw(4, 4, 64, dtype=torch.bfloat16, device=device)
    weight = (
        draw(64, dtype=torch.bfloat16, device=device)
        if dims[1] is None
        else draw(64, 4, dtype=torch.bfloat16, device=device)
    )
    weight = weight if weight.ndim == 1 else weight.movedim(1, dims[1] or 0)
    found = torch.func.vmap(rms_norm, in_dims=dims)(x, weight)
    expected = torch.stack(
        [
            rms_norm(
                x if dims[0] is None else x.select(dims[0], i), weight if dims[1] is None else weight.select(dims[1], i)
            )
            for i in range(4)
        ]
    )
    assert_same(found, expected)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_operator() -> None:
    """A launch past the tracer would leave its result in the program, as a constant."""
    x, weight = draw(4, 64, dtype=torch.float32), draw(64, dtype=torch.float32)
    traced = torch.jit.trace(lambda x: x + rms_norm(x, weight), x)
    other = draw(4, 64, dtype=torch.float32, seed=9)
    torch.testing.assert_close(traced(other), other + rms_norm(other, weight))


def test_no_members_give_no_results() -> None:
    found = torch.func.vmap(rms_norm)(torch.zeros(0, 4, 64), torch.zeros(0, 64))
    assert found.shape == (0, 4, 64)


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    x, weight = leaf(6, 64), leaf(64)
    dy = draw(6, 64, dtype=torch.bfloat16, seed=2)
    plain = torch.autograd.grad(rms_norm(x, weight), (x, weight), dy)
    again = torch.autograd.grad(checkpoint(rms_norm, x, weight, use_reentrant=False), (x, weight), dy)
    for found, expected in zip(again, plain, strict=True):
        assert_same(found, expected)
