"""Hugging Face's `kernels` binds this library's layers, from this process, and leaves what `patch` has replaced."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.dependency_versions_table import deps
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated
from transformers.utils.import_utils import is_kernels_available

from pallas_norm_torch import _forwards, _replacing, hub_kernels
from pallas_norm_torch.huggingface import patch, patched, unpatch
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.tiny_models import (
    build,
    logits,
    one_thread,  # noqa: F401 (a fixture of every test here)
    same,
)

try:
    import kernels
except ModuleNotFoundError:
    kernels = None

needs_kernels = pytest.mark.skipif(kernels is None, reason=f"needs kernels: pip install '{deps['kernels']}'")
needs_transformers_with_it = pytest.mark.skipif(
    not is_kernels_available(),
    reason=f"needs what this transformers accepts: pip install '{deps['kernels']}'",
)
NAMED = {
    LlamaRMSNorm: "RMSNorm",
    GptOssRMSNorm: "RMSNorm",
    GemmaRMSNorm: "RMSNormZeroCentered",
    Qwen3NextRMSNormGated: "RMSNormGated",
}


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers names them when it accepts the installed kernels."""
    for owner, name in NAMED.items():
        monkeypatch.setattr(owner, "kernel_layer_name", name, raising=False)


def test_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the module needs none; using it names the cure."""
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "kernels":
            raise ModuleNotFoundError("No module named 'kernels'", name="kernels")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError) as error:
        hub_kernels.kernelize(nn.Linear(1, 1))
    assert str(error.value) == (
        "kernels is not installed; needed the version that your transformers accepts (for 5.17: "
        "pip install 'kernels>=0.16,<0.17'; for 5.24: 'kernels>=0.18.2,<0.19'), or use pallas_norm_torch.patch, "
        "which needs none"
    )
    assert error.value.name == "kernels"


def test_patched_classes_have_no_name_for_kernels(named: None) -> None:
    """What kernelize asks for, with hasattr on the class."""
    module = LlamaRMSNorm(64)
    with patched(module):
        assert not hasattr(type(module), "kernel_layer_name")
        assert getattr(module, "kernel_layer_name", None) is None
    assert type(module).kernel_layer_name == "RMSNorm"


def test_layers_are_stateless() -> None:
    """What kernels demands of a layer: no constructor, no other members, the parameters of what it replaces."""
    allowed = {name for name in dir(nn.Module)} | {"can_torch_compile", "has_backward"}
    for layer in hub_kernels.LAYERS:
        assert layer.__init__ is nn.Module.__init__
        assert set(dir(layer)) <= allowed
        assert hub_kernels.Repository(layer).load() is layer


@needs_kernels
def test_mapping_names_every_capability_alone() -> None:
    mapping = hub_kernels.kernel_mapping()
    assert mapping.keys() == {"RMSNorm", "RMSNormZeroCentered", "RMSNormGated"}
    for devices in mapping.values():
        cuda = [device.properties for device in devices if not isinstance(device, str)]
        assert [(one.min_capability, one.max_capability) for one in cuda] == [
            (number, number) for number in hub_kernels.CAPABILITIES
        ]
        assert "cpu" in devices


@needs_kernels
def test_our_entry_wins_over_the_hub_s() -> None:
    """kernels takes the smallest interval of capabilities, whichever was registered first."""
    from kernels.layer.globals import _KERNEL_MAPPING

    hub = {"RMSNorm": {"cuda": kernels.LayerRepository("somebody/kernels", layer_name="RMSNorm", version=1)}}
    for first, second in ((hub, hub_kernels.kernel_mapping()), (hub_kernels.kernel_mapping(), hub)):
        with kernels.use_kernel_mapping(first, inherit_mapping=False), kernels.use_kernel_mapping(second):
            entries = _KERNEL_MAPPING.get()["RMSNorm"]["cuda"].repos_by_capability
            chosen = {number: entries.find_smallest_interval(number) for number in (75, *hub_kernels.CAPABILITIES)}
        kinds = {number: {type(one) for one in modes.values()} for number, modes in chosen.items()}
        ours = {number for number, types in kinds.items() if types == {hub_kernels.Repository}}
        assert ours == set(hub_kernels.CAPABILITIES)


@needs_kernels
@pytest.mark.parametrize("owner", NAMED, ids=lambda owner: owner.__name__)
def test_one_name_several_roundings(owner: Any, named: None) -> None:
    """Llama's norm and GptOss's are both "RMSNorm" to kernels; each gets its own roundings: the bits of patch."""
    module, x = owner(64).to(torch.bfloat16), torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    module.weight.data += torch.linspace(-1, 1, 64)
    operands = (x.bfloat16(), x.flip(0).bfloat16())[: 2 if "Gated" in owner.__name__ else 1]
    with patched(module):
        expected = module(*operands)
    assert hub_kernels.kernelize(module) is module
    assert module.forward.__func__.__qualname__ == f"{NAMED[owner]}.forward"
    assert same(module(*operands), expected)


@needs_kernels
def test_unknown_class_keeps_its_own_forward(named: None) -> None:
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states + 1

    module = OtherRMSNorm(64)
    hub_kernels.kernelize(module)
    assert torch.equal(module(torch.ones(64)), torch.full((64,), 2.0))


@needs_kernels
def test_kernelized_model(named: None) -> None:
    model: Any = build("llama", "bf16")
    with patched(model):
        expected = logits(model, "llama")
    hub_kernels.kernelize(model)
    assert same(logits(model, "llama"), expected)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(logits(compiled, "llama"), expected)
    report = patch(model)  # and patch says what is in its way
    assert {one.reason for one in report.left} == {
        "its forward was bound to the instance by something else (kernels, accelerate, Liger?): undo that first"
    }


@needs_kernels
def test_compiled_before_it_is_called(named: None) -> None:
    """set_use_kernels and torch.compile at once: the classes are looked at when their layer is bound."""
    module, x = LlamaRMSNorm(64).bfloat16(), torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with patched(module):
        expected = module(x)
    hub_kernels._forwards.clear()
    with kernels.use_kernel_mapping(hub_kernels.kernel_mapping(), inherit_mapping=False):
        kernels.kernelize(module, mode=kernels.Mode.INFERENCE, device="cpu")
    torch.compiler.reset()
    assert same(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)


@needs_kernels
def test_names_that_nobody_gave(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernels that transformers does not accept: it names no layers, and nothing would be bound without a word."""
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole text follows)
        hub_kernels.kernelize(nn.Sequential(nn.Linear(1, 1)))
    assert str(error.value) == (
        "no module of Sequential has a name for kernels, so there is nothing to bind; transformers gives names only "
        f"with a version of kernels that it accepts (installed: {kernels.__version__}): install that version, or use "
        "pallas_norm_torch.patch, which needs none"
    )


