"""rms_norm_quantized and add_rms_norm_quantized under torch's transformations: vmap, programs, and no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from pallas_norm_torch import add_rms_norm_quantized, decompositions, rms_norm_quantized
from tests.interop.cases import draw
from tests.interop.test_quantized import FORMS, operands

Tensor = torch.Tensor


def test_vmap_is_a_loop() -> None:
    x, _, weight = operands(torch.bfloat16, 128)
    weights, scales = torch.stack([weight, -weight, 2 * weight, weight, weight]), torch.tensor([0.5, 1, 2, 3, 4.0])

    def call(x: Tensor, weight: Tensor, scale: Tensor) -> Any:
        return add_rms_norm_quantized(x, x, weight, dtype=torch.int8, scale=scale)

    for axes in ((0, None, None), (0, 0, None), (0, None, 0), (1, None, None)):
        given = x.movedim(0, 1) if axes[0] == 1 else x
        of_weight, of_scale = (weights if axes[1] == 0 else weight), (scales if axes[2] == 0 else scales[1])
        batched = torch.func.vmap(call, in_dims=axes, out_dims=(0, None if axes[2] is None else 0, 0))(
            given, of_weight, of_scale
        )
        for i in range(5):
            single = call(
                x[i], of_weight if axes[1] is None else weights[i], of_scale if axes[2] is None else scales[i]
            )
            assert torch.equal(batched[0][i], single[0])
            assert torch.equal(batched[2][i], single[2])
    with_rows = torch.func.vmap(lambda x: rms_norm_quantized(x, weight)[1])(x)
    assert torch.equal(with_rows, rms_norm_quantized(x, weight)[1])


def test_vmap_over_no_members() -> None:
    """Nothing to stack has no shape, where each member would have a weight or a scale of its own."""
    x, residual, weight = operands(torch.bfloat16, 128)
    scale = torch.tensor(0.5)
    for axes in ((0, None, None), (0, 0, None), (0, None, 0), (None, 0, 0)):
        given = [v if at is None else v.expand(0, *v.shape) for v, at in zip((x, weight, scale), axes, strict=True)]

        def call(x: Tensor, weight: Tensor, scale: Tensor) -> Any:
            q, _, s, y = add_rms_norm_quantized(x, residual, weight, scale=scale, return_y=True)
            return q, s, y

        found = torch.func.vmap(call, in_dims=axes)(*given)
        dtypes = torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16
        assert [(one.shape, one.dtype) for one in found] == [((0, *x.shape), dtype) for dtype in dtypes]
    by_weight = torch.func.vmap(lambda weight: rms_norm_quantized(x, weight, group_size=128)[1])
    assert by_weight(weight.expand(0, 128)).shape == (0, *x.shape[:-1], 1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_operator_passes_torchs_own_check(form: str) -> None:
    x, residual, weight = operands(torch.bfloat16, 128)
    scale, group = (torch.tensor(0.5), 0) if form == "tensor" else (None, 128)
    arguments = (x, residual, weight, scale, torch.int8, group, True, 1e-6, True, 0.0)
    torch.library.opcheck(torch.ops.pallas_norm.rms_norm_quantized.default, arguments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_programs_give_the_bits_of_eager_calls() -> None:
    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        q, scale, s = add_rms_norm_quantized(x, residual, weight, group_size=128)
        return (
            q.float() * scale.repeat_interleave(128, -1),
            s,
            rms_norm_quantized(s, weight, dtype=torch.int8, scale=0.5)[0],
        )

    given = operands(torch.bfloat16, 256)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for found, expected in zip(compiled(*given), block(*given), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("function", [rms_norm_quantized, add_rms_norm_quantized])
def test_fx_keeps_a_call_whose_scale_alone_it_traces(function: Any) -> None:
    given = operands(torch.float32, 64)[: 1 if function is rms_norm_quantized else 2]

    class By(torch.nn.Module):
        def forward(self, scale: Any) -> Any:
            return function(*given, scale=scale, dtype=torch.int8)

    traced = torch.fx.symbolic_trace(By())
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [function]
    for one, other in zip(traced(torch.tensor(0.5)), By()(torch.tensor(0.5)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_scale_that_varies_does_not_break_a_program(dynamic: Any) -> None:
    """A number that varies is a symbol there, which what checks a float did not take. (torch makes it a constant again,
    as any float, once it has the program.)"""
    x, _, weight = operands(torch.bfloat16, 64)

    def by(scale: float) -> Any:
        return rms_norm_quantized(x, weight, dtype=torch.int8, scale=scale)

    torch._dynamo.reset()
    compiled: Any = torch.compile(by, backend="aot_eager", dynamic=dynamic, fullgraph=True)
    for scale in (0.02, 0.04, 2, 1e-45, 3.4028234663852886e38):
        for one, other in zip(compiled(scale), by(scale), strict=True):
            assert torch.equal(one, other)
    for wrong in (0.0, -0.5, 1e-46, 1e39, True):
        torch._dynamo.reset()
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match="positive"
        ):  # where it is checked, and no graph may end
            compiled(wrong)


@pytest.mark.sampled(3)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")  # torch.export's own
@pytest.mark.parametrize("form", FORMS)
def test_programs_that_leave_this_process_have_no_operator_of_it(form: str) -> None:
    """By the decompositions, with the same bits."""
    given, options = operands(torch.bfloat16, 256), FORMS[form]
    scale, group = torch.tensor(0.5) if form == "tensor" else None, options.get("group_size", 0)

    def called(*operands: Tensor) -> Any:
        x, residual, weight = operands
        with_y = rms_norm_quantized(x, weight, dtype=torch.int8, return_y=True, **options)
        return *with_y, *add_rms_norm_quantized(x, residual, weight, **options)

    def directly(*operands: Tensor) -> Any:
        without_y = torch.int8, group, False, 1e-6, True, 0.0
        return torch.ops.pallas_norm.rms_norm_quantized(*operands, scale, *without_y)

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> Any:
            return called(x, residual, weight)

    for function in (called, directly):
        traced = make_fx(function, decomposition_table=decompositions())(*given)
        assert "pallas_norm" not in str(traced.graph)
        for one, other in zip(traced(*given), function(*given), strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one.float(), other.float())
    program = torch.export.export(Layer(), given)
    assert "pallas_norm" in str(program.graph)
    table = torch.export.default_decompositions()
    table.update(decompositions())
    program = program.run_decompositions(table)
    assert "pallas_norm" not in str(program.graph)
    for one, other in zip(program.module()(*given), called(*given), strict=True):
        assert torch.equal(one.float(), other.float())


NO_GRADIENT = (
    "an operand of a norm with a result of 8 bits requires grad; rounding to 8 bits has the derivative 0 almost "
    "everywhere, so there is none to give: call it under torch.no_grad(), pass detached operands, or take rms_norm "
    "or add_rms_norm"
)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_there_is_no_gradient() -> None:
    x = draw(2, 64, dtype=torch.float32).requires_grad_()
    for call in (
        lambda: rms_norm_quantized(x),
        lambda: add_rms_norm_quantized(x.detach(), x),
        lambda: torch.func.grad(lambda x: rms_norm_quantized(x)[1].sum())(x.detach()),
        lambda: torch.func.jvp(lambda x: rms_norm_quantized(x)[1], (x.detach(),), (x.detach(),)),
    ):
        with pytest.raises(NotImplementedError) as raised:
            call()
        assert str(raised.value) == NO_GRADIENT
    with torch.no_grad():
        rms_norm_quantized(x)


X = draw(2, 64, dtype=torch.float32)


def quantized_by(scale: Tensor) -> Tensor:
    """q of X as numbers again."""
    return rms_norm_quantized(X, scale=scale)[0].float() * scale


OPTIONS = torch.float8_e4m3fn, 0, False, 1e-6, True, 0.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*torch.jit.*")
def test_a_scale_has_no_gradient() -> None:
    """Eager calls went through torch's statements, which autograd followed; programs had zeros."""
    scale = torch.tensor(0.5, requires_grad=True)
    compiled = torch.compile(quantized_by, backend="aot_eager", fullgraph=True)
    for call in (
        lambda: rms_norm_quantized(X, scale=scale),
        lambda: add_rms_norm_quantized(X, X, scale=scale, dtype=torch.int8),
        lambda: torch.ops.pallas_norm.rms_norm_quantized(X, None, None, scale, *OPTIONS),
        lambda: torch.func.grad(lambda scale: quantized_by(scale).sum())(scale.detach()),
        lambda: torch.func.vmap(torch.func.grad(lambda scale: quantized_by(scale).sum()))(scale.detach().expand(3)),
    ):
        with pytest.raises(NotImplementedError) as raised:
            call()
        assert str(raised.value) == NO_GRADIENT
    with pytest.raises(Exception, match="rounding to 8 bits has the derivative 0"):  # in what torch.compile raises
        compiled(scale)
    with torch.no_grad():
        assert torch.equal(quantized_by(scale), compiled(scale))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_forward_mode_is_refused_by_the_tangents_that_operands_have() -> None:
    """As of rms_norm: a level that is open for something else is no reason."""
    scale = torch.tensor(0.5)
    expected = quantized_by(scale)
    with forward_ad.dual_level():
        assert torch.equal(quantized_by(scale), expected)
        torch.ops.pallas_norm.rms_norm_quantized(X, None, None, scale, *OPTIONS)
        for of_x, of_scale in ((forward_ad.make_dual(X, X), scale), (X, forward_ad.make_dual(scale, scale))):
            for call in (
                lambda x, scale: rms_norm_quantized(x, scale=scale),
                lambda x, scale: torch.ops.pallas_norm.rms_norm_quantized(x, None, None, scale, *OPTIONS),
            ):
                with pytest.raises(NotImplementedError) as raised:
                    call(of_x, of_scale)
                assert str(raised.value) == NO_GRADIENT
