"""What is left as it is, and why: instances, refused classes, classes that upstream has changed. What reports say."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pathlib
import pickle
import types
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pallas_norm_torch import _classes, _forwards, huggingface
from pallas_norm_torch._classes import ROWS, Kind, Row
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.norm_classes import F32, N, build, classes_of, found, gemma, llama, loaded, unknown

LLAMA = next(digest for digest, row in ROWS.items() if row.example == "LlamaRMSNorm")


def reason(module: nn.Module) -> str:
    report = huggingface.patch(module)
    assert not report.replaced
    (left,) = report.left
    assert left.name == ""
    assert left.class_name == type(module).__name__
    return left.reason


def test_eps_is_read_at_each_call() -> None:
    module, x = llama(), torch.ones(1, N)
    huggingface.patch(module)
    before = module(x)
    module.variance_epsilon = 3.0
    after = module(x)
    torch.testing.assert_close(after, before / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("eps", [None, -1.0, "1e-6"])
def test_eps_that_is_no_eps(eps: Any) -> None:
    module = llama()
    module.variance_epsilon = eps
    assert reason(module) == f"its variance_epsilon is {eps!r}; needed a number, at least 0: set it, or leave it"


def test_weight_in_float64() -> None:
    assert reason(llama().double()) == (
        "its weight is torch.float64 of shape (64,); needed one dimension in bfloat16, float16 or float32: cast the "
        "model with model.to, or leave it"
    )


def test_norm_over_several_dimensions() -> None:
    assert reason(nn.RMSNorm((4, N), eps=1e-6, elementwise_affine=False)) == (
        "it normalises 2 dimensions, (4, 64), together; needed the last one alone: leave it"
    )


def test_norm_without_float32() -> None:
    module = build(classes_of(next(key for key, row in ROWS.items() if row.kind is Kind.BIASED))[0], F32)
    module.force_float32_reductions = False
    assert reason(module) == (
        "force_float32_reductions is False, so it sums squares in x's dtype; needed float32: set it, or leave it"
    )


def test_parametrized_weight() -> None:
    module = llama()
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    assert reason(module) == (
        "its weight is parametrized, which changes its class too: remove the parametrization first"
    )


def test_forward_bound_by_something_else() -> None:
    module = llama()
    module.forward = functools.partial(type(module).forward, module)
    assert reason(module) == (
        "its forward was bound to the instance by something else (kernels, accelerate, Liger?): undo that first"
    )


def test_own_forward_bound_to_the_instance() -> None:
    """What kernelize leaves where it has no kernel."""
    module = llama()
    module.forward = types.MethodType(type(module).forward, module)
    assert huggingface.patch(module).replaced == {"LlamaRMSNorm": 1}
    assert "forward" not in vars(module)


@pytest.mark.parametrize(("example", "note"), [(row.example, row.note) for row in ROWS.values() if row.forward is None])
def test_refused_classes_say_why(example: str, note: str) -> None:
    (owner,) = set(loaded([one for one in found() if one.name == example]))
    assert _classes.recognise(owner) == note


# --- a class that upstream has changed --------------------------------------------------------------------------------


def changed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str) -> type[nn.Module]:
    """LlamaRMSNorm from a file in which its source has been edited."""
    source = inspect.getsource(LlamaRMSNorm)
    assert old in source
    name = f"modeling_{abs(hash((old, new)))}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "def use_kernel_forward_from_hub(name):\n    return lambda owner: owner\n\n\n" + source.replace(old, new)
    )
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module(name).LlamaRMSNorm


CHANGES = [
    ("torch.float32", "torch.float64", "in float64, not in float32"),
    (
        "self.weight * hidden_states.to(input_dtype)",
        "self.weight - hidden_states.to(input_dtype)",
        "subtracts",
    ),
    (".mean(-1, keepdim=True)", ".sum(-1, keepdim=True)", "not of a mean of squares"),
    ("variance + self.variance_epsilon", "variance * self.variance_epsilon", "not of a mean of squares"),
    ("hidden_states.pow(2)", "hidden_states.pow(3)", "raises to the power 3"),
]


@pytest.mark.parametrize(("old", "new", "why"), CHANGES)
def test_changed_upstream(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, why: str
) -> None:
    owner = changed(tmp_path, monkeypatch, old, new)
    module = nn.Sequential(build(owner, F32))
    report = huggingface.patch(module)
    assert str(report) == f"left 1 LlamaRMSNorm (0): {unknown(module[0])}"
    assert why in str(report)
    assert type(module[0]) is owner


def test_changed_into_another_known_body(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name says Llama, its source is Olmo2's: it gets Olmo2's replacement."""
    owner = changed(
        tmp_path,
        monkeypatch,
        "self.weight * hidden_states.to(input_dtype)",
        "(self.weight * hidden_states).to(input_dtype)",
    )
    module = build(owner, F32)
    assert huggingface.patch(module).replaced == {"LlamaRMSNorm": 1}
    assert type(module).forward.ours is _forwards.olmo2


