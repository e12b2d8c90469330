"""What is put on a patched norm, or was before, is seen: a forward, hooks, a call, a compiled one, another weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pallas_norm_torch.huggingface import patch
from tests.interop.launched import as_if_launched
from tests.interop.norm_classes import N, gemma, llama
from tests.interop.tiny_models import (
    build,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
)


def counted(monkeypatch: pytest.MonkeyPatch, owner: type) -> list[Any]:
    """The calls of a class's own forward."""
    calls, forward = list[Any](), owner.forward  # type: ignore[attr-defined]

    def counting(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        calls.append(hidden_states)
        return forward(self, hidden_states)

    monkeypatch.setattr(owner, "forward", counting)
    return calls


def test_a_forward_set_on_the_norm_of_a_fused_layer() -> None:
    model: Any = build("llama", "bf16")
    patch(model, fuse_residual=True)
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = torch.zeros_like
    with as_if_launched():
        fused = logits(model, "llama")
    patch(model)
    with as_if_launched():
        assert same(fused, logits(model, "llama"))


def test_global_hooks_see_every_norm() -> None:
    model = build("llama", "bf16")
    patch(model, fuse_residual=True)
    seen: list[Any] = []
    with as_if_launched():
        for register in (
            nn_module.register_module_forward_hook,
            nn_module.register_module_forward_pre_hook,
        ):
            handle = register(lambda module, *_: seen.append(module) if isinstance(module, LlamaRMSNorm) else None)
            logits(model, "llama")
            handle.remove()
            assert len(seen) == 5
            seen.clear()


def test_a_class_with_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "bf16")
    patch(model, fuse_residual=True)
    seen: list[Any] = []

    def call(self: Any, *arguments: Any) -> Any:
        seen.append(self)
        return nn.Module.__call__(self, *arguments)

    monkeypatch.setattr(LlamaRMSNorm, "__call__", call)
    with as_if_launched():
        logits(model, "llama")
    assert len(seen) == 5


def test_a_compiled_norm_of_a_fused_layer() -> None:
    model: Any = build("llama", "bf16")
    patch(model, fuse_residual=True)
    seen: list[Any] = []
    model.model.layers[0].post_attention_layernorm._compiled_call_impl = lambda x: seen.append(x) or x
    with as_if_launched():
        logits(model, "llama")
    assert len(seen) == 1


def test_a_parametrized_weight_of_a_fused_layer() -> None:
    """A later parametrization changes the weight, and the class; both are seen."""
    model: Any = build("llama", "bf16")
    patch(model, fuse_residual=True)
    norm = model.model.layers[0].post_attention_layernorm

    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    with as_if_launched():
        fused = logits(model, "llama")
        patch(model)
        assert same(logits(model, "llama"), fused)


def test_a_helper_hidden_by_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the patch it is left; after it, its own forward runs, which calls what was set."""
    module: Any = gemma()
    module._norm = torch.zeros_like
    (left,) = patch(module).left
    assert left.reason == (
        "its _norm was set on the instance and hides that of its class: delete it, or leave the norm"
    )
    del module._norm
    assert patch(module).replaced == {"GemmaRMSNorm": 1}
    module._norm = torch.zeros_like
    with as_if_launched():
        assert not module(torch.randn(4, N).bfloat16()).count_nonzero()


def test_a_class_whose_forward_is_replaced_after_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = llama()
    patch(module)
    calls = counted(monkeypatch, LlamaRMSNorm)
    with as_if_launched():
        module(torch.randn(4, N))
    assert len(calls) == 1
