"""A patched model computes with its class's own forward wherever no kernel is launched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pallas_norm_torch.huggingface import patch, unpatch
from tests.interop.launched import as_if_launched
from tests.interop.norm_classes import BF16, F16, F32, N, gemma, llama
from tests.interop.rstd import bits
from tests.interop.tiny_models import (
    build,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
    separate_and_fused,
    tokens,
)


@pytest.mark.sampled(4)
@separate_and_fused
@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "mamba2", "qwen3-next", "diffllama"])
def test_a_patched_model_on_a_cpu_computes_as_before(name: str, *, fuse_residual: bool) -> None:
    """Bit for bit: it is the same code."""
    model = build(name, "bf16")
    own = logits(model, name)
    patch(model, fuse_residual=fuse_residual)
    assert same(logits(model, name), own)


@separate_and_fused
def test_a_patched_model_trains_on_a_cpu_as_before(*, fuse_residual: bool) -> None:
    def gradients(model: Any) -> list[torch.Tensor]:
        batch = tokens("llama")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    model = build("llama", "f32").train()
    expected = gradients(copy.deepcopy(model))
    patch(model, fuse_residual=fuse_residual)
    assert all(torch.equal(*pair) for pair in zip(gradients(model), expected, strict=True))


@separate_and_fused
def test_cast_to_float64_after_the_patch(*, fuse_residual: bool) -> None:
    model = build("llama", "f32")
    patch(model, fuse_residual=fuse_residual)
    model.double()
    with as_if_launched():
        replaced = logits(model, "llama")
    unpatch(model)
    assert torch.equal(replaced, logits(model, "llama"))


def test_symbolic_trace_of_a_patched_norm() -> None:
    module = nn.Sequential(llama(), gemma().float())
    patch(module)
    with as_if_launched():
        graph = torch.fx.symbolic_trace(nn.Sequential(*module))
    x = torch.randn(4, N)
    assert torch.equal(graph(x), module(x))


def test_compiled_programs_keep_the_operator() -> None:
    """On every device: the compiler would drop the rounding inside its own forward."""
    torch.compiler.reset()
    module = llama().bfloat16()
    patch(module)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(4, N).bfloat16()
    torch.compile(module, backend=backend, fullgraph=True)(x)
    assert "pallas_norm.rms_norm" in str(graphs[0].code)
    exported = torch.export.export(module, (x,))
    assert "pallas_norm.rms_norm" in str(exported.graph)
    torch.compile(module.double(), backend=backend, fullgraph=True)(x.double())
    assert "pallas_norm.rms_norm" not in str(graphs[1].code)


# --- torch.nn.RMSNorm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_the_default_eps_of_torch(dtype: torch.dtype) -> None:
    """finfo(float32).eps, for 16 bits too, on rows so small that another would show."""
    module = nn.RMSNorm(N).to(dtype)
    x = (1e-3 * torch.randn(64, N, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.no_grad():
        own = module(x)
        assert patch(module).replaced == {"RMSNorm": 1}
        with as_if_launched():
            replaced = module(x)
    assert (bits(replaced).int() - bits(own).int()).abs().max() <= (16 if dtype is F32 else 1)


def test_under_autocast_torch_s_own_module_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch 2.12 on its operator is on CUDA's list of those in float32."""
    module, x = nn.RMSNorm(N).bfloat16(), torch.randn(4, N).bfloat16()
    patch(module)
    calls: list[Any] = []
    with as_if_launched():
        monkeypatch.setattr(nn.functional, "rms_norm", lambda *operands: calls.append(operands) or operands[0])
        module(x)
        assert not calls
        with torch.autocast("cpu"):
            module(x)
        assert len(calls) == 1
