"""rms_norm_gated under torch's transformations: functionalize, vmap, compiled and exported programs."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import pallas_norm_torch
from pallas_norm_torch import decompositions, rms_norm_gated
from tests.gated_oracle import Gate
from tests.interop.cases import assert_same, draw
from tests.interop.gated_cases import FORMS, operands, trained

Tensor = torch.Tensor


def test_functionalize_finds_the_operator_or_statements() -> None:
    x, gate, weight = operands(torch.bfloat16, 64)
    expected = rms_norm_gated(x, gate, weight)
    assert_same(torch.func.functionalize(rms_norm_gated)(x, gate, weight), expected)
    batched = torch.func.functionalize(torch.func.vmap(lambda x, gate: rms_norm_gated(x, gate, weight)))
    assert_same(batched(x, gate), expected)


def test_vmap_is_a_loop() -> None:
    x, gate, weight = operands(torch.bfloat16, 128)
    weights = torch.stack([weight, -weight, 2 * weight, weight, weight])

    def call(x: Tensor, gate: Tensor, weight: Tensor) -> Any:
        y, pullback = torch.func.vjp(functools.partial(rms_norm_gated, group_size=64), x, gate, weight)
        return y, *pullback(torch.ones_like(y))

    for axes in ((0, 0, None), (0, 0, 0), (0, None, None), (None, None, 0)):
        given = [v if axis == 0 else v[0] for v, axis in zip((x, gate, weights), axes, strict=True)]
        batched = torch.func.vmap(call, in_dims=axes)(*given)
        for i in range(5):
            member = [v[i if axis == 0 else 0] for v, axis in zip((x, gate, weights), axes, strict=True)]
            for many, one in zip(batched, call(*member), strict=True):
                assert_same(many[i], one)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operators_pass_torchs_own_check(form: str) -> None:
    x, gate, weight = operands(torch.float32, 128)
    how = Gate(**FORMS[form])
    options = how.activation, how.norm_before_gate, 64, 1e-6, how.cast_before_scale, 0.0
    namespace = torch.ops.pallas_norm
    leaves = [tensor.requires_grad_() for tensor in (x, gate, weight)]
    torch.library.opcheck(namespace.rms_norm_gated.default, (*leaves, *options, torch.bfloat16))
    _, rstd = namespace.rms_norm_gated(x.detach(), gate.detach(), weight.detach(), *options, None)
    for with_dweight in (True, False):
        given = (*(leaf.detach() for leaf in leaves), rstd, x.detach(), *options, with_dweight)
        torch.library.opcheck(namespace.rms_norm_gated_backward.default, given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("form", FORMS)
def test_compiled_programs_give_the_bits_of_eager_calls(form: str) -> None:
    given = operands(torch.bfloat16, 256)
    options = FORMS[form] | {"group_size": 64, "out_dtype": torch.bfloat16}
    compiled = torch.compile(functools.partial(rms_norm_gated, **options), backend="aot_eager", fullgraph=True)
    leaves = [tensor.requires_grad_() for tensor in given]
    y = compiled(*leaves)
    dy = draw(*y.shape, dtype=y.dtype, seed=3)
    found = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for one, other in zip(found, trained(*given, **options), strict=True):
        assert_same(one, other)


def table_of_the_docstring() -> Any:
    lines = [line.strip() for line in str(decompositions.__doc__).splitlines()]
    names: dict[str, Any] = {"torch": torch, "pallas_norm_torch": pallas_norm_torch}
    exec("\n".join(line for line in lines if line.startswith(("table =", "table."))), names)
    return names["table"]


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_programs_that_leave_this_process_have_no_operator_of_it(form: str, dtype: torch.dtype) -> None:
    """By the decompositions, forward and backward, with the same bits: in float32 a fifth of them were others where the
    table took silu apart."""
    given, options = operands(dtype, 128), FORMS[form] | {"group_size": 64}

    def gradients(*operands: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in operands]
        y = rms_norm_gated(*leaves, **options)
        return [y, *torch.autograd.grad(y, leaves, y.detach())]

    traced = make_fx(gradients, decomposition_table=decompositions())(*given)
    assert "pallas_norm" not in str(traced.graph)
    for one, other in zip(traced(*given), gradients(*given), strict=True):
        assert_same(one, other)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
            return rms_norm_gated(x, gate, weight, **options)

    program = torch.export.export(Layer(), given)
    assert "pallas_norm" in str(program.graph)
    program = program.run_decompositions(table_of_the_docstring())
    assert "pallas_norm" not in str(program.graph)
    assert_same(program.module()(*given), rms_norm_gated(*given, **options))
