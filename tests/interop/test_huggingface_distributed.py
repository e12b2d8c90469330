"""Patched models under FSDP2, DDP and sequence parallelism, in one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from pallas_norm_torch.huggingface import patch, unpatch
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import BF16, N, llama
from tests.interop.tiny_models import (
    build,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
    tokens,
)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_distributed_tensors_go_through_its_own_forward(mesh: Any, placement: Any) -> None:
    module, x = llama().to(BF16), torch.randn(4, 8, N, generator=torch.Generator().manual_seed(0)).to(BF16)
    own = module(x)
    patch(module)
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Replicate()]))
    y: Any = module(distribute_tensor(x, mesh, [placement]))
    assert isinstance(y, DTensor)
    assert y.placements == (placement,)
    assert same(y.full_tensor(), own)
    y.sum().backward()
    assert isinstance(module.weight.grad, DTensor)


def test_sequence_parallel(mesh: Any) -> None:
    module, x = nn.Sequential(llama().to(BF16)), torch.randn(4, 8, N).to(BF16)
    own = module(x)
    patch(module)
    parallelize_module(module, mesh, {"0": SequenceParallel()})
    y: Any = module(x)
    assert same(y.full_tensor() if isinstance(y, DTensor) else y, own)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fuse_residual", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("first", ["patch", "shard"])
def test_fully_shard(mesh: Any, first: str, *, fuse_residual: bool) -> None:
    """FSDP2 changes the class of what it wraps: the layers, and the model."""
    expected: Any = build("llama", "f32")
    patch(expected, fuse_residual=fuse_residual)
    model: Any = copy.deepcopy(build("llama", "f32"))
    if first == "patch":
        patch(model, fuse_residual=fuse_residual)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if first == "shard":
        report = patch(model, fuse_residual=fuse_residual)
        assert report.replaced == {"LlamaRMSNorm": 5}
    assert same(logits(model, "llama"), logits(expected, "llama"))

    def loss(model: Any) -> torch.Tensor:
        batch = tokens("llama")
        return model(**batch, labels=batch["input_ids"]).loss

    loss(model).backward()
    loss(expected).backward()
    for (name, one), (_, other) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one.grad.full_tensor(), other.grad), name


def test_ddp(mesh: Any) -> None:
    del mesh
    expected, model = build("llama", "f32"), build("llama", "f32")
    patch(expected, fuse_residual=True)
    patch(model, fuse_residual=True)
    wrapped = nn.parallel.DistributedDataParallel(model)
    batch = tokens("llama")
    for one in (wrapped, expected):
        one(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(
        torch.equal(one.grad, other.grad)
        for one, other in zip(model.parameters(), expected.parameters(), strict=True)
        if one.grad is not None and other.grad is not None
    )
    assert unpatch(wrapped).restored == {"LlamaRMSNorm": 5, "LlamaDecoderLayer": 2}
