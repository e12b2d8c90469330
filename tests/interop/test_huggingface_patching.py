"""What patch leaves as it is: parameters, copies, hooks, other modules; and what unpatch gives back."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from typing import Any

import pytest
import torch
import transformers

from pallas_norm_torch import _changes, _replacing
from pallas_norm_torch.huggingface import patch, patched, unpatch
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.tiny_models import (
    build,
    distance,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
    spread,
    tokens,
)

# --- what it is -------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["llama", "gemma", "t5", "gemma3n"])
def test_parameters_stay_where_they_are(name: str) -> None:
    model = build(name, "bf16")

    def description() -> Any:
        state = model.state_dict()
        return (
            {key: (value.data_ptr(), value.dtype) for key, value in state.items()},
            state._metadata,
            [(key, id(value)) for key, value in model.named_modules()],
            [(key, id(value)) for key, value in model.named_parameters()],
            [key for key, _ in model.named_buffers()],
            repr(model),
        )

    before = description()
    patch(model, fuse_residual=True)
    assert description() == before
    unpatch(model)
    assert description() == before


def test_other_modules_are_untouched() -> None:
    model: Any = build("llama", "f32")
    before = {module: (type(module), dict(vars(module))) for module in model.modules()}
    patch(model)
    changed = {module for module, (owner, _) in before.items() if type(module) is not owner}
    assert {type(module).__name__ for module in changed} == {"LlamaRMSNorm"}
    assert all(vars(module) == members for module, (_, members) in before.items())
    norm = model.model.norm
    assert isinstance(norm, transformers.models.llama.modeling_llama.LlamaRMSNorm)
    assert type(norm).__name__ == "LlamaRMSNorm"
    unpatch(model)
    assert all(type(module) is owner for module, (owner, _) in before.items())


def test_twice_is_once() -> None:
    model = build("qwen3", "bf16")
    first = patch(model)
    classes = [type(module) for module in model.modules()]
    second = patch(model)
    assert first.replaced == second.already == {"Qwen3RMSNorm": 9}
    assert not second.replaced
    assert [type(module) for module in model.modules()] == classes


def test_fusing_can_be_taken_back() -> None:
    model = build("llama", "bf16")
    own = logits(model, "llama")
    assert patch(model, fuse_residual=True).fused == {"LlamaDecoderLayer": 2}
    assert not patch(model, fuse_residual=True).fused
    report = patch(model)
    assert report.restored == {"LlamaDecoderLayer": 2}
    assert report.already == {"LlamaRMSNorm": 5}
    assert unpatch(model).restored == {"LlamaRMSNorm": 5}
    assert same(logits(model, "llama"), own)


def test_reports_of_layers_that_are_not_fused() -> None:
    assert [one.reason for one in patch(build("olmo2", "f32"), fuse_residual=True).left] == [
        "its forward adds nothing just before a norm, or asks for gradients, or its source cannot be read, so no "
        "addition goes into a norm"
    ] * 2
    assert [one.reason for one in patch(build("llama4", "f32"), fuse_residual=True).left] == [
        "its Llama4TextRMSNorm has no residual form, so the addition before it stays outside"
    ] * 2


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fuse_residual", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str, *, fuse_residual: bool) -> None:
    """A copy is patched, has its own parameters, and is unpatched alone."""
    model: Any = build("llama", "bf16")
    own = logits(model, "llama")
    if how != "deepcopy":
        try:
            pickle.dumps(model)
        except (AttributeError, pickle.PicklingError) as error:
            pytest.skip(f"the model as transformers makes it cannot be pickled: {error}")  # where kernels is installed
    patch(model, fuse_residual=fuse_residual)
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert same(logits(twin, "llama"), logits(model, "llama"))
    with torch.no_grad():
        twin.model.norm.weight.zero_()
        twin.model.layers[0].post_attention_layernorm.weight.zero_()
    assert logits(twin, "llama").count_nonzero() == 0
    unpatch(twin)
    assert patch(model, fuse_residual=fuse_residual).already == {"LlamaRMSNorm": 5}
    unpatch(model)
    assert same(logits(model, "llama"), own)


def test_a_state_dict_moves_between_patched_and_unpatched() -> None:
    model, other = build("llama", "bf16"), build("llama", "bf16")
    patch(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(model.state_dict())
    patch(other)
    assert same(logits(other, "llama"), logits(model, "llama"))


def test_saved_as_a_checkpoint(tmp_path: Any) -> None:
    model: Any = build("llama", "bf16")
    patch(model, fuse_residual=True)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert str(unpatch(loaded)) == "found no RMSNorm"
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(same(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())


@pytest.mark.parametrize("fuse_residual", [False, True], ids=["separate", "fused"])
def test_hooks_run(*, fuse_residual: bool) -> None:
    """Those that were there and those that come later, also on a norm whose call fusing leaves out."""
    model: Any = build("llama", "bf16")
    first, second = (layer.post_attention_layernorm for layer in model.model.layers)
    seen: list[Any] = []
    first.register_forward_hook(lambda module, arguments, result: seen.append((module, result)))
    patch(model, fuse_residual=fuse_residual)
    second.register_forward_pre_hook(lambda module, arguments: seen.append((module, None)))
    expected = logits(model, "llama")
    assert [module for module, _ in seen] == [first, second]
    first._forward_hooks.clear()
    first.register_forward_hook(lambda module, arguments, result: result * 0)
    assert not same(logits(model, "llama"), expected)


def test_hidden_states_of_fused_layers() -> None:
    model: Any = build("qwen2", "bf16")
    patch(model)
    expected = model(**tokens("qwen2"), output_hidden_states=True).hidden_states
    patch(model, fuse_residual=True)
    fused = model(**tokens("qwen2"), output_hidden_states=True).hidden_states
    assert len(fused) == len(expected) == 3
    assert all(same(*pair) for pair in zip(fused, expected, strict=True))


def test_gradient_checkpointing_of_fused_layers() -> None:
    model: Any = build("llama", "f32").train()
    patch(model, fuse_residual=True)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(**tokens("llama"), use_cache=False).logits.square().mean().backward()
        return model.model.embed_tokens.weight.grad.clone()

    expected = gradient()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    calls: list[Any] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(None))
    assert torch.equal(gradient(), expected)
    assert len(calls) == 2  # computed again in the backward pass


def test_norm_restored_alone_inside_a_fused_layer() -> None:
    model: Any = build("llama", "bf16")
    patch(model, fuse_residual=True)
    expected = logits(model, "llama")
    for layer in model.model.layers:
        assert unpatch(layer.post_attention_layernorm).restored == {"LlamaRMSNorm": 1}
    assert _replacing.original(model.model.layers[0].post_attention_layernorm) is None
    assert distance(logits(model, "llama"), expected) <= spread(model, "llama")


# --- undoing ----------------------------------------------------------------------------------------------------------


def test_restored_after_an_exception() -> None:
    model = build("llama", "bf16")
    own = logits(model, "llama")
    with pytest.raises(KeyError, match="inside"), patched(model, fuse_residual=True):
        raise KeyError("inside")
    assert same(logits(model, "llama"), own)
    assert str(unpatch(model)) == "found no RMSNorm"


def test_patched_leaves_what_was_patched() -> None:
    model: Any = build("llama", "bf16")
    patch(model.model.norm)
    with patched(model, fuse_residual=True) as report:
        assert report.already == {"LlamaRMSNorm": 1}
    assert unpatch(model).restored == {"LlamaRMSNorm": 1}
    patch(model, fuse_residual=True)
    with patched(model) as report:
        assert report.restored == {"LlamaDecoderLayer": 2}
    assert unpatch(model).restored == {"LlamaDecoderLayer": 2, "LlamaRMSNorm": 5}


def test_nothing_is_half_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "bf16")
    before = [type(module) for module in model.modules()]
    apply, calls = _changes.Change.apply, iter(range(100))

    def fails_at_the_third(self: Any) -> None:
        if next(calls) == 2:
            raise RuntimeError("no memory")
        apply(self)

    monkeypatch.setattr(_changes.Change, "apply", fails_at_the_third)
    with pytest.raises(RuntimeError, match="no memory"):
        patch(model)
    assert [type(module) for module in model.modules()] == before


def test_unpatch_leaves_what_something_else_has_changed_since() -> None:
    """accelerate's hooks bind a forward that calls the one it found."""
    model: Any = build("llama", "bf16")
    patch(model)
    norm, bound, wrapped = model.model.norm, model.model.norm.forward, model.model.layers[0].input_layernorm
    norm.forward = functools.partial(bound)
    wrapped.__class__ = type("FSDPLlamaRMSNorm", (type(wrapped),), {})
    again, report = patch(model), unpatch(model)
    reasons = {
        "model.norm": "its forward was bound to the instance by something else (kernels, accelerate, Liger?): undo "
        "that first",
        "model.layers.0.input_layernorm": "its class was changed again after it had been replaced (fully_shard?): undo "
        "that first",
    }
    assert {one.name: one.reason for one in report.left} == reasons
    assert [one.reason for one in again.left] == [reasons["model.layers.0.input_layernorm"]]
    assert report.restored == {"LlamaRMSNorm": 3}
    norm.forward = bound  # what accelerate's remove_hook leaves
    wrapped.__class__ = type(wrapped).__bases__[0]
    assert unpatch(model).restored == {"LlamaRMSNorm": 2}
    assert "forward" not in vars(norm)


def test_classes_are_made_once() -> None:
    before = _replacing._norm_class.cache_info().currsize
    for _ in range(3):
        patch(build("llama", "bf16"))
    assert _replacing._norm_class.cache_info().currsize <= before + 1
