"""Two ranks: HF's tp_plan="auto" on Qwen3, SequenceParallel of a patched norm, DTensor placements one by one.

`python -m tests.two_gpus.ranks tensor_parallel`.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import pallas_norm_torch as pn
from tests.interop import dtensor_cases
from tests.interop.cases import assert_same
from tests.two_gpus import known
from tests.two_gpus.distances import Training, assert_near, assert_training_near
from tests.two_gpus.ranks import WORLD, Rank
from tests.two_gpus.training import RankCheck, llama, patch, whole

GPU = torch.cuda.device_count() >= WORLD
BF16 = torch.bfloat16
LAYERS = 2
SHAPE: dict[str, Any] = {
    "hidden_size": 512 if GPU else 64,
    "intermediate_size": 1024 if GPU else 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64 if GPU else 16,
    "vocab_size": 512 if GPU else 96,
}


def stored(rank: Rank) -> str:
    """The folder in which rank 0 has stored a Qwen3 in bfloat16, for both."""
    import transformers

    path: list[Any] = [None]
    if rank.number == 0:
        torch.manual_seed(0)
        path[0] = tempfile.mkdtemp(prefix="two-gpus-")
        transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SHAPE)).bfloat16().save_pretrained(path[0])
    dist.broadcast_object_list(path)
    assert os.path.isdir(path[0])
    return str(path[0])


def qwen3_by_plan(rank: Rank) -> str:
    """Logits of the patched model, of the unpatched one on the same ranks, and of one device in float32."""
    import transformers

    folder = stored(rank)
    tokens = torch.arange(64, device=rank.device).view(1, 64)

    def logits(dtype: torch.dtype, **options: Any) -> tuple[Any, torch.Tensor]:
        model: Any = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype, **options)
        if not options:
            model = model.to(rank.device)  # HF brings a model with a plan there itself
        return model, whole_logits(model)

    def whole_logits(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return whole(model(tokens, use_cache=False).logits)

    _, exact = logits(torch.float32)
    model, own = logits(BF16, tp_plan="auto")
    report = pn.patch(model)
    # Some versions of transformers bind the forward of q_norm and k_norm for their plan; those are left.
    left = [norm.name for norm in report.left]
    assert report.replaced["Qwen3RMSNorm"] + len(left) == 4 * LAYERS + 1, str(report)
    assert all(name.endswith(("q_norm", "k_norm")) for name in left), str(report)
    assert len(left) in (0, 2 * LAYERS), str(report)
    ours = whole_logits(model)
    share = assert_near("the logits", ours, own, exact)
    one, other = rank.gathered(ours)
    assert_same(one, other)
    pn.unpatch(model)
    assert_same(whole_logits(model), own)
    return f"{share:.2f} of the bound, {report.replaced['Qwen3RMSNorm']} norms replaced, {len(left)} left"


def sequence_parallel(rank: Rank, *, first: str) -> None:
    """A norm of a patched Llama over a split sequence. A replaced norm gives DTensors to its class's own forward."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    model = llama(rank, BF16)
    if first == "patch":
        patch(model)
    parallelize_module(model.model, rank.mesh, {"norm": SequenceParallel()})
    if first == "parallelize":
        patch(model)
    norm = model.model.norm
    n = norm.weight.numel()
    case = known.of(rank.device, n, 2 * 8)
    norm.weight.to_local().data.copy_(case.weight)  # replicated
    x, dy = case.x.view(2, 8, n), case.dy.view(2, 8, n)
    local = x.chunk(WORLD, dim=1)[rank.number].contiguous().requires_grad_()
    y = norm(local)
    assert isinstance(y, DTensor)
    case.check_forward(whole_of(y).view(2 * 8, n))
    y.to_local().backward(dy.chunk(WORLD, dim=1)[rank.number].contiguous())
    assert local.grad is not None
    dx = torch.cat(rank.gathered(local.grad), dim=1).view(2 * 8, n)
    # dweight is a sum of 16 integers of at most 3, so neither a rank's sum nor that of both is rounded.
    case.check_gradients(dx, whole_of(norm.weight.grad))


def whole_of(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor().detach()


def tensor_parallel_training(rank: Rank) -> str:
    """One step of a Llama whose linear layers are split, and its norms not: losses and the gradients of the norms."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def step(dtype: torch.dtype, *, split: bool, patched: bool) -> Training:
        model = llama(rank, dtype)
        if patched:
            patch(model)
        for layer in model.model.layers if split else ():
            plan = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
            parallelize_module(layer.mlp, rank.mesh, plan)
        draw = torch.Generator().manual_seed(5)  # the same data on both
        tokens = torch.randint(model.config.vocab_size, (2, 32), generator=draw).to(rank.device)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        norms = {name: whole(value.grad) for name, value in model.named_parameters() if "norm" in name}
        return Training([float(loss)], norms)

    ours, own = (step(BF16, split=True, patched=patched) for patched in (True, False))
    return assert_training_near(ours, own, step(torch.float32, split=False, patched=False))


def placement(case: Callable[[Any], None], rank: Rank) -> None:
    case(rank.mesh)


CHECKS: list[RankCheck] = [
    ("Qwen3 with tp_plan auto", qwen3_by_plan),
    ("SequenceParallel of a patched norm", functools.partial(sequence_parallel, first="patch")),
    ("SequenceParallel, patched after", functools.partial(sequence_parallel, first="parallelize")),
    ("tensor parallel training step", tensor_parallel_training),
    *(
        (f"DTensor: {name.replace('_', ' ')}", functools.partial(placement, case))
        for name, case in dtensor_cases.CASES.items()
    ),
]
