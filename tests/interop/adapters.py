"""A model with LoRA adapters, by peft; what asks for it skips where peft is not installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn


def peft() -> Any:
    return pytest.importorskip("peft", reason="needs peft: pip install peft")


def adapted(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft().LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, **options)
    return peft().get_peft_model(model, config)
