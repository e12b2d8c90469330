"""What the norms are compared on: the shapes of real models, filled with activations like theirs."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    where: str
    rows: int
    n: int
    dtype: torch.dtype
    eps: float
    gemma: bool = False  # multiplies by 1 + weight in float32 and rounds once

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def short_dtype(self) -> str:
        return {"bfloat16": "bf16", "float16": "fp16"}[self.dtype_name]

    @property
    def label(self) -> str:
        return f"{self.model} {self.short_dtype}"


BF16, FP16 = torch.bfloat16, torch.float16
CASES = (
    Case("Llama 3 8B", "hidden", 2048, 4096, BF16, 1e-5),
    Case("Llama 3 8B", "hidden", 2048, 4096, FP16, 1e-5),
    Case("Qwen2.5 0.5B", "hidden", 8192, 896, BF16, 1e-6),
    Case("Qwen2.5 0.5B", "hidden", 8192, 896, FP16, 1e-6),
    Case("Qwen3 8B", "q norm", 65536, 128, BF16, 1e-6),
    Case("DeepSeek V3", "hidden", 1024, 7168, BF16, 1e-6),
    Case("Gemma 2 9B", "hidden", 2048, 3584, BF16, 1e-6, gemma=True),
)


def activations(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, weight), drawn to look like those of trained models.

    Hidden states have a scale of their own per token and per channel, heavy tails, and a few channels that are tens of
    times larger than the rest; trained weights are neither ones nor round numbers.
    """
    generator = torch.Generator().manual_seed(seed + case.rows + case.n)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    token = torch.exp(0.5 * normal(case.rows, 1))
    channel = torch.exp(0.4 * normal(case.n))
    outliers = torch.randperm(case.n, generator=generator)[: max(1, case.n // 1000)]
    channel[outliers] *= 40
    heavy = normal(case.rows, case.n)
    heavy = heavy * (1 + 0.15 * heavy.square())  # kurtosis of about 9, where a normal distribution has 3
    x = (0.5 * token * channel * heavy).to(case.dtype)
    weight = 0.45 * torch.exp(0.3 * normal(case.n))
    return x, (weight - 0.6 if case.gemma else weight).to(case.dtype)
