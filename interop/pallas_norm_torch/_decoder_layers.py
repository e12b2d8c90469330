"""Decoder layers whose first residual addition and the norm after it become one kernel, `add_rms_norm`.

    s = round(residual + hidden)        the layer rounds here, and so does the kernel
    hidden, residual = norm(s), s

A layer is known by its source, as norms are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._classes import digest, read_source
from ._forwards import RESIDUAL_FORMS


def _has_hooks(module: nn.Module) -> bool:
    return any(
        getattr(module, name)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )


def _add_norm(
    norm: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(s), s); in two steps where the norm has been restored, or where its own call would do more."""
    residual_form = RESIDUAL_FORMS.get(type(norm).forward)
    if residual_form is not None and hidden_states.dtype == residual.dtype and not _has_hooks(norm):
        return residual_form(norm, hidden_states, residual)
    residual = residual + hidden_states
    return norm(residual), residual


def llama(
    self: Any,
    hidden_states: torch.Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: Any = False,  # noqa: FBT002 (transformers' signature)
    position_embeddings: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states, residual = _add_norm(self.post_attention_layernorm, hidden_states, residual)
    return residual + self.mlp(hidden_states)


def mixtral(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        **kwargs,
    )
    hidden_states, residual = _add_norm(self.post_attention_layernorm, hidden_states, residual)
    return residual + self.mlp(hidden_states)


LAYERS: dict[str, Callable[..., torch.Tensor]] = {
    "1a8125909341e389": llama,  # LlamaDecoderLayer, and 66 more in 5.17: Mistral, Qwen2, Qwen3, Gemma, Olmoe, ...
    "d4699009e63a2518": mixtral,  # MixtralDecoderLayer, Phimoe, MiniMaxM2: another order of parameters
}


def fused_forward(owner: type) -> Callable[..., torch.Tensor] | str:
    """The forward of that decoder layer with the two steps in one, or why there is none."""
    source = read_source(owner)
    forward = None if source is None else LAYERS.get(digest(source))
    return forward or "its forward is not that of a known decoder layer, so its addition stays outside the norm"
