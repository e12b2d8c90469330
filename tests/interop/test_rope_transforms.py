"""rms_norm_rope under torch's transformations: vmap, functionalize, fake tensors, compiled and exported programs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pallas_norm_torch import decompositions, rms_norm_rope
from tests.interop.cases import assert_same, bits, draw
from tests.interop.rope_cases import HEADS, operands

Tensor = torch.Tensor


def test_vmap_is_a_loop() -> None:
    q, k, cos, sin, *weights = operands(64, torch.bfloat16, tokens=(3, 3, 4))
    many = torch.stack([weights[0], -weights[0], 2 * weights[0]])
    for given, axes in (
        ((q, k, cos, sin, *weights), (0, 0, None, None, None, None)),
        ((q, k, torch.stack([cos, sin, cos]), torch.stack([sin] * 3), *weights), (0, 0, 0, 0, None, None)),
        ((q[0], k, cos, sin, many, weights[1]), (None, 0, None, None, 0, None)),
    ):
        batched = torch.func.vmap(rms_norm_rope, in_dims=axes)(*given)
        for i in range(3):
            single = rms_norm_rope(*(one if at is None else one[i] for one, at in zip(given, axes, strict=True)))
            for one, other in zip(batched, single, strict=True):
                assert torch.equal(one[i], other)


def test_vmap_over_no_members() -> None:
    q, k, cos, sin, *weights = operands(64, torch.bfloat16, tokens=(3, 4))
    none = cos.expand(0, 4, 64)
    for given, axes in (
        ((q[:0], k[:0], cos, sin), (0, 0, None, None)),
        ((q[:0], k[:0], none, none), (0, 0, 0, 0)),
        ((q[0], k[:0], cos, sin), (None, 0, None, None)),
    ):
        found = torch.func.vmap(rms_norm_rope, in_dims=(*axes, None, None))(*given, *weights)
        assert [(one.shape, one.dtype) for one in found] == [((0, 4, heads, 64), torch.bfloat16) for heads in HEADS]


def test_functionalize_finds_the_operator_or_statements() -> None:
    q, k, *others = operands(64, torch.bfloat16)
    expected = rms_norm_rope(q, k, *others)
    batched = torch.func.functionalize(torch.func.vmap(lambda q, k: rms_norm_rope(q, k, *others)))
    for found in (torch.func.functionalize(rms_norm_rope)(q, k, *others), batched(q, k)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    q, k, *others = operands(64, torch.float32)
    gradient = torch.func.grad(lambda q: rms_norm_rope(q, k, *others)[0].square().sum())
    torch.testing.assert_close(torch.func.functionalize(gradient)(q), gradient(q), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operators_pass_torchs_own_check() -> None:
    given, options = operands(64, torch.bfloat16), (1e-6, True, 0.0)
    torch.library.opcheck(torch.ops.pallas_norm.rms_norm_rope.default, (*given, *options))
    gradients = tuple(torch.ones(one.shape, dtype=one.dtype) for one in given[:2])
    torch.library.opcheck(torch.ops.pallas_norm.rms_norm_rope_backward.default, (*given, *gradients, *options))


def test_fake_results_are_those_of_eager_calls() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    q, k, cos, sin, *weights = operands(64, torch.bfloat16)
    given = q, k, *(one.float() for one in (cos, sin, *weights))
    with FakeTensorMode() as mode:
        fake = rms_norm_rope(*map(mode.from_tensor, given))
    for one, other in zip(fake, rms_norm_rope(*given), strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_programs_give_the_bits_of_eager_calls() -> None:
    q, k, cos, sin, *weights = operands(64, torch.bfloat16)
    leaves = [one.clone().requires_grad_() for one in (q, k, *weights)]

    def block(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> Tensor:
        return torch.cat(rms_norm_rope(2 * q, k, cos, sin, q_weight, k_weight), dim=-2)

    expected, found = block(*leaves), torch.compile(block, backend="aot_eager", fullgraph=True)(*leaves)
    assert torch.equal(found, expected)
    pairs = zip(*(torch.autograd.grad(one.float().sum(), leaves) for one in (found, expected)), strict=True)
    assert all(torch.equal(bits(one), bits(other)) for one, other in pairs)


@pytest.mark.parametrize("leading", [(), (2,)])
def test_unbacked_tokens_compile(leading: tuple[int, ...]) -> None:
    """Whose number a program knows when it runs: a comparison of it is a guard, which has nothing to look at."""
    q, k, cos, sin, *weights = operands(64, torch.bfloat16, tokens=(14,))

    def packed(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return rms_norm_rope(*(one.expand(*leading, *one.shape) for one in (q, k, cos, sin)), *weights)

    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for tokens in (9, 1):
        given = [one[:tokens].clone() for one in (q, k, cos, sin)]
        for one in given:
            torch._dynamo.decorators.mark_unbacked(one, 0)
        for one, other in zip(compiled(*given), packed(*given), strict=True):
            assert torch.equal(one, other)


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("with_weights", [True, False], ids=["weights", "bare"])
def test_programs_that_leave_this_process_have_no_operator_of_it(with_weights: bool) -> None:  # noqa: FBT001
    """By the decompositions, forward and backward, with the same bits."""
    q, k, cos, sin, *weights = operands(64, torch.bfloat16)
    given = (q.contiguous(), k.contiguous(), *(weights if with_weights else ()))
    dq, dk = (draw(*one.shape, dtype=one.dtype, seed=seed) for seed, one in ((5, q), (6, k)))

    def gradients(*operands: Tensor) -> list[Tensor]:
        leaves = [one.detach().requires_grad_() for one in operands]
        results = rms_norm_rope(leaves[0], leaves[1], cos, sin, *leaves[2:])
        return [*results, *torch.autograd.grad(results, leaves, (dq, dk))]

    traced = make_fx(gradients, decomposition_table=decompositions())(*given)
    assert "pallas_norm" not in str(traced.graph)
    for one, other in zip(traced(*given), gradients(*given), strict=True):
        assert_same(one.detach(), other.detach())

    class Rotating(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, *weights: Tensor) -> Any:
            return rms_norm_rope(q, k, cos, sin, *weights)

    program = torch.export.export(Rotating(), given)
    assert "pallas_norm" in str(program.graph)
    table = torch.export.default_decompositions()
    table.update(decompositions())
    program = program.run_decompositions(table)
    assert "pallas_norm" not in str(program.graph)
    for one, other in zip(program.module()(*given), rms_norm_rope(q, k, cos, sin, *given[2:]), strict=True):
        assert_same(one, other)
