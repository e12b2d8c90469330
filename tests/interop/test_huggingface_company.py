"""Patched models in the company of torch's own ways to call a module, to train, compile, copy and pickle it."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch

from pallas_norm_torch.huggingface import patch
from tests.interop.launched import as_if_launched, kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import BF16, F32, N, llama
from tests.interop.tiny_models import (
    build,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
    separate_and_fused,
    tokens,
)
from tests.interop.zoo import ZOO
from tests.interop.zoo_of_two_roundings import OtherNamesRMSNorm


@separate_and_fused
def test_functional_call(*, fuse_residual: bool) -> None:
    model, other = build("llama", "bf16"), build("llama", "bf16")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    patch(model, fuse_residual=fuse_residual)
    patch(other, fuse_residual=fuse_residual)
    with torch.no_grad():
        called = torch.func.functional_call(model, dict(other.named_parameters()), kwargs=tokens("llama"))
    assert same(called.logits, logits(other, "llama"))


def test_ensembles_of_a_patched_norm() -> None:
    """torch.func.stack_module_state and vmap over the members."""
    members = [llama(), llama(), llama()]
    for number, member in enumerate(members):
        member.weight.data += number
        patch(member)
    parameters, buffers = torch.func.stack_module_state(members)
    x = torch.randn(4, N)

    def call(parameters: Any, buffers: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(members[0], (parameters, buffers), (x,))

    y = torch.func.vmap(call, (0, 0, None))(parameters, buffers, x)
    assert torch.equal(y, torch.stack([member(x) for member in members]))


@separate_and_fused
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(*, use_reentrant: bool, fuse_residual: bool) -> None:
    model: Any = build("llama", "f32").train()
    patch(model, fuse_residual=fuse_residual)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**tokens("llama"), use_cache=False).logits.square().mean().backward()
        return model.model.embed_tokens.weight.grad.clone()

    expected = gradient()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    assert torch.equal(gradient(), expected)


@separate_and_fused
def test_static_cache_and_generation(*, fuse_residual: bool) -> None:
    model: Any = build("llama", "bf16")
    prompt = tokens("llama", 6)["input_ids"]
    options: Any = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    patch(model, fuse_residual=fuse_residual)
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", disable_compile=True, **options), expected)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "name", ["OtherNamesRMSNorm", "GemmaLike", "FromDataclass", "NoWeightRMSNorm", "BiasedRMSNorm"]
)
def test_a_norm_known_by_computation_is_compiled_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    module = ZOO[name][0](N).to(BF16)
    patch(module)
    x = torch.randn(4, N, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = module(x)
    assert same(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)


def test_a_frozen_weight_and_a_frozen_x() -> None:
    module, x = llama(), torch.randn(4, N)
    patch(module)
    module.weight.requires_grad_(requires_grad=False)
    assert not module(x).requires_grad
    (dx,) = torch.autograd.grad(module(x.requires_grad_()).sum(), x)
    module.weight.requires_grad_()
    (dweight,) = torch.autograd.grad(module(x.detach()).sum(), module.weight)
    assert dx.count_nonzero()
    assert dweight.count_nonzero()


def _unpickled(data: bytes) -> tuple[str, list[float]]:
    module = pickle.loads(data)
    return type(module).__name__, module(torch.ones(1, N)).flatten().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, lambda: OtherNamesRMSNorm(N)], ids=["source", "computation"])
def test_in_another_process(make: Any) -> None:
    """Spawned: it imports what the pickle names, and normalises there."""
    module = make()
    patch(module)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        name, values = pool.apply(_unpickled, (pickle.dumps(module),))
    assert name == type(module).__name__
    assert values == pytest.approx(module(torch.ones(1, N)).flatten().tolist(), rel=1e-6)


def test_an_ensemble_of_copies_is_trained_apart() -> None:
    model = build("llama", "f32")
    patch(model, fuse_residual=True)
    twin: Any = copy.deepcopy(model)
    twin(**tokens("llama"), labels=tokens("llama")["input_ids"]).loss.backward()
    assert all(one.grad is None for one in model.parameters())
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))
    assert same(logits(model, "llama"), logits(twin, "llama"))


def test_its_own_forward_and_the_replaced_one_take_turns() -> None:
    """One module, on devices with a kernel and without."""
    module, x = llama().bfloat16(), torch.randn(4, N).bfloat16()
    own = module(x)
    patch(module)
    replaced = module(x)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("pallas_norm_torch._launches.has_kernel", lambda x: False)
        assert torch.equal(module(x), own)
    with as_if_launched():
        assert torch.equal(module(x), replaced)
    assert module.double()(x.double()).dtype == torch.float64
    assert module.float().weight.dtype == F32