@needs_kernels
def test_kernelize_leaves_patched_norms(named: None) -> None:
    model: Any = build("llama", "bf16")
    patch(model)
    expected = logits(model, "llama")
    hub_kernels.kernelize(model)
    assert "forward" not in vars(model.model.norm)
    assert type(model.model.norm).forward.ours is _forwards.llama
    assert same(logits(model, "llama"), expected)
    assert unpatch(model).restored == {"LlamaRMSNorm": 5}


@needs_kernels
def test_kernelize_would_take_norms_that_do_not_hide_their_name(named: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant of the test above."""
    model: Any = build("llama", "bf16")
    patch(model)
    monkeypatch.setattr(_replacing._Absent, "__get__", lambda *_: "RMSNorm")
    hub_kernels.kernelize(model)
    assert "forward" in vars(model.model.norm)


@needs_transformers_with_it
def test_set_use_kernels_leaves_patched_norms() -> None:
    """transformers binds the hub's kernels; on a CPU it has none for norms, and binds each class's own forward."""
    model: Any = build("llama", "bf16")
    patch(model)
    expected = logits(model, "llama")
    model.set_use_kernels(True)
    assert "forward" not in vars(model.model.norm)
    assert same(logits(model, "llama"), expected)


@needs_transformers_with_it
def test_set_use_kernels_takes_ours_when_registered() -> None:
    model: Any = build("llama", "bf16")
    with patched(model):
        expected = logits(model, "llama")
    with kernels.use_kernel_mapping(hub_kernels.kernel_mapping()):
        model.set_use_kernels(True)
    assert model.model.norm.forward.__func__ is hub_kernels.RMSNorm.forward
    assert same(logits(model, "llama"), expected)


@needs_transformers_with_it
def test_patch_after_set_use_kernels_without_a_kernel() -> None:
    """kernels has bound each class's own forward to the instances, which is no obstacle."""
    model: Any = build("llama", "bf16")
    model.set_use_kernels(True)
    assert "forward" in vars(model.model.norm)
    assert patch(model).replaced == {"LlamaRMSNorm": 5}
    assert "forward" not in vars(model.model.norm)


def test_transformers_is_the_one_that_names_these_layers() -> None:
    """A new name for norms would have to get a layer here."""
    source = transformers.integrations.hub_kernels.__file__
    with open(source, encoding="utf-8") as file:
        text = file.read()
    assert '"RMSNorm": {' in text
    assert '"RMSNormGated": {' in text
