"""Whole models compute the same with their norms replaced: logits, gradients, tokens, and compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pallas_norm_torch import _forwards
from pallas_norm_torch.huggingface import patch, patched, unpatch
from pallas_norm_torch.ops import rms_norm
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.rstd import rstd_moved
from tests.interop.tiny_models import (
    DTYPES,
    MODELS,
    MOVES,
    build,
    distance,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
    spread,
    tokens,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every norm is replaced; the logits move no farther than a few units of rstd move them; fusing changes no bit."""
    model, tiny = build(name, dtype), MODELS[name]
    own, most = logits(model, name), spread(model, name)
    with patched(model) as report:
        replaced = logits(model, name)
    assert report.replaced == tiny.norms
    assert not report.left
    assert distance(replaced, own) <= most
    with patched(model, fuse_residual=True) as report:
        fused = logits(model, name)
    assert report.replaced == tiny.norms
    assert sum(report.fused.values()) == tiny.fused
    assert len(report.left) == tiny.left  # decoder layers that another forward or norm keeps from it
    assert same(fused, replaced)
    assert same(logits(model, name), own)  # both contexts have restored
    if dtype == "bf16":  # the mutant: one rounding for two, two for one
        monkeypatch.setattr(_forwards, "rms_norm", other_rounding)
        with patched(model):
            assert distance(logits(model, name), own) > most


def other_rounding(*operands: Any, cast_before_scale: bool = True, **options: Any) -> torch.Tensor:
    if options.pop("unit_dtype", None) == torch.float32:  # the other name of no cast
        cast_before_scale = False
    return rms_norm(*operands, cast_before_scale=not cast_before_scale, **options)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "olmo2", "gemma", "gemma2", "gpt-oss", "llama4"])
def test_bits_of_bf16_logits(name: str) -> None:
    """Of these inputs: no element of any norm lies so near a rounding boundary that rstd's last bits move it."""
    model = build(name, "bf16")
    own = logits(model, name)
    with patched(model):
        assert same(logits(model, name), own)


@pytest.mark.parametrize(
    ("name", "fuse_residual"),
    [("llama", False), ("llama", True), ("gemma", True), ("olmo2", False), ("t5", False), ("qwen3-next", False)],
)
def test_gradients_of_a_training_step(name: str, *, fuse_residual: bool) -> None:
    """In float32, against what the same step gives with rstd moved."""
    model = build(name, "f32").train()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        batch = tokens(name)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return {key: one.grad.clone() for key, one in model.named_parameters() if one.grad is not None}

    own = gradients()
    most = dict.fromkeys(own, 0.0)
    for ulps in MOVES:
        with rstd_moved(ulps):
            for key, gradient in gradients().items():
                most[key] = max(most[key], (gradient - own[key]).abs().max().item())
    with patched(model, fuse_residual=fuse_residual):
        replaced = gradients()
    assert replaced.keys() == own.keys()
    for key, gradient in replaced.items():
        # Beside rstd, the backward's own float32 sums are in another order.
        sums = 64 * 2.0**-24 * own[key].abs().max().item()
        assert (gradient - own[key]).abs().max() <= most[key] + sums, key


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bf16"), ("qwen3", "f32"), ("gemma2", "bf16"), ("t5", "f32")])
def test_greedy_generation(name: str, dtype: str) -> None:
    model: Any = build(name, dtype)
    prompt = tokens(name, 6)["input_ids"]
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    own = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    with patched(model, fuse_residual=dtype == "bf16"):
        replaced = model.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    assert torch.equal(replaced, own)


@pytest.mark.parametrize(
    ("name", "fuse_residual"), [("llama", False), ("gemma", True), ("olmo2", False), ("t5", False)]
)
def test_compiled_in_one_graph(name: str, *, fuse_residual: bool) -> None:
    """And compiled code notices unpatch: torch.compile's guards look at a module's class."""
    torch.compiler.reset()
    model = build(name, "bf16")
    own = logits(model, name)
    patch(model, fuse_residual=fuse_residual)
    eager = logits(model, name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(logits(compiled, name), eager)
    unpatch(model)
    assert same(logits(compiled, name), own)
