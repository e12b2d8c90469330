"""Tiny random models of transformers, built offline from their configurations."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.interop.rstd import bits, rstd_moved

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# XLA's rstd and torch's were at most 3 units apart in 6,000 random rows of 64. Here all norms move at once, one way.
MOVES = (-8, 8)

separate_and_fused = pytest.mark.parametrize("fuse_residual", [False, True], ids=["separate", "fused"])


@dataclasses.dataclass(frozen=True)
class Tiny:
    model: str
    config: str
    norms: dict[str, int]
    fused: int = 0  # decoder layers whose residual addition joins the norm
    special: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def left(self) -> int:
        """Decoder layers that have a post_attention_layernorm and are not fused."""
        return 0 if self.fused or self.config in ("T5Config", "Mamba2Config") else 2


SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
HEADS = {"head_dim": 16}
WINDOW = {"head_dim": 16, "sliding_window": 16}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
LINEAR = {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
NESTED = {
    "head_dim": 16,
    "sliding_window": 16,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "laurel_rank": 8,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
    "intermediate_size": [96, 96],
}
STATES = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2, "expand": 2, "chunk_size": 16}
ENCODER = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}

MODELS = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", {"LlamaRMSNorm": 5}, 2),
    "mistral": Tiny("MistralForCausalLM", "MistralConfig", {"MistralRMSNorm": 5}, 2),
    "mixtral": Tiny("MixtralForCausalLM", "MixtralConfig", {"MixtralRMSNorm": 5}, 2, LOCAL),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", {"Qwen2RMSNorm": 5}, 2),
    "qwen3": Tiny("Qwen3ForCausalLM", "Qwen3Config", {"Qwen3RMSNorm": 9}, 2, HEADS),
    "phi3": Tiny("Phi3ForCausalLM", "Phi3Config", {"Phi3RMSNorm": 5}, 2),
    "olmoe": Tiny("OlmoeForCausalLM", "OlmoeConfig", {"OlmoeRMSNorm": 9}, 2, EXPERTS),
    "olmo2": Tiny("Olmo2ForCausalLM", "Olmo2Config", {"Olmo2RMSNorm": 9}),
    "gemma": Tiny("GemmaForCausalLM", "GemmaConfig", {"GemmaRMSNorm": 5}, 2, HEADS),
    "gemma2": Tiny("Gemma2ForCausalLM", "Gemma2Config", {"Gemma2RMSNorm": 9}, 2, WINDOW),
    "gemma3": Tiny("Gemma3ForCausalLM", "Gemma3TextConfig", {"Gemma3RMSNorm": 13}, 2, WINDOW),
    "gemma3n": Tiny("Gemma3nForCausalLM", "Gemma3nTextConfig", {"Gemma3nRMSNorm": 22}, 0, NESTED),
    "t5": Tiny("T5ForConditionalGeneration", "T5Config", {"T5LayerNorm": 12}, 0, ENCODER),
    "llama4": Tiny(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {"Llama4TextRMSNorm": 5, "Llama4TextL2Norm": 2},
        0,
        HEADS | {"num_local_experts": 2, "intermediate_size_mlp": 96},
    ),
    "gpt-oss": Tiny("GptOssForCausalLM", "GptOssConfig", {"GptOssRMSNorm": 5}, 2, WINDOW | LOCAL),
    "qwen3-next": Tiny(
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {"Qwen3NextRMSNorm": 7, "Qwen3NextRMSNormGated": 1},
        2,
        LINEAR | EXPERTS,
    ),
    "deepseek-v3": Tiny("DeepseekV3ForCausalLM", "DeepseekV3Config", {"DeepseekV3RMSNorm": 9}, 2, LATENT),
    "helium": Tiny("HeliumForCausalLM", "HeliumConfig", {"HeliumRMSNorm": 5}, 2, HEADS),
    "diffllama": Tiny("DiffLlamaForCausalLM", "DiffLlamaConfig", {"DiffLlamaRMSNorm": 5, "RMSNorm": 2}, 2),
    "mamba2": Tiny("Mamba2ForCausalLM", "Mamba2Config", {"Mamba2RMSNorm": 3, "MambaRMSNormGated": 2}, 0, STATES),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """With a second thread on a busy core, matrices this small make the tests take five times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _built(name: str, dtype: str) -> nn.Module:
    tiny = MODELS[name]
    config = getattr(transformers, tiny.config)(**(SHAPE | tiny.special))
    torch.manual_seed(0)
    model = getattr(transformers, tiny.model)(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # weights of ones test no weight
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(DTYPES[dtype]).eval()


def build(name: str, dtype: str) -> nn.Module:
    return copy.deepcopy(_built(name, dtype))


def tokens(name: str, length: int = 24) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    return model(**tokens(name)).logits


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all logits together: a rounding in another place moves them all a little, and the largest hardly farther."""
    return (actual.float() - expected.float()).abs().mean().item()


def spread(model: nn.Module, name: str) -> float:
    """How far the logits go when every norm's rstd is moved by units in its last place."""
    own, moved = logits(model, name), list[torch.Tensor]()
    for ulps in MOVES:
        with rstd_moved(ulps):
            moved.append(logits(model, name))
    return max(distance(one, own) for one in moved)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(bits(actual), bits(expected))
