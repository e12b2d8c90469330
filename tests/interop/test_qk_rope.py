"""patch(fuse_qk_rope=True) of models: the bits stay, with gradients, caches and compiled, there are ways back, and the
steps are taken where one kernel would not do the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from pallas_norm_torch import _qk_rope, patch, patched, unpatch
from tests.interop.fused_calls import calls_of
from tests.interop.launched import kernels_everywhere  # noqa: F401 (a fixture of every test here)
from tests.interop.tiny_models import DTYPES, SHAPE, build, logits, same

CONFIG = SHAPE | {"head_dim": 16}
MOE = CONFIG | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def qwen3(dtype: str = "bf16") -> Any:
    return build("qwen3", dtype)


def qwen3_moe(dtype: str = "bf16") -> Any:
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE))
    return model.to(DTYPES[dtype]).eval()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made", [qwen3, qwen3_moe])
def test_no_bit_of_a_model_changes(made: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = made(dtype), calls_of(monkeypatch)
    with patched(model):
        steps = logits(model, "qwen3")
    assert not calls
    with patched(model, fuse_qk_rope=True, fuse_residual=True) as report:
        fused = logits(model, "qwen3")
    assert sum(report.rotated.values()) == len(calls) == 2
    assert sum(report.fused.values()) == 2
    assert not report.left
    assert same(fused, steps)
    assert not any(hasattr(type(module), "_pallas_norm_original") for module in model.modules())  # restored


def test_no_bit_of_a_gradient_changes() -> None:
    model, ids = qwen3(), torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    with patched(model):
        steps = gradients()
    with patched(model, fuse_qk_rope=True):
        fused = gradients()
    assert all(same(one, steps[name]) for name, one in fused.items())


@pytest.mark.slow
def test_generation_with_a_cache_is_the_same() -> None:
    model, ids = qwen3(), torch.tensor([[5, 7, 11]])
    patch(model)
    steps = model.generate(ids, max_new_tokens=6, do_sample=False)
    patch(model, fuse_qk_rope=True)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), steps)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_in_one_graph() -> None:
    model = qwen3()
    patch(model)
    steps = logits(model, "qwen3")
    patch(model, fuse_qk_rope=True)
    assert same(logits(torch.compile(model, backend="aot_eager", fullgraph=True), "qwen3"), steps)


def test_the_ways_back() -> None:
    model = qwen3()
    own = type(model.model.layers[0].self_attn)
    report = patch(model, fuse_qk_rope=True)
    assert dict(report.rotated) == {"Qwen3Attention": 2}
    assert "rotated 2: 2 Qwen3Attention" in str(report)
    before = logits(model, "qwen3")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(logits(copied, "qwen3"), before)
        assert type(copied.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
    again = patch(model, fuse_qk_rope=True)
    assert not again.rotated
    assert dict(again.already) == {"Qwen3RMSNorm": 9}
    taken_back = patch(model)
    assert dict(taken_back.restored) == {"Qwen3Attention": 2}
    assert type(model.model.layers[0].self_attn) is own
    patch(model, fuse_qk_rope=True)
    assert dict(unpatch(model).restored) == {"Qwen3Attention": 2, "Qwen3RMSNorm": 9}
    assert type(model.model.layers[0].self_attn) is own


def test_the_steps_are_taken_where_the_call_of_a_norm_would_do_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = qwen3(), calls_of(monkeypatch)
    patch(model, fuse_qk_rope=True)
    own, seen = logits(model, "qwen3"), list[Any]()
    first, second = (layer.self_attn for layer in model.model.layers)
    calls.clear()
    hook = first.q_norm.register_forward_hook(lambda *arguments: seen.append(arguments))
    assert same(logits(model, "qwen3"), own)
    assert len(seen) == len(calls) == 1
    hook.remove()
    calls.clear()
    unpatch(second.k_norm)
    logits(model, "qwen3")
    assert len(calls) == 1
    first.q_norm.variance_epsilon = 0.5  # another than k's
    logits(model, "qwen3")
    assert len(calls) == 1


def test_the_steps_are_taken_where_another_function_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, others = qwen3(), calls_of(monkeypatch), list[Any]()
    patch(model, fuse_qk_rope=True)

    def other(*arguments: Any) -> Any:  # as Liger's
        others.append(arguments)
        return apply_rotary_pos_emb(*arguments)

    monkeypatch.setattr(modeling_qwen3, "apply_rotary_pos_emb", other)
    logits(model, "qwen3")
    assert len(others) == 2
    assert not calls
    unpatch(model)
    (left,) = {one.reason for one in patch(model, fuse_qk_rope=True).left}
    assert left == _qk_rope.OTHER_ROTATION.format("apply_rotary_pos_emb")
    monkeypatch.undo()
    assert dict(patch(model, fuse_qk_rope=True).rotated) == {"Qwen3Attention": 2}


def test_the_steps_are_taken_where_another_function_rotates_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is patched, and after: what was found out of another rotate_half is not kept."""
    model, calls, own = qwen3(), calls_of(monkeypatch), modeling_qwen3.rotate_half
    patch(model, fuse_qk_rope=True)
    expected = logits(model, "qwen3")
    assert len(calls) == 2
    calls.clear()
    monkeypatch.setattr(modeling_qwen3, "rotate_half", lambda x: -own(x))
    assert not same(logits(model, "qwen3"), expected)
    assert not calls
    unpatch(model)
    (left,) = {one.reason for one in patch(model, fuse_qk_rope=True).left}
    assert left == _qk_rope.OTHER_ROTATION.format("apply_rotary_pos_emb")
    monkeypatch.setattr(modeling_qwen3, "rotate_half", own)
    assert dict(patch(model, fuse_qk_rope=True).rotated) == {"Qwen3Attention": 2}
    assert same(logits(model, "qwen3"), expected)
    assert len(calls) == 2


