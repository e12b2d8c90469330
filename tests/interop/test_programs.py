"""Programs that torch makes of a call: traced by torch.fx, decomposed into aten's operators, saved, functionalized, and
compiled for sizes that are not known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pallas_norm_torch import RMSNorm, add_rms_norm, decompositions, patched, rms_norm
from tests.interop.cases import DTYPES, OPTIONS, assert_same, draw, hugging_face

# Whatever of torch is imported first, by export, may still use torch.jit.script; torch's own pytree warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:.*LeafSpec.*:FutureWarning")
N = 64


class Block(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.gemma = RMSNorm(N, dtype=dtype), RMSNorm(N, 1e-5, cast_before_scale=False, weight_offset=1.0)
        self.weight = torch.nn.Parameter(draw(N, dtype=torch.float32, seed=7))
        with torch.no_grad():
            self.norm.weight.copy_(draw(N, dtype=dtype, seed=8))

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y, s = add_rms_norm(self.norm(x), residual, self.weight)
        return y, s, self.gemma(s), rms_norm(x, eps=0.5)


def operands(dtype: torch.dtype, rows: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(rows, N, dtype=dtype), draw(rows, N, dtype=dtype, seed=1)


# --- torch.fx ---------------------------------------------------------------------------------------------------------


def test_symbolic_trace_keeps_the_calls() -> None:
    block = Block(torch.bfloat16)
    traced = torch.fx.symbolic_trace(block)
    called = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert [target for target in called if target in (rms_norm, add_rms_norm)] == [
        rms_norm,
        add_rms_norm,
        rms_norm,
        rms_norm,
    ]
    for found, expected in zip(traced(*operands(torch.bfloat16)), block(*operands(torch.bfloat16)), strict=True):
        assert_same(found.detach(), expected.detach())
    total = sum(result.float().sum() for result in traced(*operands(torch.bfloat16)))
    total.backward()
    assert block.norm.weight.grad is not None


def test_symbolic_trace_of_a_patched_norm() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.RMSNorm(N, eps=1e-6))
    x = draw(3, N, dtype=torch.float32)
    with patched(model):
        assert_same(torch.fx.symbolic_trace(model)(x).detach(), model(x).detach())


def test_a_proxy_for_the_weight_alone() -> None:
    x = draw(3, N, dtype=torch.float32)
    traced = torch.fx.symbolic_trace(lambda weight: rms_norm(x, weight))
    weight = draw(N, dtype=torch.float32, seed=1)
    assert_same(traced(weight), rms_norm(x, weight))


# --- decompositions ---------------------------------------------------------------------------------------------------


def exported(dtype: torch.dtype) -> torch.export.ExportedProgram:
    rows = torch.export.Dim("rows", min=2, max=64)
    return torch.export.export(Block(dtype).eval(), operands(dtype), dynamic_shapes=({0: rows}, {0: rows}))


def decomposed(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    table = torch.export.default_decompositions()
    table.update(decompositions())
    return program.run_decompositions(table)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_program_of_aten_s_operators_has_the_same_bits(dtype: torch.dtype) -> None:
    program = exported(dtype)
    assert any("pallas_norm" in str(node.target) for node in program.graph.nodes)
    aten = decomposed(program)
    assert not any("pallas_norm" in str(node.target) for node in aten.graph.nodes)
    given = operands(dtype, rows=9)
    for found, expected in zip(aten.module()(*given), program.module()(*given), strict=True):
        assert_same(found.detach(), expected.detach())


LOADED = """
import sys, torch
program = torch.export.load(sys.argv[1])
given, expected = torch.load(sys.argv[2])
found = program.module()(*given)
assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))
assert "pallas_norm_torch" not in sys.modules
print("same")
"""


@pytest.mark.slow
def test_it_is_loaded_where_this_package_is_not(tmp_path: Path) -> None:
    program, given = exported(torch.bfloat16), operands(torch.bfloat16, rows=5)
    expected = tuple(result.detach() for result in program.module()(*given))
    torch.export.save(decomposed(program), tmp_path / "model.pt2")
    torch.save((given, expected), tmp_path / "tensors.pt")
    command = [sys.executable, "-c", LOADED, str(tmp_path / "model.pt2"), str(tmp_path / "tensors.pt")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout) == (0, "same\n"), done.stderr


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_decompose_too(dtype: torch.dtype) -> None:
    x, ds = operands(dtype)
    weight, dy = draw(N, dtype=torch.float32, seed=2), draw(3, N, dtype=torch.float32, seed=3)
    _, rstd = torch.ops.pallas_norm.rms_norm(x, weight, *OPTIONS)

    def gradients(*values: torch.Tensor) -> Any:
        return torch.ops.pallas_norm.rms_norm_backward(*values, *OPTIONS, True)  # noqa: FBT003

    given = x, weight, rstd, dy, ds
    traced = make_fx(gradients, decomposition_table=decompositions())(*given)
    assert not any("pallas_norm" in str(node.target) for node in traced.graph.nodes)
    for found, expected in zip(traced(*given), gradients(*given), strict=True):
        assert_same(found, expected)


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="needs onnxscript: pip install onnx onnxscript")
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.onnx.export(
        Block(torch.float16).eval(), operands(torch.float16), dynamo=True, dynamic_shapes=({0: rows}, {0: rows})
    )
    assert program is not None
    assert {node.domain for node in program.model.graph} == {""}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_the_decompositions_are_not_what_a_compiler_or_a_fake_tensor_sees() -> None:
    """A fake tensor of a symbolic size looks into the table that torch.onnx.export reads, and would check nothing."""
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        del example
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(rms_norm, fullgraph=True, backend=backend, dynamic=True)
    x, weight = draw(3, N, dtype=torch.float32), draw(N, dtype=torch.float32)
    assert_same(compiled(x, weight), rms_norm(x, weight))
    assert any("pallas_norm.rms_norm" in target for target in seen)
    with FakeTensorMode(shape_env=torch.fx.experimental.symbolic_shapes.ShapeEnv()) as mode:
        fakes = [mode.from_tensor(value) for value in (x, draw(N // 2, dtype=torch.float32))]
        with pytest.raises(ValueError, match=r"^weight has shape"):
            torch.ops.pallas_norm.rms_norm(*fakes, *OPTIONS)


# --- sizes that are not known -----------------------------------------------------------------------------------------


def test_unbacked_rows_compile() -> None:
    """A comparison of two such sizes is a guard, which has nothing to look at."""

    def both(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, s = add_rms_norm(rms_norm(x, weight), residual, weight)
        return y + s

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    weight = draw(N, dtype=torch.bfloat16)
    for rows, differentiates in ((5, False), (3, False), (4, True)):
        given = operands(torch.bfloat16, rows=rows)
        for tensor in given:
            tensor.requires_grad_(differentiates)
            torch._dynamo.decorators.mark_unbacked(tensor, 0)
        found, expected = compiled(*given, weight), both(*given, weight)
        assert_same(found.detach(), expected.detach())
        if differentiates:
            for gradient, right in zip(
                torch.autograd.grad(found.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True
            ):
                torch.testing.assert_close(gradient, right, rtol=2**-6, atol=2**-6)


def test_unbacked_rows_that_do_not_fit_are_refused() -> None:
    """By torch, which makes a guard of the condition."""
    torch._dynamo.reset()
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    x, residual = operands(torch.float32, rows=5)
    for tensor in (x, residual):
        torch._dynamo.decorators.mark_unbacked(tensor, 0)
    compiled(x, residual)
    short = residual[:3].clone()
    torch._dynamo.decorators.mark_unbacked(short, 0)
    with pytest.raises(Exception, match=r"residual\.size\(\)\[0\] == x\.size\(\)\[0\]"):
        compiled(x, short)


# --- functionalize ----------------------------------------------------------------------------------------------------


def test_functionalize_takes_the_operator() -> None:
    x, weight = draw(3, N, dtype=torch.bfloat16), draw(N, dtype=torch.bfloat16, seed=1)
    assert_same(torch.func.functionalize(rms_norm)(x, weight), rms_norm(x, weight))
    traced = make_fx(torch.func.functionalize(lambda *given: add_rms_norm(*given)))(x, x, weight)
    assert any("pallas_norm.add_rms_norm" in str(node.target) for node in traced.graph.nodes)
    for found, expected in zip(traced(x, x, weight), add_rms_norm(x, x, weight), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("outer", [False, True])
def test_functionalize_beside_other_transformations(*, outer: bool) -> None:
    """It has no rule for an autograd.Function."""
    x, weight = draw(3, N, dtype=torch.float32), draw(N, dtype=torch.float32, seed=1)

    def combined(transform: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
        functionalize = torch.func.functionalize
        return functionalize(transform(function)) if outer else transform(functionalize(function))

    found = combined(torch.func.grad, lambda x, weight: rms_norm(x, weight).sin().sum())(x, weight)
    expected = torch.func.grad(lambda x: hugging_face(x, weight).sin().sum())(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_same(
        combined(torch.func.vmap, rms_norm)(x.view(3, 1, N), weight.expand(3, N)).view(3, N), rms_norm(x, weight)
    )
    _, s = combined(torch.func.vmap, add_rms_norm)(x, x, weight.expand(3, N))
    assert_same(s, x + x)
