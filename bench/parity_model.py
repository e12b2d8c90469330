"""The models of parity and model_speed: a small one trained here, int4 linears, and what computes a model's norms."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .calls import AbsentError, module
from .parity_report import COMPILED, EAGER, EXACT, FUSED, LIGER, OURS, SINGLE

GROUP = 128  # inputs that share a scale

Model = Callable[..., Any]  # called as the module is
Provider = Callable[[nn.Module], contextlib.AbstractContextManager[Model]]


@dataclasses.dataclass(frozen=True)
class Size:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    steps: int
    batch: int
    length: int
    rate: float = 2e-3


SIZES = {
    "full": Size(256, 768, 16, 4, steps=1500, batch=64, length=512),  # 13.7 M parameters
    "reduced": Size(128, 256, 6, 2, steps=300, batch=8, length=128, rate=4e-3),
    "tiny": Size(128, 128, 4, 2, steps=30, batch=4, length=64, rate=1e-2),
}


def train(size: Size, documents: Sequence[str], *, device: str, seed: int) -> nn.Module:
    """A byte-level Llama after `size.steps` of AdamW, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        byte_level=True,
    )
    model = LlamaForCausalLM(config).to(device).train()
    text = "\n".join(random.Random(seed).sample(documents, len(documents)))
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.rate, betas=(0.9, 0.95), fused=device == "cuda")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.rate, total_steps=size.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    span = torch.arange(size.length)
    for step in range(size.steps):
        starts = torch.randint(len(data) - size.length, (size.batch, 1), generator=generator)
        tokens = data[starts + span].long().to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == size.steps - 1:
            print(f"step {step} of {size.steps}: loss {loss.item():.3f} nats a byte", flush=True)
    return model.eval().to(torch.bfloat16).requires_grad_(requires_grad=False)


class Int4Linear(nn.Module):
    """y = x @ weight.T with weight = round_to_bf16(code * scale): codes -8..7, a bfloat16 scale for 128 inputs.

    Two codes a byte; dequantised at every call, so what it computes is a bfloat16 matmul.
    """

    packed: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        groups = linear.weight.detach().float().unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-8).to(torch.bfloat16)
        codes = (groups / scale.float()).round().clamp(-8, 7).to(torch.int8).flatten(1) + 8
        self.register_buffer("packed", codes[:, 0::2].to(torch.uint8) | (codes[:, 1::2].to(torch.uint8) << 4))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def weight(self) -> torch.Tensor:
        codes = torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1).to(torch.int8) - 8
        return (codes.unflatten(1, (-1, GROUP)).to(torch.bfloat16) * self.scale).flatten(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight().to(x.dtype), self.bias)


def quantise(model: nn.Module) -> int:
    """Replaces every linear but the output embedding, in place; returns how many."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and child is not head
    ]
    if odd := {linear.in_features for *_, linear in found if linear.in_features % GROUP}:
        raise ValueError(f"linears have {sorted(odd)} inputs; needed multiples of {GROUP}: pass --weights bf16")
    for parent, name, linear in found:
        setattr(parent, name, Int4Linear(linear))
    return len(found)


def _exact_rstd(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps).float()


def _exact(name: str) -> Callable[..., torch.Tensor]:
    """The forward of this kind of norm as transformers rounds it, with rstd computed in float64 and rounded once."""

    def llama(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return weight * (x.float() * _exact_rstd(x, eps)).to(x.dtype)

    def olmo2(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return (weight * (x.float() * _exact_rstd(x, eps))).to(x.dtype)

    def gemma(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return (x.float() * _exact_rstd(x, eps) * (1.0 + weight.float())).to(x.dtype)

    return {"LLAMA": llama, "OLMO2": olmo2, "GEMMA": gemma}[name]


def _norms(model: nn.Module) -> list[tuple[nn.Module, Any]]:
    """The model's norms with their rows of the table of classes."""
    from pallas_norm_torch._classes import looks_like_one, recognise

    found = []
    for norm in model.modules():
        row = recognise(type(norm))
        if row is None and looks_like_one(type(norm)):
            row = "no row of the table of classes knows its forward"
        if isinstance(row, str) or (row is not None and row.kind.name not in ("LLAMA", "OLMO2", "GEMMA")):
            reason = row if isinstance(row, str) else f"computes {row.kind.value}"
            raise ValueError(f"{type(norm).__name__}: {reason}; needed Llama's, Olmo2's or Gemma's norm: another model")
        if row is not None:
            found.append((norm, row))
    if not found:
        raise ValueError("the model has no RMSNorm of the table of classes; needed one to compare: another model")
    return found


