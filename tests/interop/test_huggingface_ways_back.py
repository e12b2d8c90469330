"""A patched model computes with its class's own forward wherever no kernel is launched, and sees what was put on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pallas_norm_torch import _launches, direct
from pallas_norm_torch.huggingface import patch, patched, unpatch
from tests.interop.launched import as_if_launched
from tests.interop.norm_classes import BF16, F16, F32, N, gemma, llama
from tests.interop.rstd import bits
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


def counted(monkeypatch: pytest.MonkeyPatch, owner: type) -> list[Any]:
    """The calls of a class's own forward."""
    calls, forward = list[Any](), owner.forward  # type: ignore[attr-defined]

    def counting(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        calls.append(hidden_states)
        return forward(self, hidden_states)

    monkeypatch.setattr(owner, "forward", counting)
    return calls


# --- the rule ---------------------------------------------------------------------------------------------------------


def plain(dtype: torch.dtype = BF16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(4, N, dtype=dtype), torch.ones(N, dtype=dtype)


def test_nothing_is_launched_on_a_cpu() -> None:
    assert not _launches.launched(*plain())


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_plain_operands_are_launched_where_there_is_a_kernel(dtype: torch.dtype) -> None:
    with as_if_launched():
        x, weight = plain(dtype)
        assert _launches.launched(x, weight)
        assert _launches.launched(x, nn.Parameter(weight))
        assert _launches.launched(x)
        assert _launches.launched(x, weight, x)


class Subclass(torch.Tensor):
    pass


UNUSUAL = {
    "float64 x": lambda x, w: (x.double(), w),
    "float64 weight": lambda x, w: (x, w.double()),
    "integers": lambda x, w: (x.int(), w),
    "float8": lambda x, w: (x.to(torch.float8_e4m3fn), w),
    "a lazily negated x": lambda x, w: (torch._neg_view(x), w),
    "a lazily negated weight": lambda x, w: (x, torch._neg_view(w)),
    "a subclass": lambda x, w: (x.as_subclass(Subclass), w),
    "a subclass as the weight": lambda x, w: (x, w.as_subclass(Subclass)),
    "meta": lambda x, w: (x.to("meta"), w.to("meta")),
    "a weight elsewhere": lambda x, w: (x, w.to("meta")),
    "a weight that is broadcast": lambda x, w: (x, w[:1]),
    "a weight of two axes": lambda x, w: (x, w[None]),
    "no axis": lambda x, w: (x[0, 0], None),
    "empty rows": lambda x, w: (x[:, :0], None),
    "sparse": lambda x, w: (x.to_sparse(), w),
    "a zero tensor": lambda x, w: (torch._efficientzerotensor(x.shape, dtype=x.dtype), w),
    "no tensor": lambda x, w: (None, w),
    "a proxy": lambda x, w: (torch.fx.Proxy(torch.fx.Graph().placeholder("x")), w),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_operands_are_not(name: str) -> None:
    with as_if_launched():
        assert not _launches.launched(*UNUSUAL[name](*plain()))


def test_tensors_of_inference_mode_train_in_its_own_forward() -> None:
    """Autograd cannot save them, but what it computes from them."""
    with as_if_launched():
        with torch.inference_mode():
            x = torch.randn(4, N)
            assert _launches.launched(x, torch.ones(N))
        assert not _launches.launched(x, torch.ones(N))
        with torch.no_grad():
            assert _launches.launched(x, torch.ones(N))
        module = llama()
        patch(module)
        module(x).sum().backward()
        assert module.weight.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own, for its formulas
def test_forward_mode_is_its_own_forward_s() -> None:
    module, x = llama(), torch.randn(4, N)
    expected = torch.func.jvp(module, (x,), (x,))
    with as_if_launched(), patched(module):
        actual = torch.func.jvp(module, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            dual = module(torch.autograd.forward_ad.make_dual(x, x))
            tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert tangent is not None
    assert torch.equal(tangent, expected[1])


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "mamba2", "qwen3-next", "diffllama"])
def test_a_patched_model_on_a_cpu_computes_as_before(name: str, *, fuse_residual: bool) -> None:
    """Bit for bit: it is the same code."""
    model = build(name, "bf16")
    own = logits(model, name)
    patch(model, fuse_residual=fuse_residual)
    assert same(logits(model, name), own)


def test_a_patched_model_trains_on_a_cpu_as_before(*, fuse_residual: bool) -> None:
    def gradients(model: Any) -> list[torch.Tensor]:
        batch = tokens("llama")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    model = build("llama", "f32").train()
    expected = gradients(copy.deepcopy(model))
    patch(model, fuse_residual=fuse_residual)
    assert all(torch.equal(*pair) for pair in zip(gradients(model), expected, strict=True))


def test_cast_to_float64_after_the_patch(*, fuse_residual: bool) -> None:
    model = build("llama", "f32")
    patch(model, fuse_residual=fuse_residual)
    model.double()
    with as_if_launched():
        replaced = logits(model, "llama")
    unpatch(model)
    assert torch.equal(replaced, logits(model, "llama"))


def test_symbolic_trace_of_a_patched_norm() -> None:
    module = nn.Sequential(llama(), gemma().float())
    patch(module)
    with as_if_launched():
        graph = torch.fx.symbolic_trace(nn.Sequential(*module))
    x = torch.randn(4, N)
    assert torch.equal(graph(x), module(x))


def test_compiled_programs_keep_the_operator() -> None:
    """On every device: the compiler would drop the rounding inside its own forward."""
    torch.compiler.reset()
    module = llama().bfloat16()
    patch(module)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x = torch.randn(4, N).bfloat16()
    torch.compile(module, backend=backend, fullgraph=True)(x)
    assert "pallas_norm.rms_norm" in str(graphs[0].code)
    exported = torch.export.export(module, (x,))
    assert "pallas_norm.rms_norm" in str(exported.graph)
    torch.compile(module.double(), backend=backend, fullgraph=True)(x.double())
    assert "pallas_norm.rms_norm" not in str(graphs[1].code)


# --- what was put on a norm -------------------------------------------------------------------------------------------


def test_a_forward_set_on_the_norm_of_a_fused_layer() -> None:
    model: Any = build("llama", "bf16")
    patch(model, fuse_residual=True)
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = torch.zeros_like
    with as_if_launched():
        fused = logits(model, "llama")
    patch(model)
    with as_if_launched():
        assert same(fused, logits(model, "llama"))


def test_global_hooks_see_every_norm() -> None:
    model = build("llama", "bf16")
    patch(model, fuse_residual=True)
    seen: list[Any] = []
    with as_if_launched():
        for register in (
            nn_module.register_module_forward_hook,
            nn_module.register_module_forward_pre_hook,
        ):
            handle = register(lambda module, *_: seen.append(module) if isinstance(module, LlamaRMSNorm) else None)
            logits(model, "llama")
            handle.remove()
            assert len(seen) == 5
            seen.clear()


def test_a_class_with_its_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "bf16")
    patch(model, fuse_residual=True)
    seen: list[Any] = []

    def call(self: Any, *arguments: Any) -> Any:
        seen.append(self)
        return nn.Module.__call__(self, *arguments)

    monkeypatch.setattr(LlamaRMSNorm, "__call__", call)
    with as_if_launched():
        logits(model, "llama")
    assert len(seen) == 5


def test_a_compiled_norm_of_a_fused_layer() -> None:
    model: Any = build("llama", "bf16")
    patch(model, fuse_residual=True)
    seen: list[Any] = []
    model.model.layers[0].post_attention_layernorm._compiled_call_impl = lambda x: seen.append(x) or x
    with as_if_launched():
        logits(model, "llama")
    assert len(seen) == 1


def test_a_parametrized_weight_of_a_fused_layer() -> None:
    """A later parametrization changes the weight, and the class; both are seen."""
    model: Any = build("llama", "bf16")
    patch(model, fuse_residual=True)
    norm = model.model.layers[0].post_attention_layernorm

    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())
    with as_if_launched():
        fused = logits(model, "llama")
        patch(model)
        assert same(logits(model, "llama"), fused)


