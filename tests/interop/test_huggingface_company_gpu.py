"""Patched and fused models on a GPU in company: compiled, with a static cache, checkpointed, with adapters.

Each is held against the unpatched model in the same company, by what that gives with rstd some units larger or smaller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pallas_norm_torch import patch
from tests.interop.adapters import adapted
from tests.interop.rstd import rstd_moved
from tests.interop.tiny_models import MOVES, build, distance, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # of transformers, peft and inductor
NAMES = ["llama", "gemma2", "qwen3"]


def on_gpu(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.cuda() for key, value in batch.items()}


def logits(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**on_gpu(tokens(name))).logits


def with_static_cache(model: Any, name: str) -> torch.Tensor:
    """The scores of eight tokens, generated one by one. Uncompiled: Inductor rounds the unpatched norms once."""
    prompt = on_gpu(tokens(name, 6))["input_ids"]
    length: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    kept: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "cache_implementation": "static"}
    kept["disable_compile"] = True
    mask = torch.ones_like(prompt)
    return torch.stack(model.generate(prompt, attention_mask=mask, **length, **kept).scores)


def gradients(model: Any, name: str) -> torch.Tensor:
    model.zero_grad()
    batch = on_gpu(tokens(name))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    trained = [one.grad.float().flatten() for one in model.parameters() if one.grad is not None]
    assert trained
    return torch.cat(trained)


def checkpointed(*, use_reentrant: bool) -> Callable[[Any, str], torch.Tensor]:
    def found(model: Any, name: str) -> torch.Tensor:
        options = {"use_reentrant": use_reentrant}
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        return gradients(model, name)

    return found


def compiled(model: Any, name: str) -> torch.Tensor:
    torch.compiler.reset()
    return logits(torch.compile(model, fullgraph=True, backend="aot_eager"), name)


def with_adapters(model: Any, name: str) -> torch.Tensor:
    """Made before the patch, as `company` says."""
    return gradients(model.train(), name)


COMPANIES: dict[str, Callable[[Any, str], torch.Tensor]] = {
    "alone": logits,
    "trained": lambda model, name: gradients(model.train(), name),
    "static cache": with_static_cache,
    "checkpointed": checkpointed(use_reentrant=False),
    "checkpointed by reentering": checkpointed(use_reentrant=True),
    "compiled": compiled,
    "adapters": with_adapters,
}


def made(name: str, company: str) -> nn.Module:
    model = build(name, "bf16")
    return (adapted(model) if company == "adapters" else model).cuda()


@pytest.mark.parametrize("company", COMPANIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_patched_and_fused_model_in_company(name: str, company: str) -> None:
    result = COMPANIES[company]
    own = result(made(name, company), name)
    most = 0.0
    for ulps in MOVES:
        with rstd_moved(ulps):
            most = max(most, distance(result(made(name, company), name), own))
    model = made(name, company)
    report = patch(model, fuse_residual=True)
    assert sum(report.fused.values()) == 2, str(report)
    assert any(how.startswith("with kernels on") for how in report.runs), str(report)
    found = result(model, name)
    assert found.isfinite().all()
    assert distance(found, own) <= most, (distance(found, own), most)