@contextlib.contextmanager
def _swapped(model: nn.Module, choose: Callable[[Any], Callable[..., torch.Tensor]]) -> Iterator[nn.Module]:
    """Every norm computes choose(row)(x, weight, eps) for a while."""
    norms = _norms(model)
    for norm, row in norms:
        compute, eps = choose(row), getattr(norm, row.eps)

        def forward(self: Any, x: torch.Tensor, compute: Any = compute, eps: float = eps) -> torch.Tensor:
            return compute(x, self.weight, eps)

        norm.forward = types.MethodType(forward, norm)
    try:
        yield model
    finally:
        for norm, _ in norms:
            vars(norm).pop("forward", None)


def exact(model: nn.Module) -> contextlib.AbstractContextManager[Model]:
    return _swapped(model, lambda row: _exact(row.kind.name))


def single(model: nn.Module) -> contextlib.AbstractContextManager[Model]:
    def choose(row: Any) -> Callable[..., torch.Tensor]:
        if row.kind.name != "LLAMA":
            raise AbsentError(f"{row.example} rounds once itself")
        return lambda x, weight, eps: functional.rms_norm(x, weight.shape, weight, eps)

    return _swapped(model, choose)


def liger(model: nn.Module) -> contextlib.AbstractContextManager[Model]:
    if next(model.parameters()).device.type != "cuda":
        raise AbsentError("Liger needs a CUDA device")
    apply = module("liger_kernel.ops.rms_norm", "Liger").LigerRMSNormFunction.apply
    modes = {"LLAMA": (0.0, "llama", False), "GEMMA": (1.0, "gemma", False)}  # offset, casting mode, in place

    def choose(row: Any) -> Callable[..., torch.Tensor]:
        if row.kind.name not in modes:
            raise AbsentError(f"Liger has no casting mode for {row.example}")
        return lambda x, weight, eps: apply(x, weight, eps, *modes[row.kind.name])

    return _swapped(model, choose)


def ours(
    model: nn.Module, *, fuse_residual: bool = False, fuse_qk_rope: bool = False
) -> contextlib.AbstractContextManager[Model]:
    from pallas_norm_torch import patched

    @contextlib.contextmanager
    def replaced() -> Iterator[Model]:
        with patched(model, fuse_residual=fuse_residual, fuse_qk_rope=fuse_qk_rope) as report:
            if report.left and not fuse_residual:
                raise ValueError(f"patched left norms as they are: {report}")
            yield model

    return replaced()


def providers(model: nn.Module, *, compile_model: bool, dynamic: bool | None = None) -> dict[str, Provider]:
    """By name, what computes this model's norms: EXACT and EAGER first, since the others are measured against them."""
    found: dict[str, Provider] = {
        EXACT: exact,
        EAGER: contextlib.nullcontext,
        OURS: ours,
        FUSED: lambda model: ours(model, fuse_residual=True),
        SINGLE: single,
        LIGER: liger,
    }
    if compile_model:
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=dynamic)

        @contextlib.contextmanager
        def compiling(_: nn.Module) -> Iterator[Model]:
            # Past its limit of programs dynamo would run the model as it is, without a word.
            with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
                yield compiled

        found[COMPILED] = compiling
    return found


def entry(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(table)}")
    return table[name]


def named(names: str | None, found: dict[str, Provider]) -> list[str]:
    """Of a comma-separated list, or all."""
    chosen = list(found) if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in found]:
        raise ValueError(f"unknown providers: {', '.join(unknown)}; known are {', '.join(found)}")
    return chosen
