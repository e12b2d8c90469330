"""Patched models in the company of other libraries, and of torch's own ways to call a module."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pallas_norm_torch.huggingface import patch, patched, unpatch
from tests.interop import zoo
from tests.interop.launched import as_if_launched, kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import BF16, F32, N, llama
from tests.interop.tiny_models import (
    build,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
    tokens,
)


@pytest.fixture(params=[False, True], ids=["separate", "fused"])
def fuse_residual(request: pytest.FixtureRequest) -> bool:
    return request.param


def patched_logits(*, fuse_residual: bool) -> torch.Tensor:
    model = build("llama", "bf16")
    patch(model, fuse_residual=fuse_residual)
    return logits(model, "llama")


# --- accelerate -------------------------------------------------------------------------------------------------------

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")


def dispatched(model: nn.Module, how: str, folder: Any) -> nn.Module:
    """With accelerate's hooks on every module."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    if how == "dispatch":
        return accelerate.dispatch_model(model, dict.fromkeys(PARTS, "cpu"), force_hooks=True, main_device="cpu")
    if how == "cpu offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, folder, execution_device="cpu")


@pytest.mark.parametrize("how", ["dispatch", "cpu offload", "disk offload"])
@pytest.mark.parametrize("first", ["patch", "hooks"])
def test_accelerate(tmp_path: Any, how: str, first: str, *, fuse_residual: bool) -> None:
    """Patched before or after: the hooks stay and run, and unpatch gives back what was there."""
    expected, own = patched_logits(fuse_residual=fuse_residual), logits(build("llama", "bf16"), "llama")
    model: Any = build("llama", "bf16")
    if first == "patch":
        patch(model, fuse_residual=fuse_residual)
    dispatched(model, how, tmp_path)
    norm = model.model.layers[0].post_attention_layernorm
    hooks = [norm._hf_hook, norm.forward]
    if first == "hooks":
        report = patch(model, fuse_residual=fuse_residual)
        assert report.replaced == {"LlamaRMSNorm": 5}
        assert report.fused == ({"LlamaDecoderLayer": 2} if fuse_residual else {})
        assert not report.left
        assert set(report.runs) == {"in their own forward: they are on cpu, and the kernels take CUDA tensors"}
    assert [norm._hf_hook, norm.forward] == hooks
    assert same(logits(model, "llama"), expected)
    restored = unpatch(model)
    assert not restored.left
    assert restored.restored["LlamaRMSNorm"] == 5
    assert [norm._hf_hook, norm.forward] == hooks
    assert type(norm) is LlamaRMSNorm
    assert same(logits(model, "llama"), own)


def test_accelerate_s_hooks_see_their_norm(*, fuse_residual: bool) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    model: Any = build("llama", "bf16")
    seen: list[Any] = []

    class Seeing(accelerate.hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            seen.append(module)
            return output

    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            accelerate.hooks.add_hook_to_module(module, Seeing())
    patch(model, fuse_residual=fuse_residual)
    assert same(logits(model, "llama"), patched_logits(fuse_residual=fuse_residual))
    assert len(seen) == 5
    accelerate.hooks.remove_hook_from_submodules(model)
    assert same(logits(model, "llama"), patched_logits(fuse_residual=fuse_residual))
    assert unpatch(model).restored["LlamaRMSNorm"] == 5


def test_a_forward_below_accelerate_s_hook_that_is_not_the_class_s() -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate: pip install accelerate")
    module: Any = llama()
    module.forward = lambda x: x + 1
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    (left,) = patch(module).left
    assert left.reason.startswith("its forward was bound to the instance by something else")
    assert torch.equal(module(torch.ones(N)), torch.full((N,), 2.0))


# --- peft -------------------------------------------------------------------------------------------------------------


peft_warns = pytest.mark.filterwarnings("ignore")  # of transformers' new names and of layers that it does not know


def peft() -> Any:
    return pytest.importorskip("peft", reason="needs peft: pip install peft")


def adapted(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft().LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, **options)
    return peft().get_peft_model(model, config)


@peft_warns
@pytest.mark.parametrize("first", ["patch", "adapter"])
def test_adapters_beside_norms(first: str, *, fuse_residual: bool) -> None:
    """LoRA, disabled and merged: what the patched model gives without peft, and the same modules."""
    expected: Any = adapted(build("llama", "f32"))
    patch(expected, fuse_residual=fuse_residual)
    model = build("llama", "f32")
    if first == "patch":
        patch(model, fuse_residual=fuse_residual)
    model = adapted(model)
    if first == "adapter":
        assert patch(model, fuse_residual=fuse_residual).replaced == {"LlamaRMSNorm": 5}
    assert same(logits(model, "llama"), logits(expected, "llama"))
    plain = build("llama", "f32")
    patch(plain, fuse_residual=fuse_residual)
    with model.disable_adapter():
        assert same(logits(model, "llama"), logits(plain, "llama"))
    merged = model.merge_and_unload()
    assert unpatch(merged).restored["LlamaRMSNorm"] == 5


@peft_warns
def test_norms_that_are_saved_with_the_adapter() -> None:
    """peft wraps them, so a layer cannot read the norm's weight; the report says so."""
    model = adapted(build("llama", "f32"), modules_to_save=["post_attention_layernorm"])
    own = logits(model, "llama")
    with patched(model, fuse_residual=True) as report:
        assert report.replaced == {"LlamaRMSNorm": 7}
        assert not report.fused
        assert {one.reason for one in report.left} == {
            "its post_attention_layernorm is a ModulesToSaveWrapper around a norm, so the addition before it stays "
            "outside"
        }
        assert (logits(model, "llama") - own).abs().max() < 1e-4
        model.train()
        model(**tokens("llama"), labels=tokens("llama")["input_ids"]).loss.backward()
    saved = {name for name, one in model.named_parameters() if one.grad is not None and "modules_to_save" in name}
    assert len(saved) == 2


@peft_warns
def test_tuned_norms() -> None:
    model = peft().get_peft_model(build("llama", "f32"), peft().LNTuningConfig(target_modules=["input_layernorm"]))
    assert patch(model, fuse_residual=True).replaced == {"LlamaRMSNorm": 7}
    model(**tokens("llama"), labels=tokens("llama")["input_ids"]).loss.backward()
    assert sum(one.grad is not None for one in model.parameters()) == 2
    assert unpatch(model.merge_and_unload()).restored["LlamaRMSNorm"] == 5


# --- torch ------------------------------------------------------------------------------------------------------------


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


def test_static_cache_and_generation(*, fuse_residual: bool) -> None:
    model: Any = build("llama", "bf16")
    prompt = tokens("llama", 6)["input_ids"]
    options: Any = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "do_sample": False}
    options |= {"eos_token_id": None, "pad_token_id": 0}
    patch(model, fuse_residual=fuse_residual)
    expected = model.generate(prompt, **options)
    assert torch.equal(model.generate(prompt, cache_implementation="static", disable_compile=True, **options), expected)


@pytest.mark.parametrize(
    "name", ["OtherNamesRMSNorm", "GemmaLike", "FromDataclass", "NoWeightRMSNorm", "BiasedRMSNorm"]
)
def test_a_norm_known_by_computation_is_compiled_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    module = zoo.ZOO[name][0](N).to(BF16)
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("make", [llama, lambda: zoo.OtherNamesRMSNorm(N)], ids=["source", "computation"])
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