def test_changed_words_only(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Annotations, comments and docstrings are not what it computes."""
    body = "input_dtype = hidden_states.dtype"
    owner = changed(tmp_path, monkeypatch, body, f'"""Other words."""\n        {body}  # and a comment')
    assert huggingface.patch(build(owner, F32)).replaced == {"LlamaRMSNorm": 1}


def test_made_with_exec() -> None:
    """There is no source to read, but it computes."""
    namespace: dict[str, Any] = {"torch": torch, "nn": nn, "__name__": "nowhere"}
    exec(inspect.getsource(LlamaRMSNorm).replace("@use_kernel_forward_from_hub", "# "), namespace)
    report = huggingface.patch(build(namespace["LlamaRMSNorm"], F32))
    assert report.replaced == {"LlamaRMSNorm": 1}
    assert report.known == {"LlamaRMSNorm": "computation"}


def test_subclass_with_another_helper() -> None:
    class OtherRMSNorm(GemmaRMSNorm):
        def _norm(self, x: torch.Tensor) -> torch.Tensor:
            return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    module = build(OtherRMSNorm, F32)
    assert reason(module) == unknown(module)
    assert "divides by the root" in unknown(module)


def test_subclass_with_the_same_methods() -> None:
    class SameRMSNorm(LlamaRMSNorm):
        """Inherits its forward."""

    assert huggingface.patch(build(SameRMSNorm, F32)).replaced == {"SameRMSNorm": 1}


def test_wrapped_forward_is_not_the_one_that_it_wraps(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = LlamaRMSNorm
    forward = owner.forward

    @functools.wraps(forward)
    def doubled(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * forward(self, hidden_states)

    monkeypatch.setattr(owner, "forward", doubled)
    module = build(owner, F32)
    assert reason(module) == unknown(module)


def test_unknown_class_that_does_not_look_like_a_norm_is_not_reported() -> None:
    assert str(huggingface.patch(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))) == "found no RMSNorm"


def test_class_with_the_body_but_another_name() -> None:
    class Scale(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            variance = hidden_states.square().mean(-1, keepdim=True)
            return hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    module = build(Scale, F32)
    assert reason(module) == unknown(module)
    assert "not in float32" in unknown(module)


# --- reports ----------------------------------------------------------------------------------------------------------


def test_the_report_is_words() -> None:
    model = nn.ModuleDict({"a": llama(), "b": llama(), "c": gemma(), "d": llama().double(), "e": llama().double()})
    refused = (
        "its weight is torch.float64 of shape (64,); needed one dimension in bfloat16, float16 or float32: cast the "
        "model with model.to, or leave it"
    )
    left = f"left 2 LlamaRMSNorm (d and 1 more): {refused}"
    where = "3 of them run in their own forward: they are on cpu, and the kernels take CUDA tensors"
    assert str(huggingface.patch(model)) == (
        f"replaced 3: 1 GemmaRMSNorm, 2 LlamaRMSNorm\nrecognised by source: GemmaRMSNorm, LlamaRMSNorm\n{where}\n{left}"
    )
    assert str(huggingface.patch(model)) == f"replaced before 3: 1 GemmaRMSNorm, 2 LlamaRMSNorm\n{where}\n{left}"
    assert str(huggingface.unpatch(model)) == "restored 3: 1 GemmaRMSNorm, 2 LlamaRMSNorm"
    assert str(huggingface.unpatch(model)) == "found no RMSNorm"


@pytest.mark.parametrize("function", [huggingface.patch, huggingface.unpatch])
def test_no_module(function: Any) -> None:
    with pytest.raises(TypeError) as error:
        function("model")
    assert str(error.value) == "model is a str; needed a torch.nn.Module: the model or a part of it"


def test_pickle_where_the_class_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module = llama()
    huggingface.patch(module)
    written = pickle.dumps(module)
    monkeypatch.delitem(ROWS, LLAMA)
    with pytest.raises(pickle.UnpicklingError) as error:
        pickle.loads(written)
    assert str(error.value) == (
        "the pickle holds a patched LlamaRMSNorm, but here its forward is another; needed the version of its package "
        "that wrote the pickle, or a pickle of the model after unpatch"
    )


def test_row_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Row(Kind.REFUSED, "", "").note = "other"  # pyright: ignore
