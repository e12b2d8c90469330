"""The models of `bench model`: shapes of transformers' own families, with random weights, and the cases of each."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .parity_report import EAGER, FUSED, LIGER, OURS, SINGLE

ROTATED = "pallas-norm, q and k rotated"  # fused, and the norms of q's and k's heads with the rotary embedding


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str  # decode, prefill or train
    batch: int
    tokens: int  # steps of one sample, length of the prompt, or of each sequence that is trained on
    graph: bool = False

    @property
    def label(self) -> str:
        if self.kind == "decode":
            return f"decode batch {self.batch}{', CUDA graph' if self.graph else ''}"
        return f"{self.kind} {self.tokens}" if self.batch == 1 else f"{self.kind} {self.batch} x {self.tokens}"


@dataclasses.dataclass(frozen=True)
class Shape:
    """family: {family}Config and {family}ForCausalLM are the classes."""

    family: str
    config: dict[str, Any]
    cases: tuple[Case, ...]
    providers: tuple[str, ...]


LLAMA = (EAGER, OURS, FUSED, SINGLE, LIGER)
QWEN3 = (EAGER, OURS, FUSED, ROTATED, SINGLE, LIGER)
MAMBA2 = (EAGER, OURS)  # nobody else has its gated norms, and it adds no residual right before a norm


def _decodes(*batches: int, tokens: int = 16) -> tuple[Case, ...]:
    return tuple(Case("decode", batch, tokens, graph) for graph in (False, True) for batch in batches)


def _attention(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def _mamba2(hidden: int, layers: int, head: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_heads": 2 * hidden // head,
        "head_dim": head,
        "n_groups": 1,
        "vocab_size": vocabulary,
    }


TINY = (*_decodes(1, 2, tokens=2)[:3], Case("prefill", 1, 16), Case("train", 2, 8))
SHAPES = {
    "llama-3-8b": Shape(
        "Llama",
        _attention(4096, 14336, 32, 32, 8, 128256),
        (*_decodes(1, 8, 64), Case("prefill", 1, 2048), Case("prefill", 1, 8192)),
        LLAMA,
    ),
    "qwen3-0.6b": Shape(
        "Qwen3",
        _attention(1024, 3072, 28, 16, 8, 151936) | {"head_dim": 128},
        (*_decodes(1, 64), Case("prefill", 1, 8192), Case("train", 4, 2048)),
        QWEN3,
    ),
    "mamba2-130m": Shape(
        "Mamba2", _mamba2(768, 24, 64, 50288), (Case("prefill", 1, 2048), Case("train", 1, 2048)), MAMBA2
    ),
    "tiny": Shape("Llama", _attention(128, 256, 2, 4, 2, 256), TINY, LLAMA),
    "tiny-qwen3": Shape("Qwen3", _attention(128, 256, 2, 4, 2, 256) | {"head_dim": 32}, TINY, QWEN3),
    "tiny-mamba2": Shape("Mamba2", _mamba2(64, 2, 16, 256), TINY[-2:], MAMBA2),
}


def build(shape: Shape, *, device: str, seed: int) -> torch.nn.Module:
    """With random bfloat16 weights."""
    import transformers

    config = getattr(transformers, f"{shape.family}Config")(**shape.config)
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = getattr(transformers, f"{shape.family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(usual)
    return model.eval().requires_grad_(requires_grad=False)