def test_a_helper_hidden_by_the_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the patch it is left; after it, its own forward runs, which calls what was set."""
    module: Any = gemma()
    module._norm = torch.zeros_like
    (left,) = patch(module).left
    assert left.reason == (
        "its _norm was set on the instance and hides that of its class: delete it, or leave the norm"
    )
    del module._norm
    assert patch(module).replaced == {"GemmaRMSNorm": 1}
    module._norm = torch.zeros_like
    with as_if_launched():
        assert not module(torch.randn(4, N).bfloat16()).count_nonzero()


def test_a_class_whose_forward_is_replaced_after_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = llama()
    patch(module)
    calls = counted(monkeypatch, LlamaRMSNorm)
    with as_if_launched():
        module(torch.randn(4, N))
    assert len(calls) == 1


# --- torch.nn.RMSNorm -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_the_default_eps_of_torch(dtype: torch.dtype) -> None:
    """finfo(float32).eps, for 16 bits too, on rows so small that another would show."""
    module = nn.RMSNorm(N).to(dtype)
    x = (1e-3 * torch.randn(64, N, generator=torch.Generator().manual_seed(0))).to(dtype)
    with torch.no_grad():
        own = module(x)
        assert patch(module).replaced == {"RMSNorm": 1}
        with as_if_launched():
            replaced = module(x)
    assert (bits(replaced).int() - bits(own).int()).abs().max() <= (16 if dtype is F32 else 1)


def test_under_autocast_torch_s_own_module_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch 2.12 on its operator is on CUDA's list of those in float32."""
    module, x = nn.RMSNorm(N).bfloat16(), torch.randn(4, N).bfloat16()
    patch(module)
    calls: list[Any] = []
    with as_if_launched():
        monkeypatch.setattr(nn.functional, "rms_norm", lambda *operands: calls.append(operands) or operands[0])
        module(x)
        assert not calls
        with torch.autocast("cpu"):
            module(x)
        assert len(calls) == 1


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_where_the_norms_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleList([llama(), llama(), llama()])
    assert patch(model).runs == {"in their own forward: they are on cpu, and the kernels take CUDA tensors": 3}
    model.double()
    assert patch(model).runs == {
        "in their own forward: they are in float64, and the kernels take bfloat16, float16 and float32": 3
    }
    assert patch(llama().to("meta")).runs == {
        "in their own forward: they are on meta, and the kernels take CUDA tensors": 1
    }


def test_the_report_asks_what_a_launch_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    old = "cuda:0 has compute capability 7.5; the kernels need 8.0 (Ampere) or newer"
    reasons = iter([None, old])
    monkeypatch.setattr(direct, "unavailable", lambda n, device, dtype: next(reasons))
    module = nn.Module()
    module.weight = torch.empty(0)
    monkeypatch.setattr(nn.Module, "parameters", lambda self, recurse=True: iter([OnCuda()]))
    assert _launches.place(module, None) == "with kernels on cuda:0"
    assert _launches.place(module, None) == f"in their own forward: {old}"


class OnCuda:
    dtype, shape, device = BF16, (N,), torch.device("cuda:0")
