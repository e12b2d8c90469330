"""RMSNorm as a module."""

from __future__ import annotations

import torch

from . import _validate
from .ops import rms_norm

Tensor = torch.Tensor
TORCH_EPS = 2.0**-23
"""What torch.nn.RMSNorm means by None: the epsilon of the dtype that it computes in, float32 for 16 bits too."""


class RMSNorm(torch.nn.Module):
    """y = weight * round(x / sqrt(mean(x^2) + eps)): `rms_norm` with a weight of its own, named as in LlamaRMSNorm.

    Called with x, `[..., n]` in bfloat16, float16 or float32, it returns y, `[..., n]` of dtype out_dtype, by default
    promote_types(x, weight).

    Arguments:
        hidden_size: n, the length of the last axis.
        eps, cast_before_scale, weight_offset, out_dtype, unit_dtype, round_weight: as in `rms_norm`; eps=None is what
            torch.nn.RMSNorm means by it, the epsilon of float32, in which 16-bit rows are normalised too.
        with_weight: False leaves the weight out (`weight` is then None).
        device, dtype: of the weight, which starts as ones, or with a weight_offset as ones less that offset. In a model
            of transformers `_init_weights` sets the weight of every RMSNorm to ones: call `reset_parameters` after it.

    Raises: TypeError for a hidden_size that is no int, an eps that is no number, or a dtype whose tensors have no
        gradients; ValueError for a hidden_size below 1, a negative eps, or a weight_offset without a weight; at the
        call, what `rms_norm` raises.

    Example:
        norm = RMSNorm(1024, eps=1e-5, dtype=torch.bfloat16)
        y = norm(x)

    Source: `LlamaRMSNorm` in Hugging Face's transformers.
    """

    weight: torch.nn.Parameter | None
    # Of a module that was saved before there were these.
    out_dtype: torch.dtype | None = None
    unit_dtype: torch.dtype | None = None
    round_weight: bool = False

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = 1e-6,
        *,
        cast_before_scale: bool = True,
        weight_offset: float = 0.0,
        out_dtype: torch.dtype | None = None,
        unit_dtype: torch.dtype | None = None,
        round_weight: bool = False,
        with_weight: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_size = _validate.hidden_size(hidden_size)
        _validate.weight_offset(weight_offset, True if with_weight else None)
        rounding = unit_dtype, round_weight, out_dtype, None
        _validate.rounding(cast_before_scale, rounding, True if with_weight else None)
        if dtype is not None:
            _validate.parameter_dtype(dtype)
        self.hidden_size, self.eps = hidden_size, TORCH_EPS if eps is None else _validate.eps(eps)
        self.cast_before_scale, self.weight_offset = cast_before_scale, weight_offset
        self.out_dtype, self.unit_dtype, self.round_weight = out_dtype, unit_dtype, round_weight
        if with_weight:
            self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the norm's factor one."""
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: Tensor) -> Tensor:
        """y of x, as `rms_norm`."""
        return rms_norm(
            x,
            self.weight,
            self.eps,
            cast_before_scale=self.cast_before_scale,
            weight_offset=self.weight_offset,
            out_dtype=self.out_dtype,
            unit_dtype=self.unit_dtype,
            round_weight=self.round_weight,
        )

    def extra_repr(self) -> str:
        """What print(module) shows between the brackets."""
        options = [f"{self.hidden_size}", f"eps={self.eps}"]
        if not self.cast_before_scale:
            options.append("cast_before_scale=False")
        if self.weight_offset:
            options.append(f"weight_offset={self.weight_offset}")
        dtypes = {"out_dtype": self.out_dtype, "unit_dtype": self.unit_dtype}
        options += [f"{name}={dtype}" for name, dtype in dtypes.items() if dtype is not None]
        if self.round_weight:
            options.append("round_weight=True")
        if self.weight is None:
            options.append("with_weight=False")
        return ", ".join(options)
