"""Patched models in the company of peft: adapters beside norms, norms saved with them, and tuned norms."""

from __future__ import annotations

from typing import Any

import pytest

from pallas_norm_torch.huggingface import patch, patched, unpatch
from tests.interop.adapters import adapted, peft
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.tiny_models import (
    build,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
    separate_and_fused,
    tokens,
)

peft_warns = pytest.mark.filterwarnings("ignore")  # of transformers' new names and of layers that it does not know


@pytest.mark.sampled(4)
@peft_warns
@separate_and_fused
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_adapters_beside_norms(first: str, *, fuse_residual: bool) -> None:
    """LoRA, disabled and merged: what the patched model gives without peft, and the same modules."""
    expected: Any = adapted(build("llama", "f32"))
    patch(expected, fuse_residual=fuse_residual)
    model = build("llama", "f32")
    if first == "patch":
        patch(model, fuse_residual=fuse_residual)
    model = adapted(model)
    if first == "adapter":
        assert patch(model, fuse_residual=fuse_residual).replaced == {"LlamaRMSNorm": 5}
    assert same(logits(model, "llama"), logits(expected, "llama"))
    plain = build("llama", "f32")
    patch(plain, fuse_residual=fuse_residual)
    with model.disable_adapter():
        assert same(logits(model, "llama"), logits(plain, "llama"))
    merged = model.merge_and_unload()
    assert unpatch(merged).restored["LlamaRMSNorm"] == 5


@peft_warns
def test_norms_that_are_saved_with_the_adapter() -> None:
    """peft wraps them, so a layer cannot read the norm's weight; the report says so."""
    model = adapted(build("llama", "f32"), modules_to_save=["post_attention_layernorm"])
    own = logits(model, "llama")
    with patched(model, fuse_residual=True) as report:
        assert report.replaced == {"LlamaRMSNorm": 7}
        assert not report.fused
        assert {one.reason for one in report.left} == {
            "its post_attention_layernorm is a ModulesToSaveWrapper around a norm, so the addition before it stays "
            "outside"
        }
        assert (logits(model, "llama") - own).abs().max() < 1e-4
        model.train()
        model(**tokens("llama"), labels=tokens("llama")["input_ids"]).loss.backward()
    saved = {name for name, one in model.named_parameters() if one.grad is not None and "modules_to_save" in name}
    assert len(saved) == 2


@peft_warns
def test_tuned_norms() -> None:
    model = peft().get_peft_model(build("llama", "f32"), peft().LNTuningConfig(target_modules=["input_layernorm"]))
    assert patch(model, fuse_residual=True).replaced == {"LlamaRMSNorm": 7}
    model(**tokens("llama"), labels=tokens("llama")["input_ids"]).loss.backward()
    assert sum(one.grad is not None for one in model.parameters()) == 2
    assert unpatch(model.merge_and_unload()).restored["LlamaRMSNorm"] == 5
