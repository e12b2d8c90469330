"""What computes each known RMSNorm instead of its forward: one function for each body in `_classes.ROWS`.

They have the bodies' parameter names, because callers may use them. What they compute beside rms_norm they compute with
the body's own statements; x.float() is exact, and so is the norm of a float32 x without a weight: nothing rounds there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from pallas_norm._activation import ACTIVATIONS

from .gated import rms_norm_gated
from .module import TORCH_EPS
from .ops import add_rms_norm, rms_norm

Forward = Callable[..., torch.Tensor]
AddNorm = Callable[[Any, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def llama(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def llama4(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, self.weight, self.eps)


def cpmant(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.eps)


def gemma(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, self.weight, self.eps, cast_before_scale=False, weight_offset=1.0, out_dtype=x.dtype)


def olmo2(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    options: Any = {"cast_before_scale": False, "out_dtype": hidden_states.dtype}
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, **options)


def moshi(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, self.weight, self.eps, cast_before_scale=False, out_dtype=x.dtype)


def t5(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    dtype = self.weight.dtype
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, unit_dtype=dtype, out_dtype=dtype)


def gemma4(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    weight = self.weight if self.with_scale else None
    return rms_norm(hidden_states, weight, self.eps, cast_before_scale=False, out_dtype=hidden_states.dtype)


def weightless(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, None, self.eps)


def weightless_states(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return weightless(self, hidden_states)


def muse_centered(self: Any, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, 1.0 + self.weight, self.eps, cast_before_scale=False, out_dtype=x.dtype)


def muse_scaled(self: Any, x: torch.Tensor) -> torch.Tensor:
    scaled = x.float() * (1.0 + self.weight).float()
    return rms_norm(scaled.type_as(x), None, self.eps)


def qwen4(self: Any, x: torch.Tensor) -> torch.Tensor:
    if self.group_size is None:
        return gemma(self, x)
    groups = x.float().reshape(*x.shape[:-1], -1, self.group_size)
    unit = rms_norm(groups, None, self.eps).flatten(-2)
    return (unit * (1.0 + self.weight.float())).type_as(x)


def xlstm(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = rms_norm(x, self.weight, self.eps)
    return y if self.bias is None else y + self.bias


def _gated(self: Any, hidden_states: torch.Tensor, group_size: int, gate: torch.Tensor | None) -> torch.Tensor:
    """The three bodies that gate before the norm."""
    if gate is not None:
        options: Any = {"norm_before_gate": False, "group_size": group_size}
        return rms_norm_gated(hidden_states, gate, self.weight, self.variance_epsilon, **options)
    *batch, n = hidden_states.shape
    unit = rms_norm(hidden_states.view(*batch, n // group_size, group_size), None, self.variance_epsilon)
    return self.weight * unit.view(*batch, n)


def mamba2(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    return _gated(self, hidden_states, hidden_states.shape[-1], gate)


def mamba2_groups(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    return _gated(self, hidden_states, self.group_size, gate)


def falcon_h1(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    return _gated_groups(self, hidden_states, gate, hidden_states.dim() == 2)


def falcon_h1_squeezing(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    return _gated_groups(self, hidden_states, gate, hidden_states.dim() == 2 or hidden_states.shape[1] == 1)


def _gated_groups(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor | None, squeeze: bool) -> torch.Tensor:  # noqa: FBT001
    *batch, n = hidden_states.shape
    if gate is not None:
        options: Any = {"norm_before_gate": self.norm_before_gate, "group_size": n // self.n_groups}
        options |= {"cast_before_scale": False, "out_dtype": hidden_states.dtype}
        y = rms_norm_gated(hidden_states, gate, self.weight, self.variance_epsilon, **options)
    else:
        groups = hidden_states.float().view(*batch, self.n_groups, n // self.n_groups)
        unit = rms_norm(groups, None, self.variance_epsilon)
        y = (self.weight.view(self.n_groups, n // self.n_groups) * unit).to(hidden_states.dtype)
    y = y.view(batch[0], -1, n)
    return y.squeeze(1) if squeeze else y


def _activation(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers.activations import ACT2FN  # a module that needs one has imported transformers

    return cast(Callable[[torch.Tensor], torch.Tensor], ACT2FN[name])


def qwen3_next(self: Any, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if self.activation in ACTIVATIONS:
        options: Any = {"activation": self.activation, "out_dtype": hidden_states.dtype}
        return rms_norm_gated(hidden_states, gate, self.weight, self.variance_epsilon, **options)
    y = rms_norm(hidden_states, self.weight, self.variance_epsilon)
    return (y * _activation(self.activation)(gate.float())).to(hidden_states.dtype)


def kimi(self: Any, hidden_states: torch.Tensor, gate: Any = None) -> torch.Tensor:
    options: Any = {"cast_before_scale": False, "out_dtype": torch.float32}
    if self.activation in ACTIVATIONS:
        options = options | {"activation": self.activation, "out_dtype": hidden_states.dtype}
        return rms_norm_gated(hidden_states, gate, self.weight, self.variance_epsilon, **options)
    y = rms_norm(hidden_states, self.weight, self.variance_epsilon, **options)
    return (y * _activation(self.activation)(gate.float())).to(hidden_states.dtype)


def torch_rms_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    eps = TORCH_EPS if self.eps is None else self.eps
    return rms_norm(x, self.weight, eps, cast_before_scale=False, out_dtype=x.dtype)


def _add_llama(self: Any, hidden_states: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon)


def _add_gemma(self: Any, hidden_states: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    options: Any = {"cast_before_scale": False, "weight_offset": 1.0, "out_dtype": residual.dtype}
    return add_rms_norm(hidden_states, residual, self.weight, self.eps, **options)


def _add_olmo2(self: Any, hidden_states: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    options: Any = {"cast_before_scale": False, "out_dtype": residual.dtype}
    return add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon, **options)


RESIDUAL_FORMS: dict[Forward, AddNorm] = {llama: _add_llama, gemma: _add_gemma, olmo2: _add_olmo2}
"""(norm(s), s) of s = residual + hidden_states, for the norms that known decoder layers have there."""

ROTARY_FORMS: dict[Forward, str] = {llama: "variance_epsilon", llama4: "eps", cpmant: "eps"}
"""The attribute that is eps, of norms that `rms_norm_rope` computes without an option."""
