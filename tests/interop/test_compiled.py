"""What torch's own machinery sees: operators that pass opcheck, compile, export and batch."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from pallas_norm_torch import (
    add_rms_norm,
    decompositions,
    rms_norm,
    rms_norm_gated,
    rms_norm_quantized,
    rms_norm_rope,
)
from tests.interop.cases import DEVICES, OPTIONS, assert_same, draw, leaf

# Whatever of torch is imported first, by inductor, may still use torch.jit.script.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's copies
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
        # Without a weight, dweight is of no elements, and no derivative of it is there to be compared.
        (ops.rms_norm_backward, (x, *backward[1:4], residual, *OPTIONS, True)),
    ):
        results = torch.library.opcheck(operator.default, operands)
        assert len(results) == 4
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.sampled(2)
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


def test_inductor_leaves_the_operators_whole_where_tests_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With CI set it raised at operators that torch.onnx.export can take apart, once in a process for each."""
    from torch._inductor import config, lowering

    monkeypatch.setenv("CI", "true")
    listed = {name for name in lowering.FALLBACK_ALLOW_LIST if not name.startswith("pallas_norm::")}
    monkeypatch.setattr(lowering, "FALLBACK_ALLOW_LIST", listed)
    monkeypatch.setattr("torch._inductor.graph.FALLBACK_ALLOW_LIST", listed)
    for operator in decompositions():
        monkeypatch.delitem(lowering.lowerings, operator, raising=False)
    x, weight = leaf(3, 64), leaf(64, seed=1)
    heads, angles = leaf(3, 2, 64, seed=2), draw(3, 64, dtype=torch.bfloat16, seed=3)

    def every_operator(x: torch.Tensor, weight: torch.Tensor, heads: torch.Tensor) -> list[torch.Tensor]:
        y, s = add_rms_norm(rms_norm(x, weight), x, weight)
        q, k = rms_norm_rope(heads, heads, angles, angles, weight, weight)
        gated = rms_norm_gated(y, s, weight)
        with torch.no_grad():
            values, scale = rms_norm_quantized(x, weight, dtype=torch.int8)
        return [y, s, q, k, gated, values.to(x.dtype), scale.to(x.dtype)]

    torch._dynamo.reset()
    compiled = torch.compile(every_operator, fullgraph=True)
    # Not by monkeypatch, which takes a setting for one that was not there, and leaves it deleted: whatever was compiled
    # after that in the same process raised.
    with config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        found, expected = (function(x, weight, heads) for function in (compiled, every_operator))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
        for results in (found, expected):
            torch.autograd.backward([one.sum() for one in results if one.requires_grad], inputs=[x, weight, heads])
    assert {operator for operator in decompositions() if operator in lowering.lowerings} == set(decompositions())


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore::torch.jit.TracerWarning")
def test_jit_trace_records_the_operator() -> None:
    """A launch past the tracer would leave its result in the program, as a constant."""
    x, weight = draw(4, 64, dtype=torch.float32), draw(64, dtype=torch.float32)
    traced = torch.jit.trace(lambda x: x + rms_norm(x, weight), x)
    assert "pallas_norm::rms_norm" in str(traced.graph)
    other = draw(4, 64, dtype=torch.float32, seed=9)
    torch.testing.assert_close(traced(other), other + rms_norm(other, weight))


def test_no_members_give_no_results() -> None:
    found = torch.func.vmap(rms_norm)(torch.zeros(0, 4, 64), torch.zeros(0, 64))
    assert found.shape == (0, 4, 64)


def test_y_and_s_are_written_to_two_places() -> None:
    """As eager, where memory tells; in a graph, the tensors themselves."""
    x, place = torch.randn(4, 64), torch.empty(4, 64)

    def twice(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        return add_rms_norm(x, x + 1, out=place, s_out=place)[0]

    for function in (twice, torch.compile(twice, backend="eager", fullgraph=True)):
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match="out overlaps s_out, and both are"):
            function(x, place)
