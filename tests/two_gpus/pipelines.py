"""One process that spreads a patched model over both GPUs: accelerate's dispatch_model, and DataParallel."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import nn

import pallas_norm_torch as pn
from tests.interop.cases import assert_same
from tests.two_gpus import checks
from tests.two_gpus.checks import Check

GPU = torch.cuda.device_count() >= 2
HERE: Any = 0 if GPU else "cpu"
THERE: Any = 1 if GPU else "cpu"
LAYERS = 2
PARTS: dict[str, Any] = {
    "model.embed_tokens": HERE,
    "model.layers.0": HERE,
    "model.layers.1": THERE,
    "model.norm": THERE,
    "model.rotary_emb": HERE,
    "lm_head": THERE,
}


def llama(device: Any = HERE) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=100
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(value, 0.5, 1.5)
    return model.bfloat16().to(device).eval()


def tokens() -> torch.Tensor:
    return torch.randint(0, 100, (8, 16), generator=torch.Generator().manual_seed(1)).to(HERE)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def patch(model: Any, *, fused: bool) -> None:
    report = pn.patch(model, fuse_residual=fused)
    assert dict(report.replaced) == {"LlamaRMSNorm": 2 * LAYERS + 1}, str(report)
    assert sum(report.fused.values()) == (LAYERS if fused else 0), str(report)
    assert not GPU or all(how.startswith("with kernels on cuda") for how in report.runs), str(report)


@functools.cache
def on_one_gpu(fused: bool) -> torch.Tensor:  # noqa: FBT001
    model = llama()
    patch(model, fused=fused)
    return logits(model, tokens()).cpu()


def dispatched(*, first: str, fused: bool) -> None:
    """The bits of the same patched model on one GPU: the products have the same shapes, on cards of one kind."""
    import accelerate

    model = llama("cpu")
    if first == "patch":
        pn.patch(model, fuse_residual=fused)
    model = accelerate.dispatch_model(model, PARTS, main_device=HERE, force_hooks=True)
    if first == "dispatch":
        patch(model, fused=fused)
    now = torch.cuda.current_device() if GPU else None
    for _ in range(2):
        assert_same(logits(model, tokens()).cpu(), on_one_gpu(fused))
    assert not GPU or torch.cuda.current_device() == now


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = tokens()
    model(ids, labels=ids, use_cache=False).loss.backward()
    return {name: value.grad.cpu() for name, value in model.named_parameters() if "norm" in name}


def dispatched_backward() -> None:
    import accelerate

    alone = llama()
    patch(alone, fused=False)
    model = accelerate.dispatch_model(llama("cpu"), PARTS, main_device=HERE, force_hooks=True)
    patch(model, fused=False)
    found, expected = gradients(model), gradients(alone)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=2**-6, atol=2**-6 * float(expected[name].abs().max()))


def data_parallel(*, fused: bool) -> None:
    """Each GPU's half has the bits of the same half alone."""
    model, ids = llama(), tokens()
    patch(model, fused=fused)
    halves = torch.cat([logits(model, half) for half in ids.chunk(2)])
    parallel = nn.DataParallel(model, [0, 1])
    for _ in range(3):
        assert_same(logits(parallel, ids), halves)


def of_two_gpus() -> list[Check]:
    found: list[Check] = []
    for fused in (False, True):
        form = ", fused" if fused else ""
        for first, words in (("patch", "patched before"), ("dispatch", "patched after")):
            check = functools.partial(dispatched, first=first, fused=fused)
            found.append((f"accelerate dispatch_model, {words}{form}", check))
        if GPU:
            found.append((f"DataParallel{form}", functools.partial(data_parallel, fused=fused)))
    return [*found, ("accelerate dispatch_model, backward", dispatched_backward)]


if __name__ == "__main__":
    checks.require_two_gpus()
    sys.exit(checks.main(of_two_gpus()))
