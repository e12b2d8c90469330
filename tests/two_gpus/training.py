"""DDP and FSDP2 of a patched Llama on two ranks, against the unpatched model on the same ranks.

`python -m tests.two_gpus.ranks training`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import pallas_norm_torch as pn
from tests.interop.cases import assert_same
from tests.two_gpus import known
from tests.two_gpus.distances import Training, assert_training_near
from tests.two_gpus.ranks import WORLD, Rank

GPU = torch.cuda.device_count() >= WORLD
LAYERS, HIDDEN, VOCABULARY, TOKENS = (4, 512, 512, 64) if GPU else (2, 64, 96, 16)
STEPS = 5 if GPU else 3
BF16 = torch.bfloat16
PREFIXES = "module.", "_orig_mod."


def llama(rank: Rank, dtype: torch.dtype) -> Any:
    """Weights are drawn and rounded to bfloat16 first, so the float32 model has the same."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    for name, value in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(value, 0.5, 1.5)
    return model.bfloat16().to(dtype).to(rank.device)


def whole(gradient: Any) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().float().clone()


def trained(rank: Rank, model: Any) -> Training:
    draw = torch.Generator().manual_seed(1 + rank.number)  # every rank its own data
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        tokens = torch.randint(VOCABULARY, (4, TOKENS), generator=draw).to(rank.device)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        if step == 0:
            for name, value in model.named_parameters():
                assert value.grad is not None, name
                for prefix in PREFIXES:
                    name = name.removeprefix(prefix)
                gradients[name] = whole(value.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return Training(losses, gradients)


def patch(model: Any, *, fused: bool = False) -> None:
    report = pn.patch(model, fuse_residual=fused)
    assert dict(report.replaced) == {"LlamaRMSNorm": 2 * LAYERS + 1}, str(report)
    assert not report.left, str(report)
    assert sum(report.fused.values()) == (LAYERS if fused else 0), str(report)
    if GPU:
        assert report.runs, str(report)
        assert all(how.startswith("with kernels on cuda") for how in report.runs), str(report)


def ddp(rank: Rank, dtype: torch.dtype = BF16, *, patched: bool, fused: bool = False) -> Training:
    model = llama(rank, dtype)
    if patched:
        patch(model, fused=fused)
    return trained(rank, nn.parallel.DistributedDataParallel(model, device_ids=[rank.number] if GPU else None))


def fsdp(
    rank: Rank,
    dtype: torch.dtype = torch.float32,
    *,
    patched: str = "never",
    fused: bool = False,
    compiled: bool = False,
    mixed: bool = True,
) -> Training:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = llama(rank, dtype)
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32) if mixed else MixedPrecisionPolicy()
    if patched == "before":
        patch(model, fused=fused)
    for layer in model.model.layers:
        fully_shard(layer, mesh=rank.mesh, mp_policy=policy)
    fully_shard(model, mesh=rank.mesh, mp_policy=policy)
    if patched == "after":
        patch(model, fused=fused)
    return trained(rank, torch.compile(model) if compiled else model)


@functools.cache
def exact(rank: Rank) -> Training:
    return ddp(rank, torch.float32, patched=False)


@functools.cache
def own_ddp(rank: Rank) -> Training:
    return ddp(rank, patched=False)


@functools.cache
def own_fsdp(rank: Rank, dtype: torch.dtype, mixed: bool) -> Training:  # noqa: FBT001
    return fsdp(rank, dtype, mixed=mixed)


def check_ddp(rank: Rank, *, fused: bool) -> str:
    return assert_training_near(ddp(rank, patched=True, fused=fused), own_ddp(rank), exact(rank))


def check_fsdp(rank: Rank, *, dtype: torch.dtype = torch.float32, mixed: bool = True, **options: Any) -> str:
    ours = fsdp(rank, dtype, mixed=mixed, **options)
    precision = BF16 if mixed else dtype
    return assert_training_near(ours, own_fsdp(rank, dtype, mixed), exact(rank), precision)


def bits_on_both(rank: Rank) -> None:
    """Of a patched norm module, forward and backward, and of random operands."""
    module = llama(rank, BF16).model.norm
    pn.patch(module)
    draw = torch.Generator().manual_seed(3)
    values = (torch.randn(200, HIDDEN, generator=draw).to(BF16).to(rank.device) for _ in range(2))
    x, dy = values
    x.requires_grad_()
    y = module(x)
    y.backward(dy)
    for value in (y.detach(), x.grad, module.weight.grad):
        assert value is not None
        one, other = rank.gathered(value)
        assert_same(one, other)
    known.check_all(known.of(rank.device, 4096 if GPU else 64))


def wrong_is_found(rank: Rank) -> None:
    """A model whose last norm alone has a weight that is a tenth too large is further away than the bound."""
    model = llama(rank, BF16)
    patch(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    ours = trained(rank, nn.parallel.DistributedDataParallel(model, device_ids=[rank.number] if GPU else None))
    try:
        assert_training_near(ours, own_ddp(rank), exact(rank))
    except AssertionError:
        return
    raise AssertionError("a norm whose weight is a tenth too large is within the bound")


RankCheck = tuple[str, Callable[[Rank], object]]
CHECKS: list[RankCheck] = [
    ("bits of a norm on both ranks", bits_on_both),
    ("DDP", functools.partial(check_ddp, fused=False)),
    ("DDP, fused", functools.partial(check_ddp, fused=True)),
    ("a wrong norm is found", wrong_is_found),
    ("FSDP2, mixed precision, patched before", functools.partial(check_fsdp, patched="before")),
    ("FSDP2, mixed precision, patched after", functools.partial(check_fsdp, patched="after")),
    ("FSDP2, mixed precision, fused before", functools.partial(check_fsdp, patched="before", fused=True)),
    ("FSDP2, mixed precision, fused after", functools.partial(check_fsdp, patched="after", fused=True)),
    ("FSDP2, bfloat16", functools.partial(check_fsdp, patched="before", mixed=False, dtype=BF16)),
    ("FSDP2, float32", functools.partial(check_fsdp, patched="before", mixed=False)),
    ("FSDP2, compiled", functools.partial(check_fsdp, patched="before", compiled=True)),
    ("FSDP2, compiled, fused after", functools.partial(check_fsdp, patched="after", compiled=True, fused=True)),
]
