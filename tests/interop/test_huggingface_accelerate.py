"""Patched models in the company of accelerate: its hooks and its offloading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pallas_norm_torch.huggingface import patch, unpatch
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import N, llama
from tests.interop.tiny_models import (
    build,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
    separate_and_fused,
)


def patched_logits(*, fuse_residual: bool) -> torch.Tensor:
    model = build("llama", "bf16")
    patch(model, fuse_residual=fuse_residual)
    return logits(model, "llama")


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def dispatched(model: nn.Module, how: str, folder: Any) -> nn.Module:
    """With accelerate's hooks on every module."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    if how == "dispatch":
        return accelerate.dispatch_model(model, dict.fromkeys(PARTS, "cpu"), force_hooks=True, main_device="cpu")
    if how == "cpu offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, folder, execution_device="cpu")


@pytest.mark.sampled(4)
@separate_and_fused
@pytest.mark.parametrize("how", ["dispatch", "cpu offload", "disk offload"])
@pytest.mark.parametrize("first", ["patch", "hooks"])
def test_accelerate(tmp_path: Any, how: str, first: str, *, fuse_residual: bool) -> None:
    """Patched before or after: the hooks stay and run, and unpatch gives back what was there."""
    expected, own = patched_logits(fuse_residual=fuse_residual), logits(build("llama", "bf16"), "llama")
    model: Any = build("llama", "bf16")
    if first == "patch":
        patch(model, fuse_residual=fuse_residual)
    dispatched(model, how, tmp_path)
    norm = model.model.layers[0].post_attention_layernorm
    hooks = [norm._hf_hook, norm.forward]
    if first == "hooks":
        report = patch(model, fuse_residual=fuse_residual)
        assert report.replaced == {"LlamaRMSNorm": 5}
        assert report.fused == ({"LlamaDecoderLayer": 2} if fuse_residual else {})
        assert not report.left
        assert set(report.runs) == {"in their own forward: they are on cpu, and the kernels take CUDA tensors"}
    assert [norm._hf_hook, norm.forward] == hooks
    assert same(logits(model, "llama"), expected)
    restored = unpatch(model)
    assert not restored.left
    assert restored.restored["LlamaRMSNorm"] == 5
    assert [norm._hf_hook, norm.forward] == hooks
    assert type(norm) is LlamaRMSNorm
    assert same(logits(model, "llama"), own)


@pytest.mark.sampled(2)
@separate_and_fused
def test_accelerate_s_hooks_see_their_norm(*, fuse_residual: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    model: Any = build("llama", "bf16")
    seen: list[Any] = []

    class Seeing(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            seen.append(module)
            return output

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            accelerate.hooks.add_hook_to_module(module, Seeing())
    patch(model, fuse_residual=fuse_residual)
    assert same(logits(model, "llama"), patched_logits(fuse_residual=fuse_residual))
    assert len(seen) == 5
    accelerate.hooks.remove_hook_from_submodules(model)
    assert same(logits(model, "llama"), patched_logits(fuse_residual=fuse_residual))
    assert unpatch(model).restored["LlamaRMSNorm"] == 5


def test_a_forward_below_accelerate_s_hook_that_is_not_the_class_s() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    module: Any = llama()
    module.forward = lambda x: x + 1
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    (left,) = patch(module).left
    assert left.reason.startswith("its forward was bound to the instance by something else")
    assert torch.equal(module(torch.ones(N)), torch.full((N,), 2.0))
