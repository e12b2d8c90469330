"""Where torch.compile breaks a graph, Dynamo compiles what runs between as programs of their own, the operators' Python
too: torch's statements have to stay out of them, since inductor drops the roundings between."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo

from pallas_norm_torch import (
    _torch_state,
    add_rms_norm,
    gated_statements,
    quantized_statements,
    rms_norm,
    rms_norm_gated,
    rms_norm_quantized,
    rms_norm_rope,
    rope_statements,
    statements,
)
from tests.interop.cases import assert_same, draw

Tensor = torch.Tensor
N = 256
pytestmark = pytest.mark.filterwarnings("ignore")  # of Dynamo and inductor, where as errors they would end a program


def _drawn(*shape: int, seed: int) -> Tensor:
    return draw(*shape, dtype=torch.bfloat16, seed=seed)


WEIGHT = _drawn(N, seed=9)
CALLS: dict[str, tuple[Callable[..., Any], int]] = {
    "rms_norm": (rms_norm, 1),
    "add_rms_norm": (add_rms_norm, 2),
    "rms_norm_gated": (rms_norm_gated, 2),
}


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By inductor: aot_eager computes each statement as it is written, whoever compiles it."""
    torch._dynamo.reset()
    return torch.compile(function, backend="inductor")


def _rows(count: int) -> list[Tensor]:
    return [_drawn(16, N, seed=seed) for seed in range(count)]


def _gradients(function: Callable[..., Any], operands: list[Tensor]) -> list[Tensor]:
    """Of random cotangents: those that are one leave products of which no rounding is dropped."""
    results, pullback = torch.func.vjp(function, *operands)
    results = results if isinstance(results, tuple) else (results,)
    cotangents = tuple(_drawn(*y.shape, seed=20 + place) for place, y in enumerate(results))
    return [*results, *pullback(cotangents if len(cotangents) > 1 else cotangents[0])]


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_torch_func_in_a_program_with_breaks_has_the_bits_of_eager(name: str) -> None:
    call, count = CALLS[name]

    def both(*operands: Tensor) -> list[Tensor]:
        return _gradients(call, list(operands))

    operands = [*_rows(count), WEIGHT]
    for found, expected in zip(_compiled(both)(*operands), both(*operands), strict=True):
        assert_same(found, expected)


@pytest.mark.slow
def test_rotated_heads_in_a_program_with_breaks_have_the_bits_of_eager() -> None:
    cos, sin = (_drawn(16, 64, seed=seed) for seed in (4, 5))
    operands = _drawn(16, 4, 64, seed=0), _drawn(16, 2, 64, seed=1)

    def both(*pair: Tensor) -> list[Tensor]:
        return _gradients(lambda q, k: rms_norm_rope(q, k, cos, sin, WEIGHT[:64], WEIGHT[:64]), list(pair))

    for found, expected in zip(_compiled(both)(*operands), both(*operands), strict=True):
        assert_same(found, expected)


@pytest.mark.slow
def test_eight_bits_in_a_program_with_breaks_are_those_of_eager() -> None:
    def member(x: Tensor) -> tuple[Tensor, ...]:
        torch._dynamo.graph_break()
        return rms_norm_quantized(x, WEIGHT, dtype=torch.int8, return_y=True)

    def quantized(x: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vmap(member)(x)

    (x,) = _rows(1)
    for found, expected in zip(_compiled(quantized)(x), quantized(x), strict=True):
        assert_same(found, expected)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", CALLS)
def test_compiled_autograd_behind_an_eager_forward_has_the_bits_of_eager(name: str) -> None:
    """It takes the gradient of eager calls as Python that Dynamo compiles; the operators are not in it."""
    call, count = CALLS[name]

    def recorded() -> tuple[list[Tensor], Tensor]:
        leaves = [operand.clone().requires_grad_() for operand in (*_rows(count), WEIGHT)]
        y = call(*leaves)
        return leaves, y[0] if isinstance(y, tuple) else y

    dy = _drawn(16, N, seed=20)
    leaves, y = recorded()
    with torch._dynamo.config.patch(compiled_autograd=True):
        _compiled(lambda: y.backward(dy))()
    expected, y = recorded()
    y.backward(dy)
    for one, other in zip(leaves, expected, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert_same(one.grad, other.grad)


def test_statements_are_in_no_graph() -> None:
    """Nor does a caller that is compiled take them into its own program."""
    for function in (
        statements.forward,
        statements.backward,
        gated_statements.forward,
        gated_statements.backward,
        rope_statements.rotated,
        rope_statements.rotated_back,
        quantized_statements.forward,
    ):
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            torch.compile(lambda function=function: function(None), fullgraph=True, backend="eager")()


def test_a_torch_without_marks_has_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy")
    wrapped = _torch_state.never_compiled(lambda x: x + 1)
    assert wrapped(torch.ones(2)).sum() == 4
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        torch.compile(lambda x: wrapped(x), fullgraph=True, backend="eager")(torch.ones(2))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_the_way_of_jax_goes_between_two_graphs(name: str) -> None:
    """Dynamo went into JAX, which failed on what its calls became."""
    call, count = CALLS[name]

    def called(*operands: Tensor) -> Any:
        found = call(*operands, implementation="jax")
        return (found[0] if isinstance(found, tuple) else found) + 0

    leaves = [operand.clone().requires_grad_() for operand in (*_rows(count), WEIGHT)]
    dy = _drawn(16, N, seed=20)
    found, expected = _compiled(called)(*leaves), called(*leaves)
    assert_same(found.detach(), expected.detach())
    for one, other in zip(
        torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert_same(one, other)


def test_a_graph_without_breaks_has_no_way_of_jax() -> None:
    message = (
        "implementation is 'jax' under torch.compile, torch.func, a mode of torch, or with a subclass of torch.Tensor "
        "or on meta (x: bfloat16[16,256] on cpu); needed eager code on plain tensors: leave implementation out"
    )
    compiled = torch.compile(lambda x: rms_norm(x, WEIGHT, implementation="jax"), fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported, match=re.escape(message)):
        compiled(*_rows(1))