class Marked(torch.Tensor):
    """A subclass, which may mean more by an operation."""


ANGLES = torch.ones(1, 3, 16)


@pytest.mark.parametrize(
    "change",
    [
        {"cos": ANGLES.double(), "sin": ANGLES.double()},
        {"cos": ANGLES.half(), "sin": ANGLES.half()},
        {"cos": ANGLES.clone().requires_grad_()},
        {"cos": ANGLES[0], "sin": ANGLES[0]},
        {"sin": ANGLES[:, :1]},
        {"k": torch.ones(2, 3, 1, 16).bfloat16()},
        {"cos": ANGLES.as_subclass(Marked), "sin": ANGLES.as_subclass(Marked)},
    ],
    ids=["float64", "float16", "grad", "rank", "shape", "mixed", "subclass"],
)
def test_the_steps_are_taken_with_operands_that_are_not_those_of_the_kernel(
    change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, taken = calls_of(monkeypatch), list[Any]()
    norms = nn.ModuleList(modeling_qwen3.Qwen3RMSNorm(16) for _ in range(2))
    patch(norms)
    given = {"q": torch.ones(2, 3, 4, 16), "k": torch.ones(2, 3, 1, 16), "cos": ANGLES, "sin": ANGLES}

    def rotate(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        taken.append(q)
        return q, k

    _qk_rope.norm_rope(rotate, None, *norms, **given, rotate=rotate)
    assert len(calls) == 1
    assert not taken
    _qk_rope.norm_rope(rotate, None, *norms, **given | change, rotate=rotate)
    assert len(calls) == len(taken) == 1


class IntoAWorkspace(nn.Linear):
    """An engine's: every one writes to the same memory, which is valid until the next call."""

    memory: dict[int, torch.Tensor] = {}  # noqa: RUF012

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        memory = self.memory.setdefault(0, torch.empty(4096, dtype=x.dtype))
        y = super().forward(x)
        return memory[: y.numel()].view(y.shape).copy_(y)


@torch.no_grad()
def test_what_the_next_projection_overwrites_is_normalised_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = qwen3("f32"), calls_of(monkeypatch)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(layer.self_attn, name).__class__ = IntoAWorkspace
        layer.self_attn.v_proj.__class__ = nn.Linear
        layer.self_attn.k_norm.weight.data += 0.5
    with patched(model):
        steps = logits(model, "qwen3")
    with patched(model, fuse_qk_rope=True) as report:
        assert sum(report.rotated.values()) == 2
        assert same(logits(model, "qwen3"), steps)
    assert not calls
